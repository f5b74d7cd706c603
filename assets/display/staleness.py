"""Says on each asset's page what is out of date and why, which Dagster's own staleness does not see.

An observation is written when what it says has changed, never for what is as it was.
"""

import dagster as dg

from assets.display.preview import cell
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.stages import STAGES

SHOWN = 20  # partitions listed on a page; the number says how many there are

STATE = "plan_state"


def report_staleness(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Write an observation for every asset whose out-of-date partitions, or their reasons, have changed."""
    for stage in STAGES:
        stale = [step for step in plan.of(stage) if step.status is not Status.CURRENT]
        state = digest_of([[step.node.partition, step.status, *step.why] for step in stale])[:16]
        before = _reported(instance, stage)
        if before != state and (stale or before is not None):
            metadata = {
                "out_of_date": len(stale),
                "why_out_of_date": dg.MetadataValue.md(reasons(stale)),
                STATE: state,
            }
            instance.report_runless_asset_event(dg.AssetObservation(stage, metadata=metadata))


def reasons(stale: list[Step]) -> str:
    """Return a Markdown table of partitions, what is to be done for each, and why."""
    if not stale:
        return "everything is up to date"
    lines = [f"| {cell(s.node.partition)} | {s.status} | {cell('; '.join(s.why))} |" for s in stale[:SHOWN]]
    rest = [f"\nand {len(stale) - SHOWN:,} more"] if len(stale) > SHOWN else []
    return "\n".join(["| partition | to do | why |", "| --- | --- | --- |", *lines, *rest])


def _reported(instance: dg.DagsterInstance, stage: str) -> str | None:
    """Return the state that the newest observation tells of."""
    records = instance.fetch_observations(dg.AssetKey(stage), limit=1).records
    observation = records[0].asset_observation if records else None
    value = observation.metadata.get(STATE) if observation is not None else None
    return str(value.value) if value is not None else None
