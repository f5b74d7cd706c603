"""The authors' batch rule inside one class, compiled."""

from typing import NamedTuple

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import add_swapped, clipped_similarity, dot, prefetch

# numba's cache on disk sees a change in this file only: a test has this line follow
COMPILED_WITH = {"kernels.py": "51a57581fc05c47f"}


class Rule(NamedTuple):
    """What a batch takes from the scores.

    Attributes:
        lasting: float64 [n], the class term; passing: float64 [n], half the label similarity.
        scale: float64 [K]; clip: count similarities below 0 as 0.
        batch: so many are taken at a time.
    """

    lasting: np.ndarray
    passing: np.ndarray
    scale: np.ndarray
    clip: bool
    batch: int


class Batches(NamedTuple):
    """How far the classes are. A batch's effect on the scores waits until the next batch is asked for.

    Attributes:
        score: float64 [n], by row, the base scores at first.
        left: int32 [n], the rows of a class that are not taken: the first ``size`` of its part, ascending.
        size: int64 [K], how many are left, -1 at first; taken: int64 [K].
        waiting: int64 [K], how many the last batch had whose effect waits.
        constant: float64 [K], the class term over all taken.
        lowest: float64 [K], of the scores at which something was taken, infinite at first.
        rows, gains: int32 [n], float64 [n]: place in the class and score, in the order taken.
    """

    score: np.ndarray
    left: np.ndarray
    size: np.ndarray
    taken: np.ndarray
    waiting: np.ndarray
    constant: np.ndarray
    lowest: np.ndarray
    rows: np.ndarray
    gains: np.ndarray


@njit(nogil=True, cache=True)
def batch_classes(pairs, starts, classes, rule, state, floor, most):
    """The authors' batch rule inside some classes (``clip_core.ipynb`` of their repository).

    By score, the best ``batch - 1`` are taken, then ``batch`` at a time. After each batch every score of the
    class falls by scale x (similarities to the batch + ``lasting`` over all taken so far + ``passing`` over
    the batch).

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        rule: ``Rule``; state: ``Batches``, updated: a class goes on until ``most`` are taken, or one below
            ``floor`` was.
        floor: a score; most: int64 [K].

    Returns:
        How many of these classes have been taken before anything below ``floor`` was.
    """
    above = 0
    for c in classes:
        start, stop = starts[c], starts[c + 1]
        if state.size[c] < 0:
            state.size[c], state.taken[c], state.waiting[c] = stop - start, 0, 0
            state.constant[c], state.lowest[c] = 0.0, np.inf
            for i in range(stop - start):
                state.left[start + i] = i
        while state.taken[c] < most[c] and state.lowest[c] >= floor:
            if state.waiting[c]:
                _fall(pairs, c, start, stop, state, rule.passing, rule.scale[c], rule.clip)
            want = rule.batch - 1 if state.taken[c] == 0 else rule.batch
            _take(c, start, stop, state, rule.lasting, min(want, most[c] - state.taken[c]))
        lowest = np.inf
        for place in range(start, start + state.taken[c]):
            lowest = min(lowest, state.gains[place])
            if lowest < floor:
                break
            above += 1
    return above


@njit(nogil=True, cache=True)
def _take(c, start, stop, state, lasting, want):
    """Take the ``want`` best of a class; rows left over keep their order, so that ties go to the first."""
    left, score = state.left[start:stop], state.score[start:stop]
    size, taken = state.size[c], state.taken[c]
    falling = np.empty(size)
    for q in range(size):
        falling[q] = -score[left[q]]
    last = np.partition(falling, want - 1)[want - 1]
    better = 0
    for q in range(size):
        better += falling[q] < last
    best, value = np.empty(want, np.int32), np.empty(want)
    found, kept, equal = 0, 0, want - better
    for q in range(size):
        if falling[q] < last or (falling[q] == last and equal > 0):
            equal -= falling[q] == last
            best[found], value[found] = left[q], falling[q]
            found += 1
        else:
            left[kept] = left[q]
            kept += 1
    for place in np.argsort(value, kind="mergesort"):
        i = best[place]
        state.rows[start + taken], state.gains[start + taken] = i, score[i]
        state.constant[c] += lasting[start + i]
        state.lowest[c] = min(state.lowest[c], score[i])
        taken += 1
    state.size[c], state.taken[c], state.waiting[c] = kept, taken, want


@njit(nogil=True, cache=True)
def _fall(pairs, c, start, stop, state, passing, scale, clip):
    """Let the scores fall by what the last batch of a class takes from them."""
    d, taken = pairs.shape[1] // 2, state.taken[c]
    left, score, rows = state.left[start:stop], state.score[start:stop], state.rows[start:stop]
    chosen, scaled = np.zeros(2 * d), np.empty(2 * d, np.float32)
    passed, size = 0.0, state.size[c]
    for f in range(taken - state.waiting[c], taken):
        passed += passing[start + rows[f]]
        if not clip:
            add_swapped(pairs, start + rows[f], d, chosen, scaled, scale)
    fall = (state.constant[c] + passed) * scale
    for q in range(size):
        i = left[q]
        if clip:
            similar = 0.0
            for f in range(taken - state.waiting[c], taken):
                similar += clipped_similarity(pairs, start + i, start + rows[f], d)
            score[i] -= scale * similar + fall
        else:
            if q + 1 < size:
                prefetch(pairs, start + left[q + 1])
            score[i] -= float(dot(pairs, start + i, scaled)) + fall
    state.waiting[c] = 0
