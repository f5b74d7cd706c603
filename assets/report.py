"""Asset: all that is known of the experiment on one self-contained page."""

from pathlib import Path

import dagster as dg

from assets.mlflow_runs.tracking import Tracking
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Project, Task
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.report.page import REPORT, write_report


@dg.asset(
    deps=[
        "leaderboard",
        every_key("checkpoints"),
        every_key("subset_diagnostics"),
        every_key("subset_galleries"),
        every_key("checkpoint_galleries"),
    ],
    group_name="training",
    kinds={"html"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["report"],
)
def report(context: dg.AssetExecutionContext, experiment: Experiment) -> dg.MaterializeResult:
    """Leaderboard, checks, learning curves, diagnostics, galleries and lineage: one HTML file, no network."""

    def build(task: Task) -> None:
        path = task.entry.folder / REPORT
        write_report(task.project, task.plan, path)
        tracking = Tracking(task.config)
        run_id = tracking.parent()
        tracking.log_artifact(run_id, path)
        task.done({"report": digest_of_file(path)}, bytes=path.stat().st_size, mlflow_run_id=run_id)

    return materialize_whole(context, experiment, build, show=show, restore=restore)


def restore(project: Project, record: Record) -> None:
    """Let MLflow show an earlier report that stands again."""
    tracking = Tracking(project.config)
    tracking.log_artifact(tracking.parent(), project.store.checked(record, REPORT))


def show(folder: Path) -> Metadata:
    """Return where the page is; MLflow shows it among the artifacts of the experiment's run."""
    return {"report": dg.MetadataValue.path(str(folder / REPORT))}
