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
from numba.core import cgutils
from numba.extending import intrinsic

# only what lets the compiler vectorise a sum; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz"}


def bits(pairs: np.ndarray) -> np.ndarray:
    """float16 rows as uint16 bit patterns, float32 rows as they are."""
    return pairs.view(np.uint16) if pairs.dtype == np.float16 else pairs


@intrinsic
def as_float32(typingctx: Any, value: Any = None) -> Any:  # noqa: ARG001  numba's own first argument
    """float32 of a float16 bit pattern (uint16), or of a float32."""
    if value == types.float32:
        return types.float32(types.float32), lambda _context, _builder, _signature, args: args[0]

    def convert(_context, builder, _signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), convert


@intrinsic
def _prefetch_line(typingctx: Any, rows: Any, i: Any, j: Any) -> Any:  # noqa: ARG001  numba's own first argument
    """Ask for the cache line of rows[i, j]."""

    def ask(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        at = cgutils.get_item_pointer(context, builder, signature.args[0], array, args[1:])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # for reading, to be kept in all caches, of data
        builder.call(hint, [builder.bitcast(at, byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), ask


@njit(nogil=True, cache=True)
def prefetch(pairs, i):
    """Ask for a row, to be in the cache when it is read."""
    for j in range(0, pairs.shape[1], 64 // pairs.itemsize):
        _prefetch_line(pairs, i, j)  # type: ignore[call-arg]  # numba hands the first one itself


@njit(nogil=True, cache=True)
def scatter(pairs, into, image, text, by):
    """pairs[into[p]] = [image[by[p]]; text[by[p]]] for all p, in that order; all three of one bit type."""
    d = image.shape[1]
    for p in range(by.shape[0]):
        i, at = by[p], into[p]
        for j in range(d):
            pairs[at, j] = image[i, j]
        for j in range(d):
            pairs[at, d + j] = text[i, j]


@njit(nogil=True, cache=True, fastmath=FAST)
def dot(pairs, i, vector):
    """<pairs[i], vector>, float32."""
    total = np.float32(0.0)
    for j in range(vector.shape[0]):
        total += as_float32(pairs[i, j]) * vector[j]
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def _add_row(pairs, i, d, block):
    """Add a row to ``block`` (float32 [2d]); |v|^2, |t|^2 and <v, t> of it, float32. The row is widened
    once."""
    vv = np.float32(0.0)
    tt = np.float32(0.0)
    vt = np.float32(0.0)
    for j in range(d):
        v = as_float32(pairs[i, j])
        t = as_float32(pairs[i, d + j])
        vv += v * v
        tt += t * t
        vt += v * t
        block[j] += v
        block[d + j] += t
    return vv, tt, vt


@njit(nogil=True, cache=True, fastmath=FAST)
def _three_dots(pairs, i, x, y, z):
    """<pairs[i], x>, <pairs[i], y> and <pairs[i], z>, float32. The row is widened once."""
    of_x = np.float32(0.0)
    of_y = np.float32(0.0)
    of_z = np.float32(0.0)
    for j in range(x.shape[0]):
        value = as_float32(pairs[i, j])
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
            if i + 1 < starts[c + 1]:
                prefetch(pairs, i + 1)
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
            out[i, j] = as_float32(rows[i, j])


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
        out[i] = dot(rows, i, vectors[which[i]])


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
                out[m, i] = dot(pairs, i, directions[c, m])


@njit(nogil=True, cache=True)
def score_classes(
    pairs, starts, classes, vectors, similarity, label, order, clipped, weights, farthest, mean, apart, base
):
    """Base scores of some classes, in one read.

    Args:
        vectors: float32 [K, 3, 2d], the directions of the class and the inter term, and the class mean.
        similarity: float32 [n], sorted by class; label: float32 [n] in pool order; order: int64 [n], from one
            to the other.
        clipped: float64 [n], the class term where it is not to come from ``vectors``, or empty.
        weights: float64 [4], as in ``objective.TERMS``.
        farthest: float64 [K], the largest squared norm of a row and the squared norm of the mean, together.
        mean: float32 [n], written: the class term; apart: float32 [n], written: the distance from the mean,
            a little more; base: float64 [n], written.
    """
    for c in classes:
        for i in range(starts[c], starts[c + 1]):
            if i + 1 < starts[c + 1]:
                prefetch(pairs, i + 1)
            of_class, inter, own = _three_dots(pairs, i, vectors[c, 0], vectors[c, 1], vectors[c, 2])
            mean[i] = of_class
            # 1e-5: what float32 rounding can add up to, many times over
            apart[i] = 1e-5 + np.sqrt(max(farthest[c] - 2.0 * own, 0.0) + 1e-5)
            term = clipped[i] if clipped.shape[0] else np.float64(of_class)
            # in this order: other sums of the four would differ in the last bit
            score = weights[0] * term - weights[3] * np.float64(inter)
            score += weights[1] * np.float64(similarity[i])
            base[i] = score + weights[2] * np.float64(label[order[i]])


@njit(nogil=True, cache=True)
def add_swapped(pairs, i, d, chosen, scaled, scale):
    """Add the swapped row [t; v] to the chosen sum; refresh its float32 copy, scaled by 1 / r_k."""
    for j in range(d):
        chosen[j] += as_float32(pairs[i, d + j])
        chosen[d + j] += as_float32(pairs[i, j])
    for j in range(2 * d):
        scaled[j] = chosen[j] * scale


@njit(nogil=True, cache=True, fastmath=FAST)
def offset(chosen, count, centre, out):
    """out = D: ``chosen`` less ``count`` times the centre."""
    for j in range(chosen.shape[0]):
        out[j] = chosen[j] - count * np.float64(centre[j])


@njit(nogil=True, cache=True, fastmath=FAST)
def distance(a, b):
    """|a - b|, or a little more, for float32 vectors."""
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        x = a[j] - b[j]
        total += x * x
    return np.float64(np.sqrt(total)) * 1.0001 + 1e-4


@njit(nogil=True, cache=True, fastmath=FAST)
def drift(row, centre_swapped, d, drift):
    """Add x of a row to ``drift`` (float32 [2d], not swapped); returns |drift|, or a little more."""
    total = np.float32(0.0)
    for j in range(d):
        x = drift[j] + (as_float32(row[j]) - centre_swapped[d + j])
        drift[j] = x
        total += x * x
    for j in range(d):
        x = drift[d + j] + (as_float32(row[d + j]) - centre_swapped[j])
        drift[d + j] = x
        total += x * x
    return np.float64(np.sqrt(total)) * 1.0001 + 1e-4


@njit(nogil=True, cache=True, fastmath=FAST)
def clipped_similarity(pairs, i, j, d):
    """max(0, <v_i, t_j>) + max(0, <t_i, v_j>), float32."""
    vt = np.float32(0.0)
    tv = np.float32(0.0)
    for k in range(d):
        vt += as_float32(pairs[i, k]) * as_float32(pairs[j, d + k])
        tv += as_float32(pairs[i, d + k]) * as_float32(pairs[j, k])
    return max(vt, np.float32(0.0)) + max(tv, np.float32(0.0))
