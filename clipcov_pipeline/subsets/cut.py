"""Cuts a subset from a ranking: the index to train from, and DataComp's `.npy` of its uids."""

from pathlib import Path

import numpy as np
import polars as pl

from clipcov_pipeline.subsets.files import write_datacomp_npy, written_at_once
from clipcov_pipeline.subsets.index import chosen_digest, samples_digest, subset_index, whole_draws

PARQUET, NPY, TARS = "subset.parquet", "subset.npy", "shards"


def whole_pool(labels: pl.DataFrame) -> pl.DataFrame:
    """Return the pool itself as a subset, in its own order; columns ``uid`` and ``latent_class`` are read."""
    return (
        labels.select("uid", "latent_class")
        .with_row_index("rank")
        .with_columns(gain=pl.lit(None, pl.Float64))
    )


def write_subset(
    folder: Path, chosen: pl.DataFrame, labels: pl.DataFrame, places: Path
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Write a subset's index and its `.npy`, where a sample of a whole weight is listed as often.

    Args:
        folder: for the files.
        chosen, labels: as `subset_index`'s ``chosen`` and ``members``.
        places: parquet of its ``places``.

    Returns:
        The index, and the digests by which others tell whether the subset has changed: ``samples`` is what a
        training sees, ``subset`` what was chosen.

    Raises:
        InputError, ValueError: as `subset_index` and `datacomp_uids`.
    """
    wanted = pl.scan_parquet(places).join(chosen.lazy().select("uid"), on="uid", how="semi").collect()
    index = subset_index(chosen, labels, wanted)
    with written_at_once(folder / PARQUET) as temporary:
        index.write_parquet(temporary, compression="zstd")
    weight = index["weight"].to_numpy()
    draws = whole_draws(weight) if np.ptp(weight) else None
    write_datacomp_npy(folder / NPY, index["uid"].to_list(), draws)
    return index, {"samples": samples_digest(index), "subset": chosen_digest(index)}
