"""From a checkpoint to scores, by CLIP_benchmark's names."""
