"""A subset as an index over the original shards: what was chosen, with which weight, and where it lies.

Nothing is copied to train on it: the training reads each sample at its place in the pool's own tars.
"""

from collections.abc import Iterable
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.places import CHOICES_SCHEMA, PLACES_SCHEMA

# whole-numbered weights up to this are taken at their word: that many draws of a sample in each pass
MOST_REPEATS = 100
CHOSEN = {
    "uid": pl.String,
    "rank": pl.Int64,
    "gain": pl.Float64,
    "latent_class": pl.Int32,
    "weight": pl.Float64,
}
INDEX_SCHEMA = {**CHOSEN, "shard": pl.String, **{k: v for k, v in PLACES_SCHEMA.items() if k != "uid"}}


def subset_index(chosen: pl.DataFrame, members: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    """Return the chosen samples with their places, columns as `INDEX_SCHEMA`, in the order of their ranks.

    Where a training draws one of several captions, there is also ``caption_hashes``; where the pool's samples
    have ids of another kind, the last column is ``source_id``.

    Args:
        chosen: uid, rank, gain, latent_class and, where samples are drawn unequally, weight (1 otherwise).
        members: the pool's uid, shard and, where there is one, source_id: of samples of one uid in two
            shards, the one that was labelled.
        places: shard and the columns of `places_schema`.

    Raises:
        InputError: a chosen sample has no place (its shard is gone), or a member that lies in pieces; a
            weight that is negative or not finite, or no weight above 0.
        ValueError: a uid or a rank is given twice.
    """
    for column in ("uid", "rank"):
        if twice := chosen.height - chosen[column].n_unique():
            raise ValueError(f"subset: {twice} values of {column} come twice")
    weight = pl.col("weight") if "weight" in chosen.columns else pl.lit(1.0)
    rows = chosen.with_columns(weight=weight.cast(pl.Float64))
    check_weights(rows["weight"].to_numpy(), "subset")
    known = [name for name in ("uid", "shard", "source_id") if name in members.columns]
    rows = rows.join(members.select(known), on="uid", how="left", maintain_order="left")
    rows = rows.join(places, on=("shard", "uid"), how="left", maintain_order="left")
    lost = rows.filter(pl.any_horizontal(pl.col("image_offset", "caption_offset").is_null()))
    if lost.height:
        uid, shard = lost.select("uid", "shard").row(0)
        raise InputError(
            f"subset: found no place of {lost.height} chosen samples, first uid {uid} of shard {shard!r},"
            " expected one each: the shard is gone; run the pipeline again"
        )
    return rows.select(*_columns(rows), *(["source_id"] if "source_id" in known else [])).sort("rank")


def whole_index(places: pl.DataFrame) -> pl.DataFrame:
    """Return all samples as an index, in their order and without classes; ``places`` as `subset_index`."""
    rows = places.unique("uid", keep="first", maintain_order=True).with_row_index("rank", offset=1)
    rows = rows.with_columns(gain=None, latent_class=-1, weight=1.0)
    return rows.select(_columns(rows))


def _columns(rows: pl.DataFrame) -> list[pl.Expr]:
    """Those of `INDEX_SCHEMA`, and the captions to draw from where there are several."""
    choices = {name: dtype for name, dtype in CHOICES_SCHEMA.items() if name in rows.columns}
    return [pl.col(name).cast(dtype) for name, dtype in (INDEX_SCHEMA | choices).items()]


def check_weights(weight: np.ndarray, where: str) -> None:
    """Look whether samples can be drawn by these weights, float [n]; ``where`` begins the line.

    Raises:
        InputError: a weight that is negative, NaN (or missing) or infinite, or none above 0.
    """
    bad = ~np.isfinite(weight) | (weight < 0)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{where}: found the weight {weight[row]:g} in row {row} ({int(bad.sum())} such rows), expected"
            " finite numbers of at least 0"
        )
    if not weight.any():
        raise InputError(f"{where}: found {len(weight)} weights of 0, expected at least one above")


def whole_draws(weight: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """Return weights as numbers of draws in a pass, int64 [n]; None where they are no small whole numbers."""
    if weight.max() >= 2**53 or (weight != np.floor(weight)).any():
        return None
    counts = weight.astype(np.int64)
    counts //= np.gcd.reduce(counts)
    return counts if counts.max() <= MOST_REPEATS else None


def times_listed(index: pl.DataFrame) -> npt.NDArray[np.int64] | None:
    """Return how often DataComp's list names each sample, int64 [n]; None: once each, as where weights are no
    small whole numbers."""
    weight = index["weight"].to_numpy()
    return whole_draws(weight) if np.ptp(weight) else None


def draws_of_pass(weight: npt.NDArray[np.float64]) -> int:
    """Return the draws of a pass over samples of these weights, float [n], as `training.draws` makes it."""
    counts = whole_draws(weight)
    return int(counts.sum()) if counts is not None else int(np.count_nonzero(weight))


def most_alike(index: pl.DataFrame) -> int:
    """Return how many draws of a pass have one image or caption in common, at most.

    The batches of a pass have to be as many, or one of them holds a pair twice.
    """
    weight = index["weight"].to_numpy()
    draws = whole_draws(weight)
    if draws is None:
        draws = np.ceil(weight * (np.count_nonzero(weight) / weight.sum())).astype(np.int64)
    counted = index.select("image_hash", "caption_hash").with_columns(draws=pl.Series(draws))
    sums = (counted.group_by(name).agg(pl.sum("draws"))["draws"] for name in ("image_hash", "caption_hash"))
    return max(int(each.to_numpy().max(initial=0)) for each in sums)


def chosen_digest(index: pl.DataFrame) -> str:
    """Return what a subset is, whatever its samples hold and wherever they lie.

    A sha256 in hex over the columns of `CHOSEN`, in the order of the ranks.
    """
    return sha256(index.select(list(CHOSEN)).write_csv(include_header=False).encode()).hexdigest()


def samples_digest(index: pl.DataFrame) -> str:
    """Return what a training on these samples depends on: their pairs and weights, wherever they lie.

    A sha256 in hex over uid, image, caption and weight, in the order of the uids.
    """
    rows = index.sort("uid").select("uid", "image_hash", "caption_hash", "weight")
    return sha256(rows.write_csv(include_header=False).encode()).hexdigest()


def training_rows(index: pl.DataFrame, shards: Iterable[Shard]) -> pl.DataFrame:
    """Return what a training reads, in the order of the uids: `INDEX_SCHEMA` without ranks and gains.

    ``shard`` is the shard's path or URL of now, ``shard_version`` its change token.

    Raises:
        InputError: a shard is no longer in the pool.
    """
    found = pl.DataFrame(
        [(shard.name, shard.url, shard.version) for shard in shards],
        schema={"shard": pl.String, "url": pl.String, "shard_version": pl.String},
        orient="row",
    )
    rows = index.sort("uid").join(found, on="shard", how="left", maintain_order="left")
    if (gone := rows.filter(pl.col("url").is_null())).height:
        raise InputError(
            f"subset: found shard {gone['shard'][0]!r} of {gone.height} samples gone from the pool, expected"
            " it where the subset was chosen; run the pipeline again"
        )
    return rows.drop("rank", "gain", "shard", "key", "source_id", strict=False).rename({"url": "shard"})
