"""The stages: their names, code versions, and which of them are made shard by shard."""

# Raise a stage's version when its code gives another result for the same input.
CODE_VERSIONS: dict[str, str] = {
    "raw_shards": "1",
    "proxy_model": "1",
    "embeddings": "1",
    "early_similarities": "1",
    "pseudo_labels": "1",
    "rankings": "2",
    "subsets": "1",
    "pool_map": "1",
    "subset_diagnostics": "1",
    "subset_galleries": "1",
    "checkpoints": "1",
    "scores": "3",
    "leaderboard": "2",
    "checkpoint_galleries": "1",
    "report": "2",
}

STAGES = tuple(CODE_VERSIONS)

PER_SHARD = ("raw_shards", "embeddings", "early_similarities")

HOLDOUT = "holdout"

OVERLAP = "overlap"

GALLERY = "gallery.json"
