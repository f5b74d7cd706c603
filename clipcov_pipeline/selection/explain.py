"""Why a sample is in or out of a subset."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcov_pipeline.selection.methods import budget_count, validate_method
from clipcov_pipeline.selection.objective import (
    TERMS,
    clipped_class_term,
    directions,
    redundancy_sizes,
    scores,
)
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import Ranking, rank
from clipcov_pipeline.selection.repeats import repeat_term


@dataclass(frozen=True)
class Explanation:
    """One sample against a subset; all ranks count from 1.

    Attributes:
        uid, row: the sample; latent_class, class_size, class_chosen: its class, and how many of it are in.
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
        cut: score of the last sample that is in (of its class, when classes have places in proportion).
        class_balance: "global", or by which shares classes are merged.
        neighbours: nearest samples of its class in the subset: uid, rank, similarity s_ij (at most 2).
    """

    uid: str
    row: int
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
    cut: float
    class_balance: str
    neighbours: list[dict[str, Any]]


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
        pool, budget: as in ``rank``; uid: a uid of the pool, or a row number where it has none.
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
    subset = ranking.rows[:count]
    of_class = int(pool.latent_class[row])
    members = pool.order[pool.starts[of_class] : pool.starts[of_class + 1]]
    weights, clip, penalty = (filled[name] for name in ("weights", "clip_negative", "repeat_penalty"))
    table, names = term_table(pool, of_class, weights, clip), list(TERMS)
    if penalty:
        start, stop = pool.starts[of_class], pool.starts[of_class + 1]
        repeats = repeat_term(pool, scores(pool, weights, clip, threads).base, penalty)[start:stop]
        table, names = np.column_stack([table, repeats]), [*names, "repeats"]
    base = table.sum(axis=1)
    place = int(np.searchsorted(members, row))
    found = np.flatnonzero(ranking.rows == row)
    at = int(found[0]) if len(found) else None
    class_order = np.flatnonzero(pool.latent_class[ranking.rows] == of_class)
    before = ranking.rows[class_order[class_order < (count if at is None else min(at, count))]]
    in_class = class_order[class_order < count]
    chosen = ranking.rows[in_class]
    by_shares = filled["class_balance"] != "global"
    scale = filled["weights"]["redundancy"] / redundancy_sizes(pool, filled["redundancy"], count)[of_class]
    redundancy = float(scale) * float(
        similarities(pool, row, before, filled["clip_negative"]).sum(dtype=np.float64)
    )
    others = chosen[chosen != row]
    near = similarities(pool, row, others, False)
    nearest = np.argsort(-near, kind="stable")[:n_neighbours]
    rank_of = {int(r): i + 1 for i, r in enumerate(subset)}
    uids = pool.names(others[nearest])
    return Explanation(
        uid=uid,
        row=row,
        latent_class=of_class,
        class_size=len(members),
        class_chosen=len(chosen),
        chosen=at is not None and at < count,
        budget=count,
        rank=None if at is None else at + 1,
        rank_in_class=None if at is None else int((class_order <= at).sum()),
        base_rank_in_class=int((base > base[place]).sum()) + 1,
        terms=dict(zip(names, table[place].tolist(), strict=True)),
        base=float(base[place]),
        redundancy=redundancy,
        gain=float(base[place]) - redundancy,
        score=None if at is None else float(ranking.gains[at]),
        cut=float(ranking.gains[in_class if by_shares else np.arange(len(subset))].min(initial=np.inf)),
        class_balance=filled["class_balance"],
        neighbours=[
            {"uid": name, "rank": rank_of[int(r)], "similarity": float(s)}
            for name, r, s in zip(uids, others[nearest], near[nearest], strict=True)
        ],
    )


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
    place = "not ranked"
    if found.rank is not None:
        place = f"rank {found.rank:,} of the whole, {found.rank_in_class:,} of its class"
    terms = "  ".join(f"{name} {value:+.4f}" for name, value in found.terms.items())
    cut = "the last that is in"
    if found.class_balance != "global":
        cut = f"the last of the {found.class_chosen:,} places its class has by its share"
    score = "not ranked" if found.score is None else f"{found.score:.4f}"
    lines = [
        f"{found.uid} is {verdict}: {place} (budget {found.budget:,})",
        f"class {found.latent_class}: {found.class_chosen:,} of {found.class_size:,} are in; "
        f"by base score alone it would be number {found.base_rank_in_class:,} of its class",
        f"base        {found.base:.4f} = {terms}",
        f"redundancy  {found.redundancy:.4f}: similarity to what its class had taken before {turn}",
        f"gain        {found.gain:.4f} = base - redundancy before {turn}",
        f"score       {score} at its turn; {cut} has {found.cut:.4f}",
    ]
    if found.neighbours:
        lines.append("nearest chosen of its class:")
        lines += [
            f"  {n['uid']}  similarity {n['similarity']:.4f}  rank {n['rank']:,}" for n in found.neighbours
        ]
    return "\n".join(lines)
