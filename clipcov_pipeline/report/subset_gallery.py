"""Which samples the gallery of a subset shows: by gain, by redundancy, by class, chosen against rejected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.pool.spread import evenly
from clipcov_pipeline.proxy.prompts import name_of
from clipcov_pipeline.report.gallery import ROW, Gallery, Group, Row, Section, Tile
from clipcov_pipeline.selection import Pool

PAIRS = 8  # rejected samples that are shown beside what makes them redundant

CLASSES = 8  # classes that samples are shown of

MOST_OF_A_CLASS = 4096  # rejected and chosen samples of a class that are compared with each other


@dataclass(frozen=True)
class _Split:
    """The pool cut in two.

    pool: uid, shard, key, latent_class, rank and gain (null for what the method does not rank), chosen;
    one row a sample, in the pool's order, with its number as ``row``.
    """

    pool: pl.DataFrame
    names: Sequence[str] | None

    @cached_property
    def chosen(self) -> pl.DataFrame:
        return self.pool.filter("chosen").sort("rank")

    @cached_property
    def rejected(self) -> pl.DataFrame:
        return self.pool.filter(~pl.col("chosen")).sort("rank", nulls_last=True)

    def class_name(self, number: int) -> str:
        """The class by its name, where classes were made of prompts."""
        name = name_of(self.names, number)
        return f"class {number}" if name is None else f"class {number} ({name})"


def subset_gallery(
    title: str,
    ranking: pl.DataFrame,
    count: int,
    labels: pl.DataFrame,
    pool: Pool,
    class_names: Sequence[str] | None = None,
) -> Gallery:
    """Choose what to show of a subset; captions and pictures are added later (see `gallery`).

    Args:
        title: the subset's name.
        ranking: uid, gain, in the order of the method; the subset is its first ``count`` rows.
        labels: uid, shard, key, latent_class, one row a sample of the pool.
        pool: their embeddings, in the same order.
        class_names: names of the latent classes, where they have any.
    """
    ranked = ranking.select("uid", "gain").with_row_index("rank", offset=1)
    frame = (
        labels.select("uid", "shard", "key", "latent_class")
        .with_row_index("row")
        .join(ranked, on="uid", how="left", maintain_order="left")
        .with_columns(chosen=(pl.col("rank") <= count).fill_null(False))
    )
    split = _Split(frame, class_names)
    sections = (_by_gain(split), _redundant(split, pool), _of_classes(split), _against(split))
    return Gallery(title, sections)


def _tiles(frame: pl.DataFrame, note: str = "rank") -> tuple[Tile, ...]:
    return tuple(_tile(row, note) for row in frame.iter_rows(named=True))


def _tile(row: Mapping[str, Any], note: str = "rank") -> Tile:
    rank = f"rank {row['rank']:,}" if row["rank"] is not None else "not ranked"
    gain = f"gain {row['gain']:.3g}" if row["gain"] is not None else "no gain"
    return Tile(row["uid"], row["shard"], row["key"], "", f"{gain}, {rank}" if note == "gain" else rank)


def _by_gain(split: _Split) -> Section:
    chosen = split.chosen.filter(pl.col("gain").is_not_null()).sort("gain", "rank", descending=[True, False])
    missed = split.rejected.head(ROW)
    none = "" if chosen.height else "not defined, because the method gives no gains"
    everything = "" if missed.height else "nothing: the subset is the whole pool"
    return Section(
        "Highest and lowest gain",
        "The gain is what the sample added to the method's objective when it was taken. The lowest should not"
        " look worse than what just missed the cut.",
        (
            Row("Highest gain", (Group("", _tiles(chosen.head(ROW), "gain")),), none),
            Row("Lowest gain", (Group("", _tiles(chosen.tail(ROW), "gain")),), none),
            Row("First left out", (Group("", _tiles(missed, "gain")),), everything),
        ),
    )


def _redundant(split: _Split, pool: Pool) -> Section:
    """Show the rejected samples that a chosen one of their class is most similar to, one a class."""
    found = redundant_pairs(pool, split.pool["chosen"].to_numpy())[:PAIRS]
    groups = []
    for similarity, rejected, chosen in found:
        pair = [split.pool.row(row, named=True) for row in (rejected, chosen)]
        tiles = tuple(
            replace(_tile(row), note=f"{verb}, {_tile(row).note}")
            for verb, row in zip(("rejected", "chosen"), pair, strict=True)
        )
        groups.append(Group(f"{split.class_name(pair[0]['latent_class'])}, s = {similarity:.3f}", tiles))
    rows = [Row("", tuple(groups[at : at + PAIRS // 2])) for at in range(0, len(groups), PAIRS // 2)]
    if not rows:
        rows = [Row("None", (), "not defined, because no class has both chosen and rejected samples")]
    return Section(
        "Most redundant of the rejected",
        "Each rejected sample stands beside the chosen one of its class that is most similar to it:"
        " s = <image, other caption> + <caption, other image>, at most 2; the highest of each class. They"
        " should say the same thing.",
        tuple(rows),
    )


def redundant_pairs(pool: Pool, chosen: np.ndarray) -> list[tuple[float, int, int]]:
    """Return the most similar (rejected, chosen) pair of every class that has both, most similar first.

    Args:
        pool: N pairs with their classes.
        chosen: bool [N], in the pool's order.

    Returns:
        (s_ij, row of the rejected, row of the chosen). Of a class with more than ``MOST_OF_A_CLASS``
        chosen or rejected samples so many are compared, evenly spread.
    """
    found: list[tuple[float, int, int]] = []
    for number in range(pool.n_classes):
        rows = pool.order[pool.starts[number] : pool.starts[number + 1]]
        inside, outside = _spread(rows[chosen[rows]]), _spread(rows[~chosen[rows]])
        if len(inside) == 0 or len(outside) == 0:
            continue
        images, captions = pool.sides(inside)
        swapped = np.concatenate([captions, images], axis=1).astype(np.float32)
        own = np.concatenate(pool.sides(outside), axis=1).astype(np.float32)
        similarity = own @ swapped.T
        best = int(similarity.argmax())
        i, j = divmod(best, len(inside))
        found.append((float(similarity[i, j]), int(outside[i]), int(inside[j])))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


def _spread(rows: np.ndarray) -> np.ndarray:
    return rows[evenly(len(rows), MOST_OF_A_CLASS)]


def _sizes(split: _Split) -> pl.DataFrame:
    """Return latent_class, size and chosen of every class, the largest first."""
    sizes = split.pool.group_by("latent_class").agg(size=pl.len(), chosen=pl.col("chosen").sum())
    return sizes.sort("size", "latent_class", descending=[True, False])


def _of_classes(split: _Split) -> Section:
    sizes = _sizes(split)
    rows = []
    for number, size, chosen in sizes[evenly(sizes.height, CLASSES)].iter_rows():
        members = split.chosen.filter(pl.col("latent_class") == number)
        heading = f"{split.class_name(number)}: {chosen:,} of {size:,} chosen"
        note = "" if chosen else "none of it is chosen"
        rows.append(Row(heading, (Group("", _tiles(members[evenly(members.height, ROW)])),), note))
    return Section(
        "Chosen samples by class",
        f"{len(rows)} of {sizes.height:,} latent classes, from the largest to the smallest. A row should show"
        " one thing in many ways; a class of unlike things says that the proxy or the classes are poor.",
        tuple(rows),
    )


def _against(split: _Split) -> Section:
    both = _sizes(split).filter((pl.col("chosen") > 0) & (pl.col("chosen") < pl.col("size")))
    rows = []
    for number in dict.fromkeys(both[at, "latent_class"] for at in (0, both.height // 2) if both.height):
        of_class = pl.col("latent_class") == number
        for verb, frame in (("chosen", split.chosen), ("rejected", split.rejected)):
            members = frame.filter(of_class)
            tiles = _tiles(members[evenly(members.height, ROW)])
            rows.append(Row(f"{split.class_name(number)}: {members.height:,} {verb}", (Group("", tiles),)))
    if not rows:
        rows = [Row("None", (), "not defined, because no class has both chosen and rejected samples")]
    return Section(
        "Chosen against rejected",
        "The largest class that was cut, and one of middle size. Chosen ones should be clear and varied;"
        " rejected ones repeats, or pairs whose caption does not fit.",
        tuple(rows),
    )
