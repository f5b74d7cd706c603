"""From a subset to a checkpoint: one run of open_clip_train."""
