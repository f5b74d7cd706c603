"""The dynamic partitions, one set a stage, and how they follow the plan.

Each stage has its own set, even where keys agree: assets that share a definition may be put into one run by
Dagster, and a stage whose partitions each carry their own data version (see ``materialize``) hands nothing on
within a run.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.stages import ONE_AT_A_TIME, PARTITIONED


def partitions_of(stage: str) -> dg.DynamicPartitionsDefinition:
    """Return the partitions definition of a stage; it is named like the stage."""
    return dg.DynamicPartitionsDefinition(name=stage)


def same_key(upstream: str) -> dg.AssetDep:
    """Depend on the partition of the same key."""
    return dg.AssetDep(upstream, partition_mapping=dg.IdentityPartitionMapping())


def every_key(upstream: str) -> dg.AssetDep:
    """Depend on all partitions."""
    return dg.AssetDep(upstream, partition_mapping=dg.AllPartitionMapping())


def sync_partitions(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Add the keys that the plan has and remove those that it no longer has."""
    for stage in PARTITIONED:
        wanted, known = plan.keys(stage), set(instance.get_dynamic_partitions(stage))
        for gone in known - set(wanted):
            instance.delete_dynamic_partition(stage, gone)
        missing = [key for key in wanted if key not in known]
        if missing:
            instance.add_dynamic_partitions(stage, missing)


def range_tags(stage: str, keys: Sequence[str]) -> dict[str, str]:
    """Return the tags by which a run covers the partitions from the first key to the last."""
    if stage not in PARTITIONED:
        return {}
    return {
        "dagster/asset_partition_range_start": keys[0],
        "dagster/asset_partition_range_end": keys[-1],
    }


def chunks(instance: dg.DagsterInstance, stage: str, keys: Sequence[str]) -> Iterator[list[str]]:
    """Cut keys into runs: ranges without gaps in Dagster's order, so that no other partition is touched."""
    if stage in ONE_AT_A_TIME or stage not in PARTITIONED:
        yield from ([key] for key in keys)
        return
    wanted, chunk = set(keys), []
    for key in instance.get_dynamic_partitions(stage):
        if key in wanted:
            chunk.append(key)
        elif chunk:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
