"""Runs one open_clip_train training in a process of its own through Dagster Pipes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.training.server import TrainServer
from assets.training.worker import SPEC_VARIABLE
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import write_text_at_once
from clipcov_pipeline.training.command import command, warnings
from clipcov_pipeline.training.damage import set_aside_damaged
from clipcov_pipeline.training.parent import PARENT_VARIABLE
from clipcov_pipeline.training.spec import RECORD, TrainSpec, to_json

LOG_TAIL = 2000  # characters of the training's own output that a failure shows

SERVER = TrainServer()


class LogsOnly:
    """The step's context for a Pipes session that carries logs only.

    Pipes holds an asset to yield what the session reports, one result for all partitions of the run; our
    stages yield an event a partition themselves (see ``materialize``): the session is opened as an op's.
    """

    has_assets_def = False

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._context = context

    @property
    def run_id(self) -> str:
        """The asset context's own ``run_id`` is deprecated."""
        return self._context.run.run_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def train(
    context: dg.AssetExecutionContext,
    pipes: dg.PipesSubprocessClient,
    spec: TrainSpec,
    out_dir: Path,
    *,
    arm: str,
    gpus: int,
    mlflow: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train and write the checkpoint and its record to ``out_dir``; return the record.

    ``arm`` names the training in its progress lines; ``mlflow`` holds ``tracking_uri`` and ``run_id`` for
    live metrics.

    Raises:
        dagster.Failure: the training failed; its last lines are in the message.
    """
    for warning in warnings(spec):
        context.log.warning(warning)
    log = Path(spec.log_dir) / "worker.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for line in set_aside_damaged(spec):
        context.log.warning(line)
    run = Path(spec.log_dir) / "training_run.json"
    write_text_at_once(run, to_json(spec))
    extras = {"out_dir": str(out_dir), "log": str(log), "arm": arm, "mlflow": dict(mlflow or {})}
    env = {SPEC_VARIABLE: str(run), PARENT_VARIABLE: str(os.getpid())}
    argv = command(spec, gpus, "assets.training.worker")  # refuses what cannot be run
    try:
        if gpus == 1:
            _train_in_one_process(context, extras, env)
        else:
            pipes.run(context=LogsOnly(context), command=argv, extras=extras, env=env)  # type: ignore[arg-type]
    except Exception as error:
        raise dg.Failure(f"training failed ({error}); {_last_words(log)}") from error
    return json.loads((out_dir / RECORD).read_text())


def _last_words(log: Path) -> str:
    """What a training says at its end: its one line where input was refused, else the end of its output."""
    text = log.read_text(errors="replace") if log.exists() else "no output"
    last = text.rstrip().rpartition("\n")[2]
    refused = f"{InputError.__module__}.{InputError.__name__}: "
    if refused in last:
        return f"{last.partition(refused)[2]} (all output: {log})"
    return f"the end of {log}:\n{text[-LOG_TAIL:]}"


def _train_in_one_process(
    context: dg.AssetExecutionContext, extras: dict[str, Any], env: Mapping[str, str]
) -> None:
    """Run a training that needs no torchrun in a process that the train server forks."""
    injector, reader = dg.PipesEnvContextInjector(), dg.PipesTempFileMessageReader()
    with dg.open_pipes_session(LogsOnly(context), injector, reader, extras=extras) as session:  # type: ignore[arg-type]
        code = SERVER.train({**os.environ, **session.get_bootstrap_env_vars(), **env})
    if code:
        raise RuntimeError(f"its process ended with code {code}")
