"""The exact lazy greedy inside one class, compiled: a heap of upper bounds on gains.

It assumes no more than a least similarity, and is what ``blocks.py`` is checked against.
"""

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import add_swapped, clipped_similarity, dot

# numba's cache on disk sees a change in this file only: a test has this line follow
COMPILED_WITH = {"kernels.py": "51a57581fc05c47f"}


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
def greedy_classes(
    pairs, starts, classes, base, scale, least, clip, seen, total, chosen, key, row, size, taken, floor, most,
    out_row, out_gain,
):  # fmt: skip
    """Exact lazy greedy inside some classes; a later call with a lower ``floor`` carries on.

    All gains fall by at least scale x ``least`` a pick (rise, where it is negative). So with a key that is
    the gain when last evaluated, raised by what that came to by then, all bounds of a class move together,
    and they stay a heap. The largest is evaluated afresh until it is one whose gain is of now: that is the
    largest gain.

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        base: float64 [n], the score before anything is taken.
        scale: float64 [K], 1 / r_k, the weight of the redundancy.
        least: no similarity inside a class is below it; clip: count similarities below 0 as 0.
        seen: int32 [n], number taken when a row was last evaluated; total: float64 [n], its redundancy then.
        chosen: float64 [K, 2d], updated: sum of [t; v] over what is taken of each class.
        key, row: float64 [n], int32 [n], the heaps; size, taken: int64 [K], -1 in ``size`` is "not begun".
        floor: stop when the best gain is below; most: int64 [K], stop at so many taken.
        out_row, out_gain: int32 [n], float64 [n], written: place in the class and gain, in the order taken.

    Returns:
        Number of gains evaluated.
    """
    evaluated = 0
    for c in classes:
        start, stop = starts[c], starts[c + 1]
        if size[c] < 0:
            seen[start:stop] = 0
            total[start:stop] = 0.0
            size[c] = _heap(base[start:stop], key[start:stop], row[start:stop])
        evaluated += _greedy_class(
            pairs, c, start, base[start:stop], scale[c], least, clip, seen[start:stop], total[start:stop],
            chosen[c], key[start:stop], row[start:stop], size, taken, floor, most[c], out_row[start:stop],
            out_gain[start:stop],
        )  # fmt: skip
    return evaluated


@njit(nogil=True, cache=True)
def _heap(base, key, row):
    """Heap of the base scores: the gains before anything is taken. Returns its size."""
    size = base.shape[0]
    for i in range(size):
        key[i] = base[i]
        row[i] = i
    for i in range(size // 2 - 1, -1, -1):
        _sift_down(key, row, size, i)
    return size


@njit(nogil=True, cache=True)
def _greedy_class(
    pairs, c, start, base, scale, least, clip, seen, total, chosen, key, row, size, taken, floor, most,
    out_row, out_gain,
):  # fmt: skip
    """``greedy_classes`` for class ``c``; arrays by row are the class's own part. Returns evaluations."""
    d = pairs.shape[1] // 2
    scaled = (chosen * scale).astype(np.float32)
    left, count, evaluated = size[c], taken[c], 0
    while count < most and left > 0:
        fallen = scale * least * count
        if key[0] - fallen < floor:
            break
        i = row[0]
        if seen[i] == count or scale == 0.0:
            out_row[count] = i
            # not the bound, which is the same but for rounding: that would depend on when it was evaluated
            out_gain[count] = base[i] - total[i]
            left -= 1
            key[0], row[0] = key[left], row[left]
            count += 1
            if not clip and scale > 0.0:
                add_swapped(pairs, start + i, d, chosen, scaled, scale)
        else:
            if clip:
                for j in range(seen[i], count):
                    total[i] += scale * clipped_similarity(pairs, start + i, start + out_row[j], d)
            else:
                total[i] = dot(pairs, start + i, scaled)
            seen[i] = count
            evaluated += 1
            key[0] = base[i] - total[i] + fallen
        _sift_down(key, row, left, 0)
    size[c], taken[c] = left, count
    return evaluated
