"""Asset: the table and plot that compare methods, fractions and seeds."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.materialize import Metadata, materialize_whole
from assets.partitions import every_key
from assets.preview import COLUMN_SCHEMA, ROW_COUNT, columns, image
from assets.resources import Experiment
from clipcov_pipeline import report
from clipcov_pipeline.plan import CODE_VERSIONS, evaluation_sets, method_names, recipes
from clipcov_pipeline.project import Task
from clipcov_pipeline.store import digest_of_file


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
        primary = task.config.evaluate.primary_metric
        scores = report.collect_scores(
            (arm, name, task.path("scores", f"{arm.key}@{name}", "scores.json"))
            for arm in arms
            for name in evaluation_sets(task.config)
        )
        board = report.leaderboard(scores, method_names(task.config))
        sizes = report.subset_sizes(task.plan)
        scores.write_parquet(folder / "scores.parquet")
        board.write_parquet(folder / "leaderboard.parquet")
        board.write_csv(folder / "leaderboard.csv")
        (folder / "leaderboard.txt").write_text(report.as_text(board, primary, sizes))
        table = report.to_markdown(*report.to_rows(board, primary, sizes))
        (folder / "leaderboard.md").write_text(table + "\n")
        report.plot(board, primary, folder / "leaderboard.png")
        task.done(
            {"scores": digest_of_file(folder / "scores.parquet")}, arms=len(arms), primary_metric=primary
        )

    return materialize_whole(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the table and the plot as Dagster shows them."""
    board = pl.read_parquet(folder / "leaderboard.parquet")
    return {
        COLUMN_SCHEMA: columns(board.schema.items()),
        ROW_COUNT: board.height,
        "table": dg.MetadataValue.md((folder / "leaderboard.md").read_text()),
        "plot": image(folder / "leaderboard.png"),
    }
