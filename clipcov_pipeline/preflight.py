"""What can be told before anything long runs: whether every training can fill its batches."""

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.plan import Plan
from clipcov_pipeline.project import Project


def check_batches(project: Project, plan: Plan) -> None:
    """Compare batch sizes with the pool, as soon as all manifests are there.

    The held-out share is taken at its expectation; the training itself checks the exact number.

    Raises:
        InputError: the pool, or the smallest fraction of it, has fewer samples than one batch.
    """
    records = [step.record for step in plan.of("raw_shards")]
    if not records or any(record is None for record in records):
        return
    usable = sum(record.stats["ok"] for record in records if record is not None)
    config = project.config
    pool = int(usable * (1 - config.evaluate.holdout_fraction))
    if pool == 0:
        raise InputError(
            f"shards.source: found {usable} usable samples in {len(records)} shards, expected some to choose"
            " from: look at the manifests' reasons (raw_shards)"
        )
    if config.proxy.train is not None:
        _check("proxy.train.batch_size", config.proxy.train.batch_size, pool, "the pool")
    fraction = min(config.select.fractions)
    _check("train.batch_size", config.train.batch_size, int(pool * fraction), f"{fraction:g} of the pool")


def _check(key: str, batch_size: int, samples: int, what: str) -> None:
    if batch_size > samples:
        raise InputError(
            f"{key}: found {batch_size}, expected at most about {samples}, the samples in {what}: lower it,"
            " or give more data or larger fractions"
        )
