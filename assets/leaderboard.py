"""Asset: the table and plot that compare methods, fractions and seeds."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.display.preview import COLUMN_SCHEMA, ROW_COUNT, columns, image
from assets.mlflow_runs.registry import register, remove_champion, set_champion, versions_of
from assets.mlflow_runs.tracking import Tracking
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Project, Task
from clipcov_pipeline.experiment.recipes import evaluation_sets, method_names, recipes
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.report import leaderboard as report_leaderboard
from clipcov_pipeline.report import plots, tables


@dg.asset(
    deps=[every_key("scores")],
    group_name="training",
    kinds={"polars", "matplotlib"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["leaderboard"],
)
def leaderboard(context: dg.AssetExecutionContext, experiment: Experiment) -> dg.MaterializeResult:
    """Methods x fractions with every score, the full-pool arm and chance level beside them."""

    def build(task: Task) -> None:
        arms, folder = recipes(task.config), task.entry.folder
        primary, world = task.config.evaluate.primary_metric, task.project.world
        for line in world.warnings():
            context.log.warning(line)
        scores = report_leaderboard.collect_scores(
            (arm, name, task.path("scores", f"{arm.key}@{name}", "scores.json"))
            for arm in arms
            for name in evaluation_sets(task.config, world.absent)
        )
        scores = report_leaderboard.with_suites(scores, task.config.evaluate.suites, world.absent)
        board = report_leaderboard.leaderboard(scores, method_names(task.config))
        _write(task, scores, board)
        best = report_leaderboard.champion(scores, primary)
        tracked = _track(context, task, folder, best)
        task.done(
            {"scores": digest_of_file(folder / "scores.parquet")},
            arms=len(arms),
            primary_metric=primary,
            champion=best,
            **tracked,
        )

    return materialize_whole(context, experiment, build, show=show, restore=restore)


def _write(task: Task, scores: pl.DataFrame, board: pl.DataFrame) -> None:
    """Write the scores, and the leaderboard as tables and as a plot."""
    folder, primary = task.entry.folder, task.config.evaluate.primary_metric
    sizes = report_leaderboard.subset_sizes(task.plan)
    notes = report_leaderboard.score_notes(task.project, scores)
    scores.write_parquet(folder / "scores.parquet")
    board.write_parquet(folder / "leaderboard.parquet")
    board.write_csv(folder / "leaderboard.csv")
    (folder / "leaderboard.txt").write_text(tables.as_text(board, primary, sizes, more=notes))
    table = tables.to_markdown(*tables.to_rows(board, primary, sizes))
    (folder / "leaderboard.md").write_text("\n\n".join([table, *notes]) + "\n")
    plots.plot(board, primary, folder / "leaderboard.png")


def restore(project: Project, record: Record) -> None:
    """Let MLflow show an earlier leaderboard that stands again, and give its champion the alias back."""
    tracking = Tracking(project.config)
    _log(tracking, tracking.parent(), project, project.store.checked(record))
    if record.stats.get("champion_run_id"):
        set_champion(tracking, record.stats["champion_run_id"])


def _log(tracking: Tracking, run_id: str, project: Project, folder: Path) -> None:
    for name in ("leaderboard.csv", "leaderboard.txt", "leaderboard.png"):
        tracking.log_artifact(run_id, folder / name, "leaderboard")
    tracking.log_config(run_id, project)


def _track(context: dg.AssetExecutionContext, task: Task, folder: Path, best: str | None) -> dict[str, Any]:
    """Log the leaderboard to the experiment's run, and name the best arm's model the champion."""
    tracking = Tracking(task.config)
    run_id = tracking.parent()
    _log(tracking, run_id, task.project, folder)
    if best is None:
        return {"mlflow_run_id": run_id}
    record = task.record("checkpoints", best)
    place, digest = task.project.store.folder(record), record.digests["weights"]
    champion_run = record.stats["mlflow_run_id"]
    if tracking.is_there(champion_run):
        tags = {"clipcov.recipe": best}
        register(tracking, champion_run, place, digest, tags)  # one from before there was a registry
    elif not versions_of(tracking, champion_run):
        context.log.warning(f"MLflow run {champion_run} of {best} is gone: no model is the champion")
        remove_champion(tracking)
        return {"mlflow_run_id": run_id}
    version = set_champion(tracking, champion_run)
    return {"mlflow_run_id": run_id, "champion_run_id": champion_run, "champion_version": version}


def show(folder: Path) -> Metadata:
    """Return the table and the plot as Dagster shows them."""
    board = pl.read_parquet(folder / "leaderboard.parquet")
    return {
        COLUMN_SCHEMA: columns(board.schema.items()),
        ROW_COUNT: board.height,
        "table": dg.MetadataValue.md((folder / "leaderboard.md").read_text()),
        "plot": image(folder / "leaderboard.png"),
    }
