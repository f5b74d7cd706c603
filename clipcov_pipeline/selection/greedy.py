"""The exact lazy greedy inside one class, compiled: a heap of upper bounds on gains.

It assumes no more than a least similarity, and is what ``blocks.py`` is checked against.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import add_swapped, clipped_similarity, dot

# numba's cache on disk sees a change in this file only: a test has this line follow
COMPILED_WITH = {"kernels.py": "51a57581fc05c47f"}


class Known(NamedTuple):
    """What is known before the greedy begins, sorted by class.

    Attributes:
        base: float64 [n], the score before anything is taken.
        scale: float64 [K], 1 / r_k, the weight of the redundancy.
        least: no similarity inside a class is below it; clip: count similarities below 0 as 0.
    """

    base: np.ndarray
    scale: np.ndarray
    least: float
    clip: bool


class Heaps(NamedTuple):
    """How far the classes are.

    Attributes:
        key, row: float64 [n], int32 [n], the heap of each class; size: int64 [K], -1 is "not begun".
        seen: int32 [n], number taken when a row was last evaluated; total: float64 [n], its redundancy then.
        chosen: float64 [K, 2d], sum of [t; v] over what is taken, zero at first; taken: int64 [K].
        rows, gains: int32 [n], float64 [n]: place in the class and gain, in the order taken.
    """

    key: np.ndarray
    row: np.ndarray
    size: np.ndarray
    seen: np.ndarray
    total: np.ndarray
    chosen: np.ndarray
    taken: np.ndarray
    rows: np.ndarray
    gains: np.ndarray


@njit(nogil=True, cache=True)
def _sift_down(key, row, size, at):
    """Let the entry at ``at`` sink to its place in the heap (largest key, then lowest row)."""
    moving_key, moving_row = key[at], row[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            key[other] > key[child] or (key[other] == key[child] and row[other] < row[child])
        ):
            child = other
        if key[child] < moving_key or (key[child] == moving_key and row[child] > moving_row):
            break
        key[at], row[at] = key[child], row[child]
        at = child
    key[at], row[at] = moving_key, moving_row


@njit(nogil=True, cache=True)
def greedy_classes(pairs, starts, classes, known, state, floor, most):
    """Exact lazy greedy inside some classes; a later call with a lower ``floor`` carries on.

    All gains fall by at least scale x ``least`` a pick (rise, where it is negative). So with a key that is
    the gain when last evaluated, raised by what that came to by then, all bounds of a class move together,
    and they stay a heap. The largest is evaluated afresh until it is one whose gain is of now: that is the
    largest gain.

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        known: ``Known``; state: ``Heaps``, updated.
        floor: stop when the best gain is below; most: int64 [K], stop at so many taken.

    Returns:
        Number of gains evaluated.
    """
    evaluated = 0
    for c in classes:
        if state.size[c] < 0:
            _begin(c, starts[c], starts[c + 1], known.base, state)
        evaluated += _greedy_class(pairs, c, slice(starts[c], starts[c + 1]), known, state, floor, most[c])
    return evaluated


@njit(nogil=True, cache=True)
def _begin(c, start, stop, base, state):
    """Heap of the base scores: the gains before anything is taken."""
    key, row, size = state.key[start:stop], state.row[start:stop], stop - start
    for i in range(size):
        key[i] = base[start + i]
        row[i] = i
    for i in range(size // 2 - 1, -1, -1):
        _sift_down(key, row, size, i)
    state.seen[start:stop], state.total[start:stop], state.size[c] = 0, 0.0, size


@njit(nogil=True, cache=True)
def _greedy_class(pairs, c, part, known, state, floor, most):
    """``greedy_classes`` for class ``c``, which is ``part`` of the rows. Returns evaluations."""
    start, d, scale, clip = part.start, pairs.shape[1] // 2, known.scale[c], known.clip
    base, seen, total, chosen = known.base[part], state.seen[part], state.total[part], state.chosen[c]
    key, row, rows, gains = state.key[part], state.row[part], state.rows[part], state.gains[part]
    scaled = (chosen * scale).astype(np.float32)
    left, count, evaluated = state.size[c], state.taken[c], 0
    while count < most and left > 0:
        fallen = scale * known.least * count
        if key[0] - fallen < floor:
            break
        i = row[0]
        if seen[i] == count or scale == 0.0:
            # not the bound, which is the same but for rounding: that would depend on when it was evaluated
            rows[count], gains[count] = i, base[i] - total[i]
            left -= 1
            key[0], row[0] = key[left], row[left]
            count += 1
            if not clip and scale > 0.0:
                add_swapped(pairs, start + i, d, chosen, scaled, scale)
        else:
            if clip:
                for j in range(seen[i], count):
                    total[i] += scale * clipped_similarity(pairs, start + i, start + rows[j], d)
            else:
                total[i] = dot(pairs, start + i, scaled)
            seen[i] = count
            evaluated += 1
            key[0] = base[i] - total[i] + fallen
        _sift_down(key, row, left, 0)
    state.size[c], state.taken[c] = left, count
    return evaluated
