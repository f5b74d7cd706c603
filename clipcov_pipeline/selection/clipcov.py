"""ClipCov as a ranking: greedy inside each latent class, merged into one order for every budget.

F is separable by class, so inside a class the order is the class's own greedy order. Classes are merged by
shares of the budget, or (``class_balance="global"``) by gain, which is the greedy order of F: on the running
minimum of the gains inside a class; ties go to the lower class, then to the order inside it. Then a budget
needs only the part of each class whose gains reach the merge's last one: the classes are carried on to a
falling threshold until enough are taken.
"""

from typing import Any

import numpy as np

from clipcov_pipeline.selection.merge import counts_by_shares, merge_by_gain, order_by_shares
from clipcov_pipeline.selection.methods import BALANCE_POWER
from clipcov_pipeline.selection.objective import Bounds, Scores, redundancy_sizes, scores
from clipcov_pipeline.selection.parallel import over_classes
from clipcov_pipeline.selection.pool import Pool

# two products of unit vectors add up to -2 at least (a little less for rounded norms)
LEAST_SIMILARITY = -2.1
# how many scores are looked at to find a threshold
_SAMPLE = 200_000


class ClassGreedy:
    """The greedy orders of all classes, resumable: ``advance`` carries every class on to a lower threshold.

    Attributes:
        taken: int64 [K], how many each class has taken; rows: int32 [N], place in the class in the order
        taken; gains: float64 [N]; both from ``pool.starts[k]`` on for class k.
        evaluated: gain evaluations so far.
    """

    def __init__(
        self, pool: Pool, base: np.ndarray, scale: np.ndarray, bounds: Bounds, clip_negative: bool,
        threads: int | None,
    ) -> None:  # fmt: skip
        n, k = len(pool), pool.n_classes
        self.pool, self.base, self.scale, self.known = pool, base, scale, bounds
        self.clip, self.threads = clip_negative, threads
        self.fallen = np.zeros(k)
        self.seen = np.empty(n, np.int32)
        self.total = np.empty(n)
        self.chosen = np.zeros((k, pool.pairs.shape[1]))
        self.key, self.row = np.empty(n), np.empty(n, np.int32)
        self.size, self.taken = np.full(k, -1), np.zeros(k, np.int64)
        self.rows, self.gains = np.empty(n, np.int32), np.empty(n)
        self.evaluated = 0

    def advance(self, floor: float | np.ndarray, most: np.ndarray) -> None:
        """Take from every class while its best gain is at least ``floor`` and it has fewer than ``most``."""
        from clipcov_pipeline.selection import greedy as selection_greedy
        from clipcov_pipeline.selection import kernels

        pairs, starts = kernels.bits(self.pool.pairs), self.pool.starts
        floor = np.broadcast_to(np.asarray(floor, np.float64), self.taken.shape).copy()

        def work(classes: np.ndarray) -> int:
            return selection_greedy.greedy_classes(
                pairs, starts, classes, self.base, self.scale, self.known.lower, self.known.apart,
                self.known.farthest, self.known.centres, self.fallen, self.clip, self.seen, self.total,
                self.chosen, self.key, self.row, self.size, self.taken, floor, most, self.rows, self.gains,
            )  # fmt: skip

        self.evaluated += sum(over_classes(work, self.pool.class_sizes, self.threads))

    def bounds(self, step: int) -> np.ndarray:
        """Upper bounds on the gains of what is not taken, of every ``step``-th heap entry."""
        starts, fallen = self.pool.starts[:-1], self.scale * self.fallen
        left = zip(starts, self.size, fallen, strict=True)
        parts = [self.key[start : start + size : step] - fall for start, size, fall in left if size > 0]
        return np.concatenate(parts) if parts else np.empty(0)


def rank_clipcov(
    pool: Pool, count: int, params: dict[str, Any], threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pool rows (int64) in the order taken, and gains (float64); ``params`` as ``validate_method`` fills
    them."""
    weights, clip = params["weights"], params["clip_negative"]
    sizes = pool.class_sizes
    start = scores(pool, weights, clip, threads, repeat_penalty=params["repeat_penalty"])
    scale = weights["redundancy"] / redundancy_sizes(pool, params["redundancy"], count)
    floor, power = params["class_floor"], BALANCE_POWER.get(params["class_balance"])
    most = np.minimum(sizes, count) if power is None else counts_by_shares(sizes, count, floor, power)
    if params["mode"] == "notebook":
        rows, gains = _batches(pool, start, scale, weights, clip, params["batch_size"], most, threads)
        taken = most
    else:
        # what the class's geometry says at least, or (strict) nothing but that embeddings are of unit norm
        known = start.bounds if params["mode"] == "greedy" else Bounds.flat(pool, LEAST_SIMILARITY)
        greedy = ClassGreedy(pool, start.base, scale, known, clip, threads)
        if power is not None or count == len(pool):
            greedy.advance(-np.inf, most)
        else:
            _advance_to(greedy, count, most)
        taken, rows, gains = greedy.taken, greedy.rows, greedy.gains
    inside = np.concatenate([np.arange(s, s + t) for s, t in zip(pool.starts[:-1], taken, strict=True)])
    gains = gains[inside]
    classes = np.repeat(np.arange(len(taken)), taken)
    if power is None:
        order = merge_by_gain(gains, classes)[:count]
    else:
        order = order_by_shares(classes, sizes, floor, power)[:count]
    rows = pool.order[pool.starts[classes[order]] + rows[inside[order]]]
    return rows, gains[order]


def _advance_to(greedy: ClassGreedy, count: int, most: np.ndarray) -> None:
    """Lower the threshold until ``count`` are taken in all, and little more."""
    step = max(1, len(greedy.base) // _SAMPLE)
    bounds, taken, share = greedy.base[::step], 0, 1.0
    while (missing := count - taken) > 0:
        # no gain below the missing-th bound is among the first `count`, but that alone creeps up on it:
        # only a share of the bounds above a threshold turn out to be gains above it, so reach further
        reach = missing / share + 2
        greedy.advance(_largest(bounds, reach / step), most)
        before, taken = taken, int(greedy.taken.sum())
        share = min(1.0, max((taken - before) / reach, 0.05))
        bounds = greedy.bounds(step)


def _largest(values: np.ndarray, place: float) -> float:
    """The value at a place from the top; -inf beyond the last."""
    at = int(place) + 1
    return float(np.partition(values, len(values) - at)[len(values) - at]) if at < len(values) else -np.inf


def _batches(
    pool: Pool, start: Scores, scale: np.ndarray, weights: dict[str, float], clip: bool, batch: int,
    most: np.ndarray, threads: int | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    from clipcov_pipeline.selection import kernels, notebook

    pairs, starts = kernels.bits(pool.pairs), pool.starts
    lasting = weights["class"] * start.class_term
    passing = weights["label"] * pool.label_similarity[pool.order].astype(np.float64)
    rows, gains = np.empty(len(pool), np.int32), np.empty(len(pool))

    def work(classes: np.ndarray) -> None:
        notebook.batch_classes(
            pairs, starts, classes, start.base, lasting, passing, scale, clip, batch, most, rows, gains
        )  # fmt: skip

    over_classes(work, pool.class_sizes, threads)
    return rows, gains
