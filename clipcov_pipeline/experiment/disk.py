"""How much disk an experiment needs."""

import shutil
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.sizes import human, size_of
from clipcov_pipeline.proxy.models import register_model_configs

INDEX_BYTES = 90  # of a sample in an index of places, as zstd packs it, and in DataComp's list
ASSUMED_SAMPLE_BYTES = 25_000  # an image of img2dataset's 256 to 384 pixels with its caption and json


def disk_needed(config: Config, samples: int, pool_bytes: int, *, packed: bool = False) -> dict[str, int]:
    """Estimate what the work folder will hold, in bytes: places, embeddings, subsets, checkpoints.

    Of tars that are not on this machine, what the trainings at work fetch, at most all of it for each.

    Args:
        config: the experiment.
        samples: of the pool.
        pool_bytes: size of its shards; 0 where it is not known: `ASSUMED_SAMPLE_BYTES` a sample.
        packed: whether the pool is no tars, and gets copied into some.
    """
    pool = pool_bytes or samples * ASSUMED_SAMPLE_BYTES
    kept = (1 - config.evaluate.holdout_fraction) * (
        1 + len(config.select.methods) * sum(config.select.fractions)
    )
    subsets = kept * (samples * INDEX_BYTES + (pool if config.select.write_tars else 0))
    remote = "://" in config.shards.source and not packed
    fetched = pool * config.automation.pools.get("gpu", 1) if remote else 0
    proxy, trained = model_size(config.proxy.model), model_size(config.train.model)
    rows = samples * (2 * 2 * proxy.embed_dim + 200)  # two fp16 vectors, uid, key and caption
    # weights in fp32, of an arm in the store and in MLflow's registry; the one in training also holds the
    # optimiser's two moments
    arms = len(recipes(config))
    return {
        "places": 2 * samples * INDEX_BYTES,
        "embeddings": rows,
        "subsets": round(subsets),
        **({"fetched": fetched} if fetched else {}),
        **({"pool packed into tars": pool} if packed else {}),
        "checkpoints": 4 * (2 * arms * trained.parameters + 3 * trained.parameters + proxy.parameters),
    }


class ModelSize(NamedTuple):
    """Parameters and width of the shared space of an architecture."""

    parameters: int
    embed_dim: int


@lru_cache
def model_size(model: str) -> ModelSize:
    """Build an architecture without memory for its weights, and count."""
    import open_clip
    import torch

    register_model_configs()
    with torch.device("meta"):
        built = open_clip.create_model(model, device="meta")
    parameters = sum(weights.numel() for weights in built.parameters())
    return ModelSize(parameters, (open_clip.get_model_config(model) or {})["embed_dim"])


def disk_finding(config: Config, disk: Mapping[str, int], *, assumed: bool) -> Finding:
    """Compare what is needed (bytes, by part) with what is free; ``assumed``: the pool's size is a guess."""
    place = config.work
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, sum(disk.values())
    parts = ", ".join(f"{name} {human(value)}" for name, value in disk.items())
    guess = f"; the pool taken as {human(ASSUMED_SAMPLE_BYTES)} a sample" if assumed else ""
    text = f"about {human(needed)} ({parts}{guess}), {human(free)} free at {place}"
    if free > needed:
        return Finding("ok", "disk", text)
    there = size_of(config.work)  # some of it may be what is needed
    level = "warning" if free > needed - there else "missing"
    return Finding(level, "disk", f"{text}, {human(there)} in {config.work} already")
