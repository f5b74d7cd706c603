"""Compiled loops of the selection: class sums, base scores, and the exact lazy greedy inside one class.

Rows of ``pairs`` are ``[image embedding; caption embedding]``, sorted by class. float16 rows are passed
as their uint16 bit patterns (``bits``) because numba has no float16 on the CPU; ``_widen`` turns one
into a float32 with the processor's own conversion. Dot products accumulate in float32 over one row and
sums over rows in float64: a float16 sum over a class of 62,000 rows is wrong by most of its value.
All functions release the GIL; the caller threads over classes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# only what lets the compiler vectorise a sum; NaN and infinity keep their meaning
_FAST = {"reassoc", "contract", "nsz"}
# picks after which what was evaluated lately joins the rest (see greedy_classes)
_BLOCK = 64


def bits(pairs: np.ndarray) -> np.ndarray:
    """float16 rows as uint16 bit patterns, float32 rows as they are."""
    return pairs.view(np.uint16) if pairs.dtype == np.float16 else pairs


@intrinsic
def _widen(typingctx: Any, value: Any = None) -> Any:  # noqa: ARG001  numba's own first argument
    """float32 of a float16 bit pattern (uint16), or of a float32."""
    if value == types.float32:
        return types.float32(types.float32), lambda _context, _builder, _signature, args: args[0]

    def convert(_context, builder, _signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), convert


@njit(nogil=True, cache=True)
def scatter(pairs, into, image, text, by):
    """pairs[into[i]] = [image[i]; text[i]] for the i in ``by``, in that order; all three of one bit type."""
    d = image.shape[1]
    for i in by:
        at = into[i]
        for j in range(d):
            pairs[at, j] = image[i, j]
        for j in range(d):
            pairs[at, d + j] = text[i, j]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _dot(pairs, i, vector):
    """<pairs[i], vector>, float32."""
    total = np.float32(0.0)
    for j in range(vector.shape[0]):
        total += _widen(pairs[i, j]) * vector[j]
    return total


@njit(nogil=True, cache=True, fastmath=_FAST)
def _add_row(pairs, i, d, block):
    """Add a row to ``block`` (float32 [2d]); |v|^2, |t|^2 and <v, t> of it, float32. The row is widened
    once."""
    vv = np.float32(0.0)
    tt = np.float32(0.0)
    vt = np.float32(0.0)
    for j in range(d):
        v = _widen(pairs[i, j])
        t = _widen(pairs[i, d + j])
        vv += v * v
        tt += t * t
        vt += v * t
        block[j] += v
        block[d + j] += t
    return vv, tt, vt


@njit(nogil=True, cache=True, fastmath=_FAST)
def _three_dots(pairs, i, x, y, z):
    """<pairs[i], x>, <pairs[i], y> and <pairs[i], z>, float32. The row is widened once."""
    of_x = np.float32(0.0)
    of_y = np.float32(0.0)
    of_z = np.float32(0.0)
    for j in range(x.shape[0]):
        value = _widen(pairs[i, j])
        of_x += value * x[j]
        of_y += value * y[j]
        of_z += value * z[j]
    return of_x, of_y, of_z


@njit(nogil=True, cache=True)
def class_statistics(pairs, starts, classes, sums, self_similarity, largest, tolerance):
    """Class sums and pair similarities of some classes, in one read.

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        sums: float64 [K, 2d], written: the sum of the class's rows.
        self_similarity: float32 [n], written: <v_i, t_i>.
        largest: float64 [K], written: the largest |v_i|^2 + |t_i|^2.
        tolerance: largest accepted distance of a squared norm from 1.

    Returns:
        The first position whose row is not of unit norm (NaN and infinity are not either), or -1.
    """
    d = pairs.shape[1] // 2
    bad = -1
    block = np.zeros(2 * d, np.float32)
    for c in classes:
        block[:] = 0.0
        for i in range(starts[c], starts[c + 1]):
            vv, tt, vt = _add_row(pairs, i, d, block)
            self_similarity[i] = vt
            largest[c] = max(largest[c], float(vv) + float(tt))
            if not (abs(vv - 1.0) <= tolerance and abs(tt - 1.0) <= tolerance) and (bad < 0 or i < bad):
                bad = i
            if (i - starts[c]) % 256 == 255:
                for j in range(2 * d):
                    sums[c, j] += block[j]
                block[:] = 0.0
        for j in range(2 * d):
            sums[c, j] += block[j]
    return bad


@njit(nogil=True, cache=True)
def widen(rows, out):
    """out = rows as float32; rows: [n, d] as ``bits`` gives them."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i, j] = _widen(rows[i, j])


