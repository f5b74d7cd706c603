"""The exact lazy greedy inside one class, compiled: a heap of upper bounds on gains."""

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import FAST, add_swapped, as_float32, clipped_similarity, dot

# picks after which what was evaluated lately joins the rest (see greedy_classes)
_BLOCK = 64


@njit(nogil=True, cache=True)
def _sift_down(key, row, size, at):
    """Let the entry at ``at`` sink to its place in the heap (four children each; largest key, then lowest
    row)."""
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
def _sift_up(key, row, at):
    """Let the entry at ``at`` rise to its place in the heap."""
    moving_key, moving_row = key[at], row[at]
    while at > 0:
        parent = (at - 1) // 2
        if key[parent] > moving_key or (key[parent] == moving_key and row[parent] < moving_row):
            break
        key[at], row[at] = key[parent], row[parent]
        at = parent
    key[at], row[at] = moving_key, moving_row


@njit(nogil=True, cache=True, fastmath=FAST)
def _drift(pairs, i, d, centre, drift):
    """Add the swapped row [t; v], less its class's mean, to ``drift`` (float32 [2d]); returns |drift|."""
    total = np.float32(0.0)
    for j in range(d):
        drift[j] += as_float32(pairs[i, d + j]) - centre[j]
        drift[d + j] += as_float32(pairs[i, j]) - centre[d + j]
    for j in range(2 * d):
        total += drift[j] * drift[j]
    return np.sqrt(total)


@njit(nogil=True, cache=True)
def greedy_classes(
    pairs, starts, classes, base, scale, lower, apart, farthest, centres, fallen, clip, seen, total, chosen,
    key, row, size, taken, floor, most, out_row, out_gain,
):  # fmt: skip
    """Exact lazy greedy inside some classes; a later call with a lower ``floor`` carries on.

    Everything not taken is in one of two heaps of upper bounds on gains: what was last evaluated before the
    present block of ``_BLOCK`` picks, and what was evaluated in it. All gains of a heap have fallen by at
    least scale x a common amount since its zero, so a key is (gain when evaluated) + scale x (that amount
    then)
    and key - scale x (the amount now) is a bound: the bounds of a heap move together and it stays a heap. The
    largest bound is evaluated afresh until it is one whose gain is of now: that is the largest gain.

    The amount is a sum of ``lower`` over what was taken (in the block: ``within``; before: ``fallen``). Over
    a
    whole block there is a better one: with x_i the distance of a row from its class mean and D the sum of the
    swapped distances taken, the similarities add up to a known part less <x_i, D>, and |D| grows much
    more slowly than the sum of the |x_j|.

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        base: float64 [n], the score before anything is taken.
        scale: float64 [K], 1 / r_k, the weight of the redundancy.
        lower: float32 [n], no similarity of a row of the class to this one is below it.
        apart: float32 [n], |x_j|; farthest: float64 [K], the largest of a class, negative: use ``lower``
            only.
        centres: float32 [K, 2d], mean swapped row of each class.
        fallen: float64 [K], updated, zero at first.
        clip: count similarities below 0 as 0.
        seen: int32 [n], number taken when a row was last evaluated; total: float64 [n], its redundancy then.
        chosen: float64 [K, 2d], updated: sum of [t; v] over what is taken of each class.
        key, row: float64 [n], int32 [n], the heaps; size, taken: int64 [K], -1 in ``size`` is "not begun".
        floor: float64 [K], stop when the best gain is below; most: int64 [K], stop at so many taken.
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
            pairs, c, start, base[start:stop], scale[c], lower[start:stop], apart[start:stop], farthest[c],
            centres[c], fallen, clip, seen[start:stop], total[start:stop], chosen[c],
            key[start:stop], row[start:stop], size, taken, floor[c], most[c], out_row[start:stop],
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
    pairs, c, start, base, scale, lower, apart, farthest, centre, fallen, clip, seen, total, chosen, key, row,
    size, taken, floor, most, out_row, out_gain,
):  # fmt: skip
    """``greedy_classes`` for class ``c``; arrays by row are the class's own part. Returns evaluations."""
    d = pairs.shape[1] // 2
    scaled = (chosen * scale).astype(np.float32)
    drift = np.zeros(2 * d, np.float32)
    new_key, new_row = np.empty(size[c], np.float64), np.empty(size[c], np.int32)
    old, new, count, evaluated = size[c], 0, taken[c], 0
    # what gains have fallen by at least: before the block, in it by single picks, in it as a whole
    before, within, whole, known, picks = fallen[c], 0.0, 0.0, 0.0, 0
    while count < most and old + new > 0:
        bound = key[0] - scale * (before + whole) if old > 0 else -np.inf
        new_bound = new_key[0] - scale * within if new > 0 else -np.inf
        from_new = old == 0 or (
            new > 0 and (new_bound > bound or (new_bound == bound and new_row[0] < row[0]))
        )
        if from_new:
            bound = new_bound
        if bound < floor:
            break
        i = new_row[0] if from_new else row[0]
        if seen[i] == count or scale == 0.0:
            out_row[count] = i
            # not the bound, which is the same but for rounding: that would depend on when it was evaluated
            out_gain[count] = base[i] - total[i]
            if from_new:
                new -= 1
                new_key[0], new_row[0] = new_key[new], new_row[new]
                _sift_down(new_key, new_row, new, 0)
            else:
                old -= 1
                key[0], row[0] = key[old], row[old]
                _sift_down(key, row, old, 0)
            count += 1
            if scale == 0.0:
                continue
            within += lower[i]
            whole = within
            if not clip:
                add_swapped(pairs, start + i, d, chosen, scaled, scale)
            if farthest >= 0.0:
                known += lower[i] + apart[i] * farthest
                whole = max(within, known - farthest * _drift(pairs, start + i, d, centre, drift))
            picks += 1
            if picks == _BLOCK:
                old = _merge(key, row, old, new_key, new_row, new, scale * (before + whole - within))
                before, within, whole, known, picks, new = before + whole, 0.0, 0.0, 0.0, 0, 0
                drift[:] = 0.0
            continue
        if clip:
            for j in range(seen[i], count):
                total[i] += scale * clipped_similarity(pairs, start + i, start + out_row[j], d)
        else:
            total[i] = dot(pairs, start + i, scaled)
        gain = base[i] - total[i]
        seen[i] = count
        evaluated += 1
        if from_new:
            new_key[0] = gain + scale * within
            _sift_down(new_key, new_row, new, 0)
        else:
            old -= 1
            key[0], row[0] = key[old], row[old]
            _sift_down(key, row, old, 0)
            new_key[new], new_row[new] = gain + scale * within, i
            _sift_up(new_key, new_row, new)
            new += 1
    size[c] = _merge(key, row, old, new_key, new_row, new, scale * (before + whole - within))
    taken[c], fallen[c] = count, before + whole
    return evaluated


@njit(nogil=True, cache=True)
def _merge(key, row, old, new_key, new_row, new, shift):
    """Put one heap into the other, keys raised by ``shift``; returns the size."""
    for f in range(new):
        key[old], row[old] = new_key[f] + shift, new_row[f]
        _sift_up(key, row, old)
        old += 1
    return old
