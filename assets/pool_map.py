"""Asset: the pool as a map, on which every subset is drawn."""

from pathlib import Path

import dagster as dg

from assets.display.preview import image
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.labelled_pool import LabelledPool
from assets.steps.materialize import Metadata, materialize_whole
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.subsets.plots import plot_map
from clipcov_pipeline.subsets.pool_map import pool_map as lay_out

MAP = "map.parquet"


@dg.asset(
    deps=["pseudo_labels", every_key("embeddings")],
    group_name="selection",
    kinds={"scikitlearn", "matplotlib"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["pool_map"],
)
def pool_map(context: dg.AssetExecutionContext, experiment: Experiment) -> dg.MaterializeResult:
    """t-SNE of a random sample of the pool, image and caption embeddings together."""

    def build(task: Task) -> None:
        pool, members = LabelledPool().of(task)
        settings, folder = task.config.diagnostics, task.entry.folder
        frame, why = lay_out(pool, settings.tsne_samples, settings.seed)
        frame.with_columns(uid=members["uid"].gather(frame["row"])).write_parquet(folder / MAP)
        plot_map(frame, folder / "map.png", why=why)
        task.done({"map": digest_of_file(folder / MAP)}, samples=frame.height, undefined=why)

    return materialize_whole(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the map, coloured by latent class."""
    return {"map": image(folder / "map.png")}
