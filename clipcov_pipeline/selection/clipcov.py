"""ClipCov as a ranking: greedy inside each latent class, merged into one order for every budget.

F is separable by class, so inside a class the order is the class's own greedy order. Classes are merged by
shares of the budget or by quotas (equal claims by gain), or (``class_balance="global"``) by gain alone, which
is the greedy order of F: on the running minimum of the gains inside a class; ties go to the lower class, then
to the order inside it. Then a budget needs only the part of each class whose gains reach the merge's last
one: the classes are carried on to a falling threshold until enough are taken.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from clipcov_pipeline.selection.merge import merge_by_gain, most_by_shares, order_by_shares
from clipcov_pipeline.selection.objective import Scores, redundancy_sizes, scores, scoring
from clipcov_pipeline.selection.parallel import over_classes
from clipcov_pipeline.selection.pool import Pool

# two products of unit vectors add up to -2 at least (a little less for rounded norms)
LEAST_SIMILARITY = -2.1
# how many scores are looked at to find a threshold
_SAMPLE = 200_000
# rows a task should have where each class is scored and ranked in one go, its rows still in the cache
_CLOSE_ROWS = 1024

Work = Callable[[np.ndarray], int]


class Orders(Protocol):
    """The orders inside all classes, resumable.

    Attributes:
        taken: int64 [K], how many each class has taken; rows: int32 [N], place in the class in the order
            taken; gains: float64 [N]; both from ``pool.starts[k]`` on for class k.
    """

    taken: np.ndarray
    rows: np.ndarray
    gains: np.ndarray

    def to(self, floor: float, most: np.ndarray) -> Work:
        """What carries some classes on, each while its best gain is at least ``floor`` and it has taken fewer
        than ``most``; returns a number (for `BatchOrders`, of those taken above the floor)."""
        ...

    def bounds(self, step: int) -> np.ndarray:
        """About the gains of what is not taken, of every ``step``-th row."""
        ...


class BlockGreedy:
    """Exact greedy of embeddings' similarities as they are, from what the geometry of a class says."""

    def __init__(self, pool: Pool, start: Scores, scale: np.ndarray) -> None:
        from clipcov_pipeline.selection import blocks

        n, k = len(pool), pool.n_classes
        self.pool, self.scale, self.start = pool, scale, start
        self.taken, self.rows, self.gains = np.zeros(k, np.int64), np.empty(n, np.int32), np.empty(n)
        self.known = blocks.Rows(start.base, start.class_term, start.apart, start.centres, scale)
        self.state = blocks.State(
            np.empty(n, np.int32), np.empty(n), np.full(k, -1), self.taken, np.empty(k), np.zeros(k),
            np.zeros((k, pool.pairs.shape[1])), self.rows, self.gains,
        )  # fmt: skip

    def to(self, floor: float, most: np.ndarray) -> Work:
        from clipcov_pipeline.selection import blocks, kernels

        pairs, starts = kernels.bits(self.pool.pairs), self.pool.starts
        return lambda classes: blocks.advance_classes(
            pairs, starts, classes, self.known, self.state, floor, most
        )

    def bounds(self, step: int) -> np.ndarray:
        left = _left(self.pool, self.state.left, self.state.size, step)
        of_class = np.searchsorted(self.pool.starts, left, side="right") - 1
        count, scale = self.taken[of_class], self.scale[of_class]
        fallen = scale * (count * self.known.mean[left] + self.state.known[of_class])
        # where a class was stopped, its best gain was known: without that the threshold would not get lower
        return np.minimum(self.state.level[left] - fallen, self.state.best[of_class])


class HeapGreedy:
    """Exact greedy that assumes no more than a least similarity."""

    def __init__(self, pool: Pool, start: Scores, scale: np.ndarray, least: float, clip: bool) -> None:
        from clipcov_pipeline.selection import greedy

        n, k = len(pool), pool.n_classes
        self.pool, self.known = pool, greedy.Known(start.base, scale, least, clip)
        self.taken, self.rows, self.gains = np.zeros(k, np.int64), np.empty(n, np.int32), np.empty(n)
        self.state = greedy.Heaps(
            np.empty(n), np.empty(n, np.int32), np.full(k, -1), np.empty(n, np.int32), np.empty(n),
            np.zeros((k, pool.pairs.shape[1])), self.taken, self.rows, self.gains,
        )  # fmt: skip

    def to(self, floor: float, most: np.ndarray) -> Work:
        from clipcov_pipeline.selection import greedy, kernels

        pairs, starts = kernels.bits(self.pool.pairs), self.pool.starts
        return lambda classes: greedy.greedy_classes(
            pairs, starts, classes, self.known, self.state, floor, most
        )

    def bounds(self, step: int) -> np.ndarray:
        fallen, key = self.known.scale * self.known.least * self.taken, self.state.key
        left = zip(self.pool.starts[:-1], self.state.size, fallen, strict=True)
        parts = [key[start : start + size : step] - fall for start, size, fall in left if size > 0]
        return np.concatenate(parts) if parts else np.empty(0)


