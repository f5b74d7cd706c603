"""Cancelled runs, in a real Dagster instance."""

import signal
import time

import dagster as dg
import pytest

from assets.steps import cancellation
from assets.steps.cancellation import cancellable

RETRIES = dg.RetryPolicy(max_retries=2)


def run_of(asset: dg.AssetsDefinition) -> tuple[dg.DagsterRun, list[dg.DagsterEvent]]:
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([asset], instance=instance, raise_on_error=False)
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        return run, list(result.all_events)


def attempts(events: list[dg.DagsterEvent]) -> int:
    started = (dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_RESTARTED)
    return sum(event.event_type in started for event in events)


def test_a_cancelled_step_is_not_tried_again() -> None:
    @dg.asset(retry_policy=RETRIES)
    def training(context: dg.AssetExecutionContext) -> None:
        with cancellable(context):
            context.instance.report_run_canceling(context.run)
            signal.raise_signal(signal.SIGINT)

    run, events = run_of(training)
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert attempts(events) == 1


def test_an_interruption_that_nobody_asked_for_follows_the_retry_policy() -> None:
    interruptions = [True, False]

    @dg.asset(retry_policy=RETRIES)
    def training(context: dg.AssetExecutionContext) -> None:
        with cancellable(context):
            if interruptions.pop(0):
                signal.raise_signal(signal.SIGINT)

    run, events = run_of(training)
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert attempts(events) == 2


def test_a_lost_interruption_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "LOOK_SECONDS", 0.2)

    @dg.asset(retry_policy=RETRIES)
    def training(context: dg.AssetExecutionContext) -> None:
        with cancellable(context):
            context.instance.report_run_canceling(context.run)
            time.sleep(60)

    started = time.monotonic()
    run, events = run_of(training)
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert attempts(events) == 1
    assert time.monotonic() - started < 30
