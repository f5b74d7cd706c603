"""Cuts a subset from a ranking: the index to train from, and DataComp's `.npy` of its uids."""

from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import written_at_once
from clipcov_pipeline.selection import budget_count
from clipcov_pipeline.subsets.files import write_datacomp_npy
from clipcov_pipeline.subsets.index import chosen_digest, samples_digest, subset_index, times_listed

PARQUET, NPY, TARS = "subset.parquet", "subset.npy", "shards"


class Choice(NamedTuple):
    """What a subset holds: rows of a ranking or of the pool, and, where every pass of a training draws some
    of them anew, how many of each class, by its number."""

    rows: pl.DataFrame
    quota: list[int] | None = None


def whole_pool(labels: pl.DataFrame) -> Choice:
    """Return the pool itself as a subset, in its own order; columns ``uid`` and ``latent_class`` are read."""
    rows = labels.select("uid", "latent_class").with_row_index("rank", offset=1)
    return Choice(rows.with_columns(gain=pl.lit(None, pl.Float64)))


def cut_ranking(ranking: pl.DataFrame, pool: int, fraction: float, draw_from: float | None) -> Choice:
    """Return the ranking's first ``round(fraction * pool)`` samples.

    draw_from: return its first ``round(draw_from * pool)``, and as a quota the classes of the former.

    Raises:
        InputError: fewer samples are ranked.
    """
    count, wanted = budget_count(fraction, pool), budget_count(draw_from or fraction, pool)
    if ranking.height < wanted:
        raise InputError(
            f"found {ranking.height} ranked samples, expected at least {wanted}: the method's filters leave"
            " too few, lower the fraction or loosen them"
        )
    if draw_from is None:
        return Choice(ranking.head(count))
    return Choice(ranking.head(wanted), np.bincount(ranking["latent_class"].head(count)).tolist())


def write_subset(
    folder: Path, choice: Choice, labels: pl.DataFrame, places: Path
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Write a subset's index and its `.npy`, where a sample of a whole weight is listed as often.

    Args:
        folder: for the files.
        choice: its rows as `subset_index`'s ``chosen``.
        labels: as its ``members``.
        places: parquet of its ``places``.

    Returns:
        The index, and the digests by which others tell whether the subset has changed: ``samples`` is what a
        training sees, ``subset`` what was chosen.

    Raises:
        InputError, ValueError: as `subset_index` and `datacomp_uids`.
    """
    chosen = choice.rows
    wanted = pl.scan_parquet(places).join(chosen.lazy().select("uid"), on="uid", how="semi").collect()
    index = subset_index(chosen, labels, wanted)
    with written_at_once(folder / PARQUET) as temporary:
        index.write_parquet(temporary, compression="zstd")
    write_datacomp_npy(folder / NPY, index["uid"].to_list(), times_listed(index))
    digests = {"samples": samples_digest(index), "subset": chosen_digest(index)}
    if choice.quota is not None:
        digests = {name: _with_quota(digest, choice.quota) for name, digest in digests.items()}
    return index, digests


def _with_quota(digest: str, quota: list[int]) -> str:
    return sha256(f"{digest} {quota}".encode()).hexdigest()