class BatchOrders:
    """The authors' batch rule."""

    def __init__(
        self, pool: Pool, start: Scores, scale: np.ndarray, weights: dict[str, float], clip: bool, batch: int
    ) -> None:
        from clipcov_pipeline.selection import notebook

        n, k = len(pool), pool.n_classes
        lasting = weights["class"] * start.class_term.astype(np.float64)
        passing = weights["label"] * pool.label_similarity[pool.order].astype(np.float64)
        self.pool, self.rule = pool, notebook.Rule(lasting, passing, scale, clip, batch)
        self.taken, self.rows, self.gains = np.zeros(k, np.int64), np.empty(n, np.int32), np.empty(n)
        self.state = notebook.Batches(
            start.base.copy(), np.empty(n, np.int32), np.full(k, -1), self.taken, np.zeros(k, np.int64),
            np.zeros(k), np.full(k, np.inf), self.rows, self.gains,
        )  # fmt: skip

    def to(self, floor: float, most: np.ndarray) -> Work:
        from clipcov_pipeline.selection import kernels, notebook

        pairs, starts = kernels.bits(self.pool.pairs), self.pool.starts
        return lambda classes: notebook.batch_classes(
            pairs, starts, classes, self.rule, self.state, floor, most
        )

    def bounds(self, step: int) -> np.ndarray:
        left = _left(self.pool, self.state.left, self.state.size, step)
        of_class = np.searchsorted(self.pool.starts, left, side="right") - 1
        # a batch that the scores have not felt yet: its pairs are as similar as usual
        waits, fall = self.state.waiting[of_class], self.state.constant[of_class]
        fallen = np.where(
            waits > 0, self.rule.scale[of_class] * (fall + waits * self.rule.lasting[left]), 0.0
        )
        return np.minimum(self.state.score[left] - fallen, self.state.lowest[of_class])


def _left(pool: Pool, left: np.ndarray, size: np.ndarray, step: int) -> np.ndarray:
    """Sorted positions of every ``step``-th row that is not taken."""
    place = np.arange(0, len(pool), step)
    of_class = np.searchsorted(pool.starts, place, side="right") - 1
    inside = place - pool.starts[of_class] < size[of_class]
    return pool.starts[of_class[inside]] + left[place[inside]]


def rank_clipcov(
    pool: Pool, count: int, params: dict[str, Any], threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pool rows (int64) in the order taken, and gains (float64); ``params`` as ``validate_method`` fills
    them."""
    sizes = pool.class_sizes
    floor, balance = params["class_floor"], params["class_balance"]
    by_gain = balance == "global"
    most = np.minimum(sizes, count) if by_gain else most_by_shares(sizes, count, floor, balance)
    orders = _orders(pool, count, params, most, threads)
    inside = _ranges(pool.starts[:-1], orders.taken)
    gains, classes = orders.gains[inside], np.repeat(np.arange(len(sizes)), orders.taken)
    rows = pool.order[np.repeat(pool.starts[:-1], orders.taken) + orders.rows[inside]]
    if by_gain:
        order = merge_by_gain(gains, classes)[:count]
    else:
        order = order_by_shares(classes, sizes, floor, balance, gains)[:count]
    return rows[order], gains[order]


def _orders(pool: Pool, count: int, params: dict[str, Any], most: np.ndarray, threads: int | None) -> Orders:
    """The orders inside all classes, as far as they are needed."""
    weights, clip, penalty = params["weights"], params["clip_negative"], params["repeat_penalty"]
    scale = weights["redundancy"] / redundancy_sizes(pool, params["redundancy"], count)
    by_shares = params["class_balance"] != "global"
    if params["mode"] == "greedy" and not clip and not penalty and (by_shares or count == len(pool)):
        # how far each class goes is known, so it is scored and ranked in one go
        start, score = scoring(pool, weights, threads=threads)
        orders = BlockGreedy(pool, start, scale)
        rank = orders.to(-np.inf, most)
        over_classes(lambda c: (score(c), rank(c)), pool.class_sizes, threads, _CLOSE_ROWS)
        return orders
    start = scores(pool, weights, clip, threads, repeat_penalty=penalty)
    made: Orders
    if params["mode"] == "notebook":
        made = BatchOrders(pool, start, scale, weights, clip, params["batch_size"])
    elif params["mode"] == "greedy" and not clip:
        made = BlockGreedy(pool, start, scale)
    else:
        made = HeapGreedy(
            pool, start, scale, 0.0 if clip and params["mode"] == "greedy" else LEAST_SIMILARITY, clip
        )
    if by_shares or count == len(pool):
        over_classes(made.to(-np.inf, most), pool.class_sizes, threads)
    else:
        _advance_to(pool, made, start.base, count, most, threads)
    return made


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one range after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def _advance_to(
    pool: Pool, orders: Orders, base: np.ndarray, count: int, most: np.ndarray, threads: int | None
) -> None:
    """Lower the threshold until ``count`` are taken in all, and little more."""
    step = max(1, len(base) // _SAMPLE)
    bounds, taken, share = base[::step], 0, 1.0
    while (missing := count - taken) > 0:
        # no gain below the missing-th bound is among the first `count`, but that alone creeps up on it:
        # only a share of the bounds above a threshold turn out to be gains above it, so reach further
        reach = missing / share + 2
        above = over_classes(orders.to(_largest(bounds, reach / step), most), pool.class_sizes, threads)
        before, taken = taken, sum(above) if isinstance(orders, BatchOrders) else int(orders.taken.sum())
        share = min(1.0, max((taken - before) / reach, 0.05))
        bounds = orders.bounds(step)


def _largest(values: np.ndarray, place: float) -> float:
    """The value at a place from the top; -inf beyond the last."""
    at = int(place) + 1
    return float(np.partition(values, len(values) - at)[len(values) - at]) if at < len(values) else -np.inf
