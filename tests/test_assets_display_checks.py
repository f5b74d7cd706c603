"""Failure signatures in Dagster, on real data: yielded by assets, blocking, told again for a new bound."""

from typing import Any

import dagster as dg
import pytest
from dagster import AssetCheckKey, AssetKey

from assets.display.asset_checks import report_checks
from assets.running.execution import execute
from assets.running.run import run_plan
from clipcov_pipeline.experiment.checks import CHECKS, evaluate_checks
from clipcov_pipeline.experiment.plan import Status
from lab import Lab

pytestmark = pytest.mark.slow


def told(instance: dg.DagsterInstance, stage: str, name: str) -> list[Any]:
    """What Dagster has of a check, the newest first."""
    key = AssetCheckKey(AssetKey(stage), name)
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=10)
    events = [entry.event.dagster_event for entry in history if entry.event]
    kind = dg.DagsterEventType.ASSET_CHECK_EVALUATION
    return [event.asset_check_evaluation_data for event in events if event and event.event_type is kind]


def set_check(lab: Lab, name: str, **values: Any) -> None:
    lab.edit(lambda s: s["diagnostics"]["checks"].update({name: values}))


def test_every_check_is_told_with_its_figure_by_the_run_that_built_the_entries(built_lab: Lab) -> None:
    project = built_lab.project()
    outcomes = evaluate_checks(project.config, project.plan().records)
    with built_lab.instance() as instance:
        for check in CHECKS:
            mine = [o for o in outcomes if (o.asset, o.name) == (check.asset, check.name)]
            evaluations = told(instance, check.asset, check.name)
            assert evaluations, check.name
            assert evaluations[0].passed == all(o.passed for o in mine)
            metadata = evaluations[0].metadata
            assert metadata["checked"].value == len(mine) > 0
            assert metadata["bound"].value == mine[0].threshold
            assert ("figure" in metadata) == any(o.value is not None for o in mine)


def test_an_untrained_proxy_blocks_selection_and_a_new_bound_embeds_nothing_again(lab: Lab) -> None:
    """By a bound that no proxy reaches: what six steps make of the lab's is a matter of chance."""
    before = {step.node.name: step.record for step in lab.plan().steps}
    set_check(lab, "matched_pairs", bound=1e6, severity="error")
    lab.edit(lambda s: s["labels"].update(n_clusters=4))
    with lab.instance() as instance:
        executed, failed = run_plan(instance, str(lab.yaml))
        assert not executed
        assert len(failed) == 1
        assert failed[0].startswith("pseudo_labels (blocked by check matched_pairs of embeddings/00000: lead")
        # the page of the check says so too, though nothing has run
        evaluation, *earlier = told(instance, "embeddings", "matched_pairs")
        assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.ERROR)
        assert earlier[0].severity == dg.AssetCheckSeverity.WARN
        # asked for by hand it is refused with the reason
        execute(instance, "pseudo_labels", ["_"])
        [run] = instance.get_runs(limit=1)
        assert run.status is dg.DagsterRunStatus.FAILURE
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        assert "blocked by check matched_pairs" in str(events[0].dagster_event.step_failure_data.error)
        count = len(told(instance, "embeddings", "matched_pairs"))
        report_checks(instance, lab.project().config, lab.plan())
        assert len(told(instance, "embeddings", "matched_pairs")) == count  # once
    set_check(lab, "matched_pairs", bound=-1e6, severity="error")
    step = lab.plan().by_name["pseudo_labels"]
    assert step.status is Status.BUILD
    lab.edit(lambda s: s["labels"].update(n_clusters=5))
    assert lab.run() == {"report": 1}  # it shows the bounds
    after = {step.node.name: step.record for step in lab.plan().steps}
    assert after.pop("report") != before.pop("report")
    assert after == before


def test_a_misaligned_subset_is_not_trained(lab: Lab) -> None:
    set_check(lab, "alignment", bound=1.1)  # more than a cosine can be
    lab.edit(lambda s: s["train"].update(lr=0.002))
    statuses = {step.node.partition: step.status for step in lab.plan().of("checkpoints")}
    assert statuses == {
        "full-f1-s0": Status.BUILD,
        "clipcov-f0.5-s0": Status.BLOCKED,
        "random-f0.5-s0": Status.BLOCKED,
    }
    with lab.instance() as instance:
        execute(instance, "checkpoints", ["random-f0.5-s0"])
        [run] = instance.get_runs(limit=1)
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert "blocked by check alignment of subset_diagnostics/random-f0.5" in str(
        events[0].dagster_event.step_failure_data.error
    )
