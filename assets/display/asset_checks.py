"""Failure signatures as Dagster's asset checks: yielded by the assets, told again when a bound changes.

A check of a partitioned asset is about all of its partitions that are up to date, so that a run of one does
not hide that another fails.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from assets.display.preview import cell
from clipcov_pipeline.experiment.checks import CheckOutcome, checks_of, evaluate_checks
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES

SHOWN = 20  # outcomes listed on a check's page; the numbers say how many there are
STATE = "state"


def check_specs(stage: str) -> list[dg.AssetCheckSpec]:
    """Return the checks that a stage yields with its materializations."""
    return [dg.AssetCheckSpec(c.name, asset=stage, description=c.description) for c in checks_of(stage)]


def check_results(stage: str, project: Project) -> Iterator[dg.AssetCheckResult]:
    """Yield every check of a stage, over all of its entries that are up to date now."""
    if not checks_of(stage):
        return
    for name, outcomes in _by_check(project.config, project.plan(), stage).items():
        yield dg.AssetCheckResult(check_name=name, **_verdict(outcomes))


def report_checks(instance: dg.DagsterInstance, config: Config, plan: Plan) -> None:
    """Write an evaluation for every check whose outcome is not what Dagster shows: a bound was changed, or a
    shard removed. Nothing is built for it."""
    for stage in STAGES:
        for name, outcomes in _by_check(config, plan, stage).items():
            if not outcomes or _reported(instance, stage, name) == _state(outcomes):
                continue
            key, verdict = dg.AssetKey(stage), _verdict(outcomes)
            instance.report_runless_asset_event(dg.AssetCheckEvaluation(key, name, **verdict))


def _by_check(config: Config, plan: Plan, stage: str) -> dict[str, list[CheckOutcome]]:
    found: dict[str, list[CheckOutcome]] = {check.name: [] for check in checks_of(stage)}
    for outcome in evaluate_checks(config, plan.records, [stage]) if found else ():
        found[outcome.name].append(outcome)
    return found


def _verdict(outcomes: Sequence[CheckOutcome]) -> dict[str, Any]:
    """Return what Dagster shows of a check; one without an entry to look at has not passed."""
    return {
        "passed": bool(outcomes) and all(outcome.passed for outcome in outcomes),
        "severity": _severity(outcomes),
        "metadata": _metadata(outcomes),
        "description": _description(outcomes),
    }


def _severity(outcomes: Sequence[CheckOutcome]) -> dg.AssetCheckSeverity:
    error = any(outcome.severity == "error" for outcome in outcomes)
    return dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN


def _ordered(outcomes: Sequence[CheckOutcome]) -> list[CheckOutcome]:
    """Return the worst first: the failed, by their distance to the bound, then those not defined last."""

    def distance(outcome: CheckOutcome) -> float:
        if outcome.value is None:
            return float("inf")
        sign = -1 if outcome.good == "at most" else 1
        return sign * (outcome.value - outcome.threshold)

    return sorted(outcomes, key=lambda o: (o.passed, distance(o) if o.value == o.value else -float("inf")))


def _description(outcomes: Sequence[CheckOutcome]) -> str:
    if not outcomes:
        return "nothing to check: no entry is up to date"
    failed = sum(not outcome.passed for outcome in outcomes)
    worst = _ordered(outcomes)[0]
    count = f"{failed} of {len(outcomes)} failed, worst " if len(outcomes) > 1 and failed else ""
    where = f"{worst.entry}: " if len(outcomes) > 1 else ""
    return f"{count}{where}{worst.text}"


def _metadata(outcomes: Sequence[CheckOutcome]) -> dict[str, Any]:
    """Return the worst figure, its bound, and the figures of the entries, the worst first."""
    if not outcomes:
        return {STATE: _state(outcomes)}
    ordered = _ordered(outcomes)
    worst = ordered[0]
    lines = [f"| {cell(o.partition)} | {_word(o)} | {cell(o.text)} |" for o in ordered[:SHOWN]]
    rest = [f"\nand {len(ordered) - SHOWN:,} more"] if len(ordered) > SHOWN else []
    figure = {} if worst.value is None else {"figure": worst.value}
    return {
        **figure,
        "bound": worst.threshold,
        "good": worst.good,
        "failed": sum(not outcome.passed for outcome in outcomes),
        "checked": len(outcomes),
        "entries": dg.MetadataValue.md(
            "\n".join(["| partition | outcome | figure |", "| --- | --- | --- |", *lines, *rest])
        ),
        STATE: _state(outcomes),
    }


def _word(outcome: CheckOutcome) -> str:
    if not outcome.passed:
        return f"failed ({outcome.severity})"
    return "not defined" if outcome.value is None else "passed"


def _state(outcomes: Sequence[CheckOutcome]) -> str:
    said = [[o.partition, o.severity, o.passed, repr(o.value), o.threshold, o.text] for o in outcomes]
    return digest_of(said)[:16]


def _reported(instance: dg.DagsterInstance, stage: str, name: str) -> str | None:
    """Return the state that the newest evaluation tells of."""
    key = dg.AssetCheckKey(dg.AssetKey(stage), name)
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    event = history[0].event if history else None
    found = event.dagster_event if event else None
    if found is None or found.event_type is not dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        return None  # a run that failed before it came to the check
    value = found.asset_check_evaluation_data.metadata.get(STATE)
    return str(value.value) if value is not None else None
