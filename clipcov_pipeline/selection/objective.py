"""The objective F of ClipCov and its terms.

With unit embeddings v_i, t_i, latent class k of n_k pairs, and s_ij = <v_i,t_j> + <t_i,v_j>:

    class  m_i = (1/n_k) sum_{j in k} s_ij      self   e_i = <v_i,t_i>
    label  l_i = <t_i, class prompt>            inter  c_i = mean_{q != k} <v_i,u_q^t> + <t_i,u_q^v>
    base_i = m_i + 2 e_i + l_i/2 - c_i
    F(S) = sum_k [ sum_{i in S_k} base_i - (1/(2 r_k)) sum_{i != j in S_k} s_ij ]

u_q are the unit centres of the non-empty classes; r_k is n_k, or the class's share of the budget. A
``repeat_penalty`` lowers base_i further (`repeats`). The weights are the authors' (notebook
``clip_core.ipynb``). The sums over a class collapse into one vector a class, so no matrix of pairs is made;
only ``clip_negative`` (max(0, .) of every similarity) goes through pairs, in tiles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcov_pipeline.selection.methods import WEIGHTS, Redundancy, budget_count
from clipcov_pipeline.selection.parallel import over_classes, single_blas
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.repeats import repeat_term

TERMS = ("class", "self", "label", "inter")
_TILE = 2048


def directions(pool: Pool, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that give the class and the inter term.

    Returns:
        (class_direction, inter_direction), float64 [K, 2d]: for a row a_i = [v_i; t_i] of class k,
        m_i = <a_i, class_direction[k]> and c_i = <a_i, inter_direction[k]>. Zero for empty classes, and
        the inter direction is zero when there is one class only.
    """
    sums = pool.statistics(threads)[0]
    sizes = pool.class_sizes
    d = pool.dim
    swapped = np.concatenate([sums[:, d:], sums[:, :d]], axis=1)
    class_direction = swapped / np.maximum(sizes, 1)[:, None]
    halves = swapped.reshape(-1, 2, d)
    norms = np.linalg.norm(halves, axis=2, keepdims=True)
    # a class whose embeddings cancel out has no direction: it counts as a centre of zeros
    centres = (halves / np.where(norms > 0, norms, 1)).reshape(-1, 2 * d)
    others = max(int((sizes > 0).sum()) - 1, 1)
    inter_direction = (centres.sum(axis=0) - centres) / others
    inter_direction[sizes == 0] = 0.0
    return class_direction, inter_direction


def project(pool: Pool, *per_class: np.ndarray, threads: int | None = None) -> np.ndarray:
    """<a_i, direction[k(i)]> for every row and direction ([K, 2d] each): float32 [m, N], N in sorted
    order."""
    from clipcov_pipeline.selection import kernels

    rows, out = kernels.bits(pool.pairs), np.empty((len(per_class), len(pool)), np.float32)
    vectors = np.stack(per_class, axis=1).astype(np.float32)
    over_classes(lambda c: kernels.project(rows, pool.starts, c, vectors, out), pool.class_sizes, threads)
    return out


@dataclass(frozen=True)
class Scores:
    """What greedy starts from; all in sorted order.

    Attributes:
        base: float64 [N], weighted; class_term: float32 or float64 [N], m_i, not weighted.
        apart: float32 [N], how far a row is from the mean of its class, or a little more.
        centres: float32 [K, 2d], the mean swapped row of each class.
    """

    base: np.ndarray
    class_term: np.ndarray
    apart: np.ndarray
    centres: np.ndarray


def scores(
    pool: Pool, weights: Mapping[str, float], clip_negative: bool = False, threads: int | None = None,
    *, repeat_penalty: float = 0.0,
) -> Scores:  # fmt: skip
    """Base scores of the whole pool, in one read of the embeddings."""
    begun, work = scoring(pool, weights, clip_negative, threads)
    over_classes(work, pool.class_sizes, threads)
    if repeat_penalty:
        np.add(begun.base, repeat_term(pool, begun.base, repeat_penalty), out=begun.base)
    return begun


def scoring(
    pool: Pool, weights: Mapping[str, float], clip_negative: bool = False, threads: int | None = None
) -> tuple[Scores, Callable[[np.ndarray], None]]:
    """Scores that are not worked out yet, and the function that does so for some classes (without repeats).

    So whoever ranks class by class finds the rows of a class where the scores have just read them.
    """
    from clipcov_pipeline.selection import kernels

    sums, similarity, largest = pool.statistics(threads)
    class_direction, inter_direction = directions(pool, threads)
    centre = sums / np.maximum(pool.class_sizes, 1)[:, None]
    vectors = np.stack([class_direction, inter_direction, centre], axis=1).astype(np.float32)
    n, clipped = len(pool), clipped_class_term(pool, threads) if clip_negative else np.empty(0)
    mean, apart, base = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n)
    begun = Scores(base, clipped if clip_negative else mean, apart, vectors[:, 0].copy())
    given = np.array([weights[term] for term in TERMS])
    farthest, rows = largest + (centre**2).sum(axis=1), kernels.bits(pool.pairs)

    def work(classes: np.ndarray) -> None:
        kernels.score_classes(
            rows, pool.starts, classes, vectors, similarity, pool.label_similarity, pool.order, clipped,
            given, farthest, mean, apart, base,
        )  # fmt: skip

    return begun, work


def clipped_class_term(pool: Pool, threads: int | None = None) -> np.ndarray:
    """m_i with similarities below 0 counted as 0: float64 [N] in sorted order."""
    sums = clipped_sums(pool, pool.starts, np.arange(len(pool)), threads)
    return sums / np.repeat(pool.class_sizes, pool.class_sizes)


