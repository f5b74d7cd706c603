"""Ends the work of a run that was cancelled: soon, and for good."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


# longer than a training is given to end after its own interruption (training.server.TERMINATION_SECONDS)
LOOK_SECONDS = 30.0


@contextmanager
def cancellable(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Let a cancelled run's step fail instead of being interrupted, and interrupt it once more where need be.

    Dagster tries a step that has a retry policy again after an interruption, whoever asked for it: a
    cancelled training would begin anew. And it raises the interruption wherever the step is just then: within
    the clean-up of an object Python ignores it, and the step goes on.

    Raises:
        dagster.Failure: the run was cancelled; Dagster then shows it as cancelled.
    """
    over = threading.Event()
    watch = threading.Thread(target=_interrupt_when_cancelled, args=(context, over), daemon=True)
    watch.start()
    try:
        yield
    except dg.DagsterExecutionInterruptedError as interruption:
        if not _is_cancelled(context):
            raise
        raise dg.Failure("the run was cancelled", allow_retries=False) from interruption
    finally:
        over.set()
        watch.join()


def _interrupt_when_cancelled(context: dg.AssetExecutionContext, over: threading.Event) -> None:
    """Interrupt the step if it is still at work a while after its run was cancelled."""
    seen = False
    while not over.wait(LOOK_SECONDS):
        if seen:
            context.log.warning("The run was cancelled and its step is still at work: interrupting it again.")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        seen = _is_cancelled(context)


def _is_cancelled(context: dg.AssetExecutionContext) -> bool:
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in CANCELLED
