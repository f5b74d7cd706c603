"""Why a sample of an experiment is in or out of one of its ClipCov subsets, from the ranking that stands."""

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.recipes import method_names, recipes
from clipcov_pipeline.experiment.stages import RAW_SHARDS
from clipcov_pipeline.experiment.store import require
from clipcov_pipeline.pool.manifest import with_image_hash, with_image_size
from clipcov_pipeline.report.search import Searcher
from clipcov_pipeline.selection import (
    Explanation,
    Pool,
    Ranking,
    columns_read,
    explain,
    reads_captions,
    with_files_at,
)
from clipcov_pipeline.selection.methods import SIZE


def explain_subset(
    project: Project, uid: str, subset: str, *, n_neighbours: int = 5, threads: int | None = None
) -> Explanation:
    """Explain a sample's place in a subset of the experiment, such as ``clipcov-f0.25``.

    Args:
        n_neighbours: how many chosen neighbours to list.

    Raises:
        InputError: no such subset, one that another method chose, a ranking that is not built or is of an
            earlier pool, a uid that is not in the pool.
    """
    methods = {**method_names(project.config), FULL: FULL}
    by_name = {r.subset: r for r in recipes(project.config) if methods[r.method] == "clipcov"}
    if subset not in by_name:
        known = ", ".join(by_name) or "the experiment has none"
        raise InputError(f"explain: found the subset {subset!r}, expected one that ClipCov chose: {known}")
    recipe, store, searcher = by_name[subset], project.store, Searcher.open(project)
    record = require(store.current("rankings", recipe.method), f"rankings/{recipe.method}")
    labels = searcher.labels.digests
    if any(record.inputs[f"pseudo_labels#{name}"] != labels[name] for name in ("pool", "labels")):
        raise InputError(
            f"explain: rankings/{recipe.method} is of an earlier pool, expected this one: run again"
        )
    settings = record.params["select"]["methods"][recipe.method]
    if settings["method"] != "clipcov":
        raise InputError(
            f"explain: rankings/{recipe.method} is of the method {settings['method']}, expected clipcov, as"
            " the YAML has it now: run again"
        )
    given = {name: value for name, value in settings.items() if name != "method"}
    params = with_files_at("clipcov", given, project.config.resolve)
    members = _members(searcher, columns_read("clipcov", params))
    ranked = pl.read_parquet(store.checked(record, "ranking.parquet"))
    rows = ranked.join(members.select("uid").with_row_index("row"), on="uid", maintain_order="left")["row"]
    ranking = Ranking(rows.to_numpy().astype(np.int64), ranked["gain"].to_numpy())
    with Pool.from_lance(
        searcher.table(),
        members,
        captions=reads_captions("clipcov", params),
        scratch_dir=project.scratch,
    ) as pool:
        return explain(
            pool, uid, recipe.fraction, params, ranking=ranking, n_neighbours=n_neighbours, threads=threads
        )


def _members(searcher: Searcher, read: set[str]) -> pl.DataFrame:
    """Return the pool's samples, with those of these columns that do not come from the table."""
    store = searcher.project.store
    members = with_image_hash(pl.read_parquet(store.checked(searcher.labels, "labels.parquet")))
    if not SIZE & read:
        return members
    shards = members["shard"].unique(maintain_order=True).to_list()
    records = [require(store.current(RAW_SHARDS, shard), f"{RAW_SHARDS}/{shard}") for shard in shards]
    return with_image_size(members, [store.checked(record, "manifest.parquet") for record in records])