@njit(nogil=True, cache=True)
def top_two(scores, best, top, margin):
    """Per row of scores [n, k]: place of the largest (first of equals), its value, how far the second is.

    best: int32 [n], top, margin: float32 [n], written. A row of NaN has -inf in top; for k = 1 margin is 0.
    """
    for i in range(scores.shape[0]):
        first = np.float32(-np.inf)
        second = np.float32(-np.inf)
        at = 0
        for j in range(scores.shape[1]):
            value = scores[i, j]
            if value > second:
                if value > first:
                    second = first
                    first = value
                    at = j
                else:
                    second = value
        best[i] = at
        top[i] = first
        margin[i] = first - second if scores.shape[1] > 1 else np.float32(0.0)


@njit(nogil=True, cache=True)
def matched(rows, vectors, which, out):
    """out[i] = <rows[i], vectors[which[i]]>, float32."""
    for i in range(rows.shape[0]):
        out[i] = _dot(rows, i, vectors[which[i]])


@njit(nogil=True, cache=True)
def project(pairs, starts, classes, directions, out):
    """out[m, i] = <pairs[i], directions[class of i, m]> for the rows of some classes, all float32, in one
    read."""
    threes = directions.shape[1] // 3 * 3
    for c in classes:
        for i in range(starts[c], starts[c + 1]):
            for m in range(0, threes, 3):
                out[m, i], out[m + 1, i], out[m + 2, i] = _three_dots(
                    pairs, i, directions[c, m], directions[c, m + 1], directions[c, m + 2]
                )
            for m in range(threes, directions.shape[1]):
                out[m, i] = _dot(pairs, i, directions[c, m])


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


@njit(nogil=True, cache=True)
def _take(pairs, i, d, chosen, scaled, scale):
    """Add the swapped row [t; v] to the chosen sum; refresh its float32 copy, scaled by 1 / r_k."""
    for j in range(d):
        chosen[j] += _widen(pairs[i, d + j])
        chosen[d + j] += _widen(pairs[i, j])
    for j in range(2 * d):
        scaled[j] = chosen[j] * scale


@njit(nogil=True, cache=True, fastmath=_FAST)
def _drift(pairs, i, d, centre, drift):
    """Add the swapped row [t; v], less its class's mean, to ``drift`` (float32 [2d]); returns |drift|."""
    total = np.float32(0.0)
    for j in range(d):
        drift[j] += _widen(pairs[i, d + j]) - centre[j]
        drift[d + j] += _widen(pairs[i, j]) - centre[d + j]
    for j in range(2 * d):
        total += drift[j] * drift[j]
    return np.sqrt(total)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _clipped(pairs, i, j, d):
    """max(0, <v_i, t_j>) + max(0, <t_i, v_j>), float32."""
    vt = np.float32(0.0)
    tv = np.float32(0.0)
    for k in range(d):
        vt += _widen(pairs[i, k]) * _widen(pairs[j, d + k])
        tv += _widen(pairs[i, d + k]) * _widen(pairs[j, k])
    return max(vt, np.float32(0.0)) + max(tv, np.float32(0.0))


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
                _take(pairs, start + i, d, chosen, scaled, scale)
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
                total[i] += scale * _clipped(pairs, start + i, start + out_row[j], d)
        else:
            total[i] = _dot(pairs, start + i, scaled)
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


@njit(nogil=True, cache=True)
def batch_classes(
    pairs, starts, classes, base, lasting, passing, scale, clip, batch, most, out_row, out_gain
):
    """The authors' batch rule inside some classes (``clip_core.ipynb`` of their repository).

    By score, the best ``batch - 1`` are taken, then ``batch`` at a time. After each batch every score of the
    class falls by scale x (similarities to the batch + ``lasting`` over all taken so far + ``passing`` over
    the batch).

    Args:
        lasting: float64 [n], the class term; passing: float64 [n], half the label similarity.
        The others as in ``greedy_classes``.
    """
    d = pairs.shape[1] // 2
    chosen = np.empty(2 * d)
    scaled = np.empty(2 * d, np.float32)
    for c in classes:
        start, stop = starts[c], starts[c + 1]
        left = np.arange(stop - start)
        score = base[start:stop].copy()
        taken = 0
        constant = 0.0
        while taken < most[c]:
            order = np.argsort(-score, kind="mergesort")
            want = min(batch - 1 if taken == 0 else batch, most[c] - taken)
            chosen[:] = 0.0
            passed = 0.0
            for rank in range(want):
                i = left[order[rank]]
                out_row[start + taken] = i
                out_gain[start + taken] = score[order[rank]]
                taken += 1
                constant += lasting[start + i]
                passed += passing[start + i]
                if not clip:
                    _take(pairs, start + i, d, chosen, scaled, scale[c])
            # rows keep their order, so that ties still go to the first
            rest = np.sort(order[want:])
            left, score = left[rest], score[rest]
            fall = (constant + passed) * scale[c]
            for r in range(left.shape[0]):
                i = start + left[r]
                if clip:
                    similar = 0.0
                    for b in range(start + taken - want, start + taken):
                        similar += _clipped(pairs, i, start + out_row[b], d)
                    score[r] -= scale[c] * similar + fall
                else:
                    score[r] -= float(_dot(pairs, i, scaled)) + fall
