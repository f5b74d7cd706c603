"""Asset: what every subset looks like beside its pool, random subsets and the other methods' subsets."""

from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from assets.display.asset_checks import check_specs
from assets.display.preview import COLUMN_SCHEMA, ROW_COUNT, columns, image, markdown
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.labelled_pool import LabelledPool
from assets.steps.materialize import Events, Metadata, materialize_partitions
from assets.steps.proxy_encoders import proxy_encoder
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import objective_weights, recipes, subset_key
from clipcov_pipeline.experiment.stages import CODE_VERSIONS, OVERLAP
from clipcov_pipeline.subsets import plots
from clipcov_pipeline.subsets.diagnosis import add_cost, diagnose
from clipcov_pipeline.subsets.overlap import overlap

TABLE, OVERLAPS = "table.parquet", "overlap.parquet"
PLOTS = ("covariance", "classes", "similarities", "terms", "map")


@dg.asset(
    partitions_def=partitions_of("subset_diagnostics"),
    deps=[every_key("subsets"), "pseudo_labels", "proxy_model", "pool_map", every_key("embeddings")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="selection",
    kinds={"polars", "matplotlib"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["subset_diagnostics"],
    check_specs=check_specs("subset_diagnostics"),
)
def subset_diagnostics(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """Cross-covariance, classes, similarities, loss, objective, duplicates and overlap of every subset."""
    pool = LabelledPool()

    def build(task: Task) -> None:
        key, _, part = task.partition.partition("@")
        if part == OVERLAP:
            _compare(task, key)
        else:
            _diagnose(task, key, pool)

    yield from materialize_partitions(context, experiment, build, show=show)


def _diagnose(task: Task, key: str, labelled: LabelledPool) -> None:
    pool, members = labelled.of(task)
    settings, folder = task.config.diagnostics, task.entry.folder
    method = next(recipe.method for recipe in recipes(task.config) if recipe.subset == key)
    places = members.select("uid").with_row_index("row")
    subset = pl.read_parquet(task.path("subsets", key, "subset.parquet")).sort("rank")
    rows = subset.join(places, on="uid", how="left", maintain_order="left")["row"].to_numpy()
    scale = proxy_encoder(task).model.logit_scale.detach().exp()  # type: ignore[operator, union-attr]
    found = diagnose(
        pool,
        rows.astype(np.int64),
        draws=settings.random_draws,
        seed=settings.seed,
        logit_scale=float(scale),
        weights=objective_weights(task.config, method),
        threads=task.config.select.threads,
    )
    ranking = task.record("rankings", method)
    table = add_cost(found.table, ranking.seconds, ranking.stats.get("cpu_seconds"))
    table.write_parquet(folder / TABLE)
    plots.plot_all(found, folder)
    layout = task.record("pool_map")
    frame = pl.read_parquet(task.path("pool_map", file="map.parquet"))
    chosen = np.isin(frame["row"].to_numpy(), rows)
    plots.plot_map(frame, folder / "map.png", chosen, why=layout.stats["undefined"])
    task.done({"table": digest_of_file(folder / TABLE)}, **found.stats)


def _compare(task: Task, key: str) -> None:
    """Hold the subset against those of the other methods at the same fraction."""
    own = next(recipe for recipe in recipes(task.config) if recipe.subset == key)
    methods, folder = list(task.config.select.methods), task.entry.folder
    files = {m: task.path("subsets", subset_key(m, own.fraction), "subset.parquet") for m in methods}
    uids = {method: pl.read_parquet(path, columns=["uid"])["uid"] for method, path in files.items()}
    table, by_chance = overlap(uids, task.record("pseudo_labels").stats["pool"])
    table.write_parquet(folder / OVERLAPS)
    plots.plot_overlap(table, methods, own.method, by_chance, folder / "overlap.png")
    jaccard = dict(table.filter(method=own.method).select("other", "jaccard").iter_rows())
    task.done({OVERLAP: digest_of_file(folder / OVERLAPS)}, jaccard=jaccard, jaccard_by_chance=by_chance)


def show(folder: Path) -> Metadata:
    """Return the plots and the overall numbers of a part."""
    if (folder / OVERLAPS).exists():
        return {"matrix": image(folder / "overlap.png")}
    table = pl.read_parquet(folder / TABLE)
    overall = table.filter(scope="overall").drop("scope", "latent_class", "samples")
    shown: dict[str, Any] = {name: image(folder / f"{name}.png") for name in PLOTS}
    return {
        **shown,
        "overall": dg.MetadataValue.md(markdown(overall, width=200)),
        COLUMN_SCHEMA: columns(table.schema.items()),
        ROW_COUNT: table.height,
    }
