"""Why a sample is in or out of a subset."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clipcov_pipeline.selection.filter_parameters import filters_anything
from clipcov_pipeline.selection.filters import passing_rows
from clipcov_pipeline.selection.methods import budget_count, validate_method
from clipcov_pipeline.selection.objective import (
    TERMS,
    clipped_class_term,
    directions,
    redundancy_sizes,
    scores,
)
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import Ranking, rank, rows_apart
from clipcov_pipeline.selection.repeats import repeat_term


@dataclass(frozen=True)
class Explanation:
    """One sample against a subset; all ranks count from 1.

    Filters cut the pool in two, those that pass and the rest, which are ranked apart: sizes, terms and the
    cut are those of the sample's own part.

    Attributes:
        uid, row: the sample; source_id: another id that it has; rejected: whether the filters reject it.
        latent_class, class_size, class_chosen: its class, and how many of it are in.
        chosen: whether it is in the subset of ``budget`` samples.
        rank, rank_in_class: its place in the whole ranking and inside its class (None where it is not
            ranked).
        base_rank_in_class: its place inside the class before any redundancy.
        terms: weighted class, self, label and inter terms of its base score (and "repeats", what a
            ``repeat_penalty`` takes); base: their sum.
        redundancy: what similarity to the samples of its class taken before its turn (or before the cut,
            when it is out) takes from base.
        gain: base - redundancy; score: what the ranking recorded at its turn (the same for greedy and
            strict; the notebook's batch rule has its own), None where it is not ranked.
        cut: score of the last sample that is in (of its class, when classes have places by shares; None
            where none is in).
        class_balance: "global", or by which shares classes are merged.
        neighbours: nearest samples of its class in the subset: uid, rank, similarity s_ij (at most 2).
    """

    uid: str
    row: int
    rejected: bool
    latent_class: int
    class_size: int
    class_chosen: int
    chosen: bool
    budget: int
    rank: int | None
    rank_in_class: int | None
    base_rank_in_class: int
    terms: dict[str, float]
    base: float
    redundancy: float
    gain: float
    score: float | None
    cut: float | None
    class_balance: str
    neighbours: list[dict[str, Any]]
    source_id: str | None = None


def explain(
    pool: Pool,
    uid: str,
    budget: float | int,
    params: Mapping[str, Any] | None = None,
    *,
    ranking: Ranking | None = None,
    n_neighbours: int = 5,
    threads: int | None = None,
) -> Explanation:
    """Explain a sample's place in a ClipCov subset.

    Args:
        pool, budget: as in ``rank``; uid: a uid or source id of the pool, or a row number where it has none.
        params: of method "clipcov".
        ranking: ``rank(pool, "clipcov", **params)`` of everything, when the caller has it already.
        n_neighbours: how many chosen neighbours to list.

    Raises:
        InputError: an unknown uid, a bad parameter or budget.
    """
    filled = validate_method("clipcov", params)
    row, count = pool.row_of(uid), budget_count(budget, len(pool))
    if ranking is None:
        # a budget_share ranking belongs to one budget: what is beyond it has no rank
        whole = filled["redundancy"] == "class_size"
        ranking = rank(pool, "clipcov", None if whole else budget, threads=threads, **filled)
    rows, rejected = np.arange(len(pool)), False
    if filters_anything(filled["filters"]):
        passing, _ = passing_rows(pool, filled["filters"])
        rejected = row not in passing
        rows = rows_apart(passing, len(pool)) if rejected else passing
    with nullcontext(pool) if len(rows) == len(pool) else pool.take(rows) as part:
        among = _ranked_among(pool, part, rows, ranking, row, count)
        found = _explain(part, among, filled, n_neighbours, threads)
        for neighbour in found["neighbours"]:
            (neighbour["uid"],) = pool.names(rows[[neighbour["uid"]]])
        source_id = None if pool.source_id is None else pool.source_id[row].decode() or None
        name = pool.names([row])[0]
        return Explanation(uid=name, row=row, rejected=rejected, budget=count, source_id=source_id, **found)


class _Among(NamedTuple):
    """A sample among those that it is ranked with; rows are those of this part of the pool.

    own: its row; order, gains: rows in the order taken, and their gains; places: of these in the whole
    ranking, from 0; n_in: how many of them the budget takes.
    """

    own: int
    order: np.ndarray
    gains: np.ndarray
    places: np.ndarray
    n_in: int


def _ranked_among(pool: Pool, part: Pool, rows: np.ndarray, ranking: Ranking, row: int, count: int) -> _Among:
    """``part`` is the pool's ``rows``, what the sample in ``row`` is ranked among."""
    inside = np.full(len(pool), -1)
    inside[rows] = np.arange(len(part))
    order = inside[ranking.rows]
    places = np.flatnonzero(order >= 0)
    return _Among(int(inside[row]), order[places], ranking.gains[places], places, int((places < count).sum()))


def _class_terms(
    part: Pool, of_class: int, filled: Mapping[str, Any], threads: int | None
) -> tuple[np.ndarray, list[str]]:
    """Weighted terms of the base scores of a class, float64 [n_k, terms], and their names."""
    weights, clip, penalty = (filled[name] for name in ("weights", "clip_negative", "repeat_penalty"))
    table, names = term_table(part, of_class, weights, clip), [str(name) for name in TERMS]
    if penalty:
        start, stop = part.starts[of_class], part.starts[of_class + 1]
        repeats = repeat_term(part, scores(part, weights, clip, threads).base, penalty)[start:stop]
        table, names = np.column_stack([table, repeats]), [*names, "repeats"]
    return table, names


def _explain(
    part: Pool, among: _Among, filled: Mapping[str, Any], n_neighbours: int, threads: int | None
) -> dict[str, Any]:
    """The explanation's fields that follow from the part; neighbours by their rows of it."""
    own, order, gains, places, n_in = among
    of_class = int(part.latent_class[own])
    members = part.order[part.starts[of_class] : part.starts[of_class + 1]]
    weights, clip = filled["weights"], filled["clip_negative"]
    table, names = _class_terms(part, of_class, filled, threads)
    base = table.sum(axis=1)
    place = int(np.searchsorted(members, own))

    found = np.flatnonzero(order == own)
    at = int(found[0]) if len(found) else None
    class_order = np.flatnonzero(part.latent_class[order] == of_class)
    before = order[class_order[class_order < (n_in if at is None else min(at, n_in))]]
    in_class = class_order[class_order < n_in]
    last = gains[:n_in] if filled["class_balance"] == "global" else gains[in_class]
    scale = weights["redundancy"] / redundancy_sizes(part, filled["redundancy"], n_in)[of_class]
    redundancy = float(scale) * float(similarities(part, own, before, clip).sum(dtype=np.float64))
    others = in_class[order[in_class] != own]
    near = similarities(part, own, order[others], False)
    nearest = np.argsort(-near, kind="stable")[:n_neighbours]
    return {
        "latent_class": of_class,
        "class_size": len(members),
        "class_chosen": len(in_class),
        "chosen": at is not None and at < n_in,
        "rank": None if at is None else int(places[at]) + 1,
        "rank_in_class": None if at is None else int((class_order <= at).sum()),
        "base_rank_in_class": int((base > base[place]).sum()) + 1,
        "terms": dict(zip(names, table[place].tolist(), strict=True)),
        "base": float(base[place]),
        "redundancy": redundancy,
        "gain": float(base[place]) - redundancy,
        "score": None if at is None else float(gains[at]),
        "cut": float(last.min()) if len(last) else None,
        "class_balance": filled["class_balance"],
        "neighbours": [
            {"uid": int(order[j]), "rank": int(places[j]) + 1, "similarity": float(s)}
            for j, s in zip(others[nearest], near[nearest], strict=True)
        ],
    }


def term_table(pool: Pool, of_class: int, weights: Mapping[str, float], clip_negative: bool) -> np.ndarray:
    """Weighted terms of the base scores of one class: float64 [n_k, 4], columns as in ``TERMS``."""
    start, stop = pool.starts[of_class], pool.starts[of_class + 1]
    class_direction, inter_direction = directions(pool)
    rows = pool.pairs[start:stop].astype(np.float32)
    if clip_negative:
        class_values = clipped_class_term(pool)[start:stop]
    else:
        class_values = rows @ class_direction[of_class].astype(np.float32)
    return np.stack(
        [
            weights["class"] * class_values,
            weights["self"] * pool.statistics()[1][start:stop],
            weights["label"] * pool.label_similarity[pool.order[start:stop]],
            -weights["inter"] * (rows @ inter_direction[of_class].astype(np.float32)),
        ],
        axis=1,
    ).astype(np.float64)


def similarities(pool: Pool, row: int, others: np.ndarray, clip_negative: bool) -> np.ndarray:
    """s_ij = <v_i,t_j> + <t_i,v_j> of one row to others (products at least 0 if clipped): float32 [m]."""
    d = pool.dim
    own = pool.pairs[pool.position[row]].astype(np.float32)
    rows = pool.pairs[pool.position[others]].astype(np.float32)
    products = np.stack([rows[:, d:] @ own[:d], rows[:, :d] @ own[d:]])
    return (np.maximum(products, 0) if clip_negative else products).sum(axis=0)


def describe(found: Explanation) -> str:
    """An explanation as a few lines of text."""
    verdict, turn = ("in", "its turn") if found.chosen else ("out", "the cut")
    place, among = "not ranked", ""
    if found.rank is not None:
        place = f"rank {found.rank:,} of the whole, {found.rank_in_class:,} of its class"
    if found.rejected:
        place, among = f"the filters reject it; {place}", " that the filters reject"
    terms = "  ".join(f"{name} {value:+.4f}" for name, value in found.terms.items())
    last = "the last that is in"
    if found.class_balance != "global":
        last = f"the last of the {found.class_chosen:,} places its class has by its share"
    cut = (
        f"{last} has {found.cut:.4f}"
        if found.cut is not None
        else "none of those that it is ranked with is in"
    )
    score = "not ranked" if found.score is None else f"{found.score:.4f}"
    name = found.uid if found.source_id is None else f"{found.uid} (source id {found.source_id})"
    lines = [
        f"{name} is {verdict}: {place} (budget {found.budget:,})",
        f"class {found.latent_class}: {found.class_chosen:,} of {found.class_size:,}{among} are in; "
        f"by base score alone it would be number {found.base_rank_in_class:,} of its class",
        f"base        {found.base:.4f} = {terms}",
        f"redundancy  {found.redundancy:.4f}: similarity to what its class had taken before {turn}",
        f"gain        {found.gain:.4f} = base - redundancy before {turn}",
        f"score       {score} at its turn; {cut}",
    ]
    if found.neighbours:
        lines.append("nearest chosen of its class:")
        lines += [
            f"  {n['uid']}  similarity {n['similarity']:.4f}  rank {n['rank']:,}" for n in found.neighbours
        ]
    return "\n".join(lines)