def redundancy_sizes(pool: Pool, redundancy: Redundancy, count: int) -> np.ndarray:
    """r_k, float64 [K]: the class size, or the share of ``count`` that is in proportion to it."""
    sizes = np.maximum(pool.class_sizes, 1).astype(np.float64)
    if redundancy == "class_size":
        return sizes
    return np.maximum(sizes * (count / len(pool)), 1.0)


def clipped_sums(
    pool: Pool, starts: np.ndarray, positions: np.ndarray, threads: int | None = None
) -> np.ndarray:
    """sum_j max(0,<v_i,t_j>) + max(0,<t_i,v_j>) over the rows j of i's class, i itself included.

    Args:
        starts: int64 [K+1], where each class begins in ``positions``.
        positions: int64 [m], sorted positions of the rows to look at, class after class.

    Returns:
        float64 [m]. Worked out in tiles: memory does not grow with the square of a class.
    """
    d = pool.dim
    out = np.zeros(len(positions))

    def one(classes: np.ndarray) -> None:
        for c in classes:
            begin, end = starts[c], starts[c + 1]
            for a in range(begin, end, _TILE):
                left = pool.pairs[positions[a : min(a + _TILE, end)]].astype(np.float32)
                for b in range(begin, end, _TILE):
                    right = pool.pairs[positions[b : min(b + _TILE, end)]].astype(np.float32)
                    for x, y in ((left[:, :d], right[:, d:]), (left[:, d:], right[:, :d])):
                        similarity = x @ y.T
                        np.maximum(similarity, 0, out=similarity)
                        out[a : a + len(left)] += similarity.sum(axis=1, dtype=np.float64)

    with single_blas():
        over_classes(one, np.diff(starts), threads)
    return out


def objective(
    pool: Pool,
    rows: np.ndarray,
    weights: Mapping[str, float] | None = None,
    *,
    clip_negative: bool = False,
    redundancy: Redundancy = "class_size",
    repeat_penalty: float = 0.0,
    threads: int | None = None,
) -> dict[str, float]:
    """The objective value of a subset, and what each term brings to it.

    Args:
        rows: distinct rows of the pool, in any order.
        weights, clip_negative, redundancy, repeat_penalty: as in ``rank``; ``redundancy="budget_share"``
            takes len(rows) as the budget.

    Returns:
        ``{"class", "self", "label", "inter", "redundancy", "F"}``: weighted sums, "inter" and "redundancy"
        with the sign they have in F, and F, the sum; with a ``repeat_penalty`` also "repeats".

    Raises:
        InputError: a ``repeat_penalty``, and the pool has no ``image_hash`` or no ``caption_hash``.
    """
    w: dict[str, Any] = WEIGHTS("weights", weights)
    budget_count(len(rows), len(pool))
    position = np.sort(pool.position[np.asarray(rows, np.int64)])
    similarity = pool.statistics(threads)[1]
    class_direction, inter_direction = directions(pool, threads)
    of_class = pool.latent_class[pool.order[position]]
    starts = np.searchsorted(of_class, np.arange(pool.n_classes + 1))
    chosen = subset_sums(pool, position, starts, threads)
    scale = 1.0 / redundancy_sizes(pool, redundancy, len(rows))
    if clip_negative:
        class_value = clipped_class_term(pool, threads)[position].sum()
        pairs = _clipped_pairs(pool, starts, position, threads)
    else:
        class_value = float((chosen * class_direction).sum())
        own = np.bincount(of_class, similarity[position].astype(np.float64), pool.n_classes)
        pairs = (chosen[:, : pool.dim] * chosen[:, pool.dim :]).sum(axis=1) - own
    terms = {
        "class": w["class"] * float(class_value),
        "self": w["self"] * float(similarity[position].sum(dtype=np.float64)),
        "label": w["label"] * float(pool.label_similarity[rows].sum(dtype=np.float64)),
        "inter": -w["inter"] * float((chosen * inter_direction).sum()),
        "redundancy": -w["redundancy"] * float((pairs * scale).sum()),
    }
    if repeat_penalty:
        base = scores(pool, w, clip_negative, threads).base
        terms["repeats"] = float(repeat_term(pool, base, repeat_penalty)[position].sum())
    return {**terms, "F": sum(terms.values())}


def _clipped_pairs(pool: Pool, starts: np.ndarray, position: np.ndarray, threads: int | None) -> np.ndarray:
    """Sum over i < j of the clipped s_ij of the chosen rows of each class, float64 [K]."""
    # e_i can be negative too: its clipped double is what the diagonal holds
    diagonal = 2.0 * np.maximum(pool.statistics(threads)[1][position], 0)
    sums = clipped_sums(pool, starts, position, threads) - diagonal
    return np.bincount(pool.latent_class[pool.order[position]], sums, pool.n_classes) / 2


def subset_sums(
    pool: Pool, position: np.ndarray, starts: np.ndarray, threads: int | None = None
) -> np.ndarray:
    """Sum of rows [v; t] of a subset by class, float64 [K, 2d]; ``position`` sorted, ``starts`` into it."""
    sums = np.zeros((pool.n_classes, pool.pairs.shape[1]))

    def one(classes: np.ndarray) -> None:
        for c in classes:
            for a in range(starts[c], starts[c + 1], _TILE):
                block = pool.pairs[position[a : min(a + _TILE, starts[c + 1])]]
                sums[c] += block.sum(axis=0, dtype=np.float64)

    over_classes(one, np.diff(starts), threads)
    return sums
