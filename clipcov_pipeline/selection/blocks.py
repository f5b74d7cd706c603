"""The exact greedy inside one class, some dozens of picks at a time, compiled.

``greedy.py`` holds the plain lazy greedy, which this gives the same picks and gains as, bit for bit. There a
class of 3,000 evaluates some 16 gains a pick, each a row from memory; here most rows are left alone for many
picks, and the few that can be picked next are evaluated while they lie in the processor's cache.

With c the class's mean, c' the same with its halves swapped, a_i = c + x_i, S the t samples taken and
D = sum of swapped x_j over them,

    gain_i = base_i - scale * (t m_i + h + <x_i, D>),  m_i = <a_i, c'>,  h = sum of m_j over S - t <c, c'>.

All but <x_i, D> is a few numbers a row. That product was right when the row was last evaluated, at D_0, and
has changed by at most |x_i| |D - D_0| since. |D| stays small, as the samples taken scatter about the mean, so
that is a close bound, and it costs no look at the row.

A block goes: with the bounds of all rows, choose the ``candidates`` that may be picked while |D| moves by at
most ``reach``; evaluate them; pick from them, evaluating again what the bounds do not settle, until D has
moved too far, or one of the others could be better. What is picked is always the row whose gain, worked out
as ``greedy.py`` does, is the largest of all, ties to the lower row; only what is looked at to find it is
another thing.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from clipcov_pipeline.selection.kernels import FAST, add_swapped, distance, dot, drift, offset, prefetch

# blocks whose D is kept, to tell how far it has moved since a row was evaluated
_KEPT = 64
_BINS = 1024
_PICKS, _MOST_PICKS = 32, 512
# rows asked for before they are read
_AHEAD = 2
# what float32 rounding can come to in a gain, for a redundancy of 1, several times over
_ROUNDING = 4e-6
_NO_NAN = FAST | {"nnan"}

# numba's cache on disk sees a change in this file only: a test has this line follow
COMPILED_WITH = {"kernels.py": "51a57581fc05c47f"}


class Rows(NamedTuple):
    """What is known of the rows of a pool before the greedy begins, sorted by class.

    Attributes:
        base: float64 [n], the score before anything is taken.
        mean: float32 [n], m_i; apart: float32 [n], |x_i| or a little more.
        centres: float32 [K, 2d], c' of each class.
        scale: float64 [K], 1 / r_k, the weight of the redundancy.
    """

    base: np.ndarray
    mean: np.ndarray
    apart: np.ndarray
    centres: np.ndarray
    scale: np.ndarray


class State(NamedTuple):
    """How far the classes are; all but ``size`` may hold anything at first.

    Attributes:
        left: int32 [n], the rows of a class that are not taken: the first ``size`` of its part, ascending.
        level: float64 [n], by row: base_i - scale * <x_i, D> when last evaluated, or a bound on it now.
        size: int64 [K], how many are left, -1 at first; taken: int64 [K].
        best: float64 [K], no gain of a class is above it.
        known: float64 [K], h of each class; chosen: float64 [K, 2d], sum of swapped rows taken.
        rows, gains: int32 [n], float64 [n]: place in the class and gain, in the order taken.
    """

    left: np.ndarray
    level: np.ndarray
    size: np.ndarray
    taken: np.ndarray
    best: np.ndarray
    known: np.ndarray
    chosen: np.ndarray
    rows: np.ndarray
    gains: np.ndarray


class _Room(NamedTuple):
    """Scratch of one thread: ``mark`` by row and ``key`` by place in a class; by candidate; by block."""

    key: np.ndarray
    mark: np.ndarray
    row: np.ndarray
    top: np.ndarray
    when: np.ndarray
    gain: np.ndarray
    first: np.ndarray
    later: np.ndarray
    slope: np.ndarray
    width: np.ndarray
    bound: np.ndarray
    histogram: np.ndarray
    kept: np.ndarray
    moved: np.ndarray
    drift: np.ndarray
    scaled: np.ndarray


@njit(nogil=True, cache=True)
def _room(n, wide):
    """Scratch for classes of up to n rows."""
    return _Room(
        np.empty(n), np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n), np.empty(n, np.int64),
        np.empty(n), np.empty(n), np.empty(n), np.empty(n), np.empty(n), np.empty(n),
        np.empty(_BINS, np.int64), np.empty((_KEPT, wide), np.float32), np.empty(_KEPT),
        np.empty(wide, np.float32), np.empty(wide, np.float32),
    )  # fmt: skip


@njit(nogil=True, cache=True)
def advance_classes(pairs, starts, classes, rows, state, floor, most):
    """Carry some classes on, each while its best gain is at least its ``floor`` and fewer than ``most`` are
    taken.

    Args:
        pairs: [n, 2d] rows sorted by class; starts: int64 [K+1]; classes: int64, which to do.
        rows: ``Rows``; state: ``State``, updated; floor: a gain; most: int64 [K].

    Returns:
        Number of gains evaluated.
    """
    largest = 1
    for c in classes:
        largest = max(largest, starts[c + 1] - starts[c])
    room = _room(largest, pairs.shape[1])
    evaluated = 0
    for c in classes:
        start, stop = starts[c], starts[c + 1]
        if state.size[c] < 0:
            state.size[c], state.taken[c], state.best[c], state.known[c] = stop - start, 0, np.inf, 0.0
            state.chosen[c] = 0.0
            for i in range(stop - start):
                state.left[start + i] = i
                state.level[start + i] = rows.base[start + i]
        if state.taken[c] < most[c] and state.size[c] > 0 and state.best[c] >= floor:
            evaluated += _advance(pairs, c, start, stop, rows, state, room, floor, most[c])
    return evaluated


@njit(nogil=True, cache=True)
def _advance(pairs, c, start, stop, rows, state, room, floor, most):
    """``advance_classes`` for one class that has rows left. Returns evaluations."""
    base, mean, apart = rows.base[start:stop], rows.mean[start:stop], rows.apart[start:stop]
    left, level = state.left[start:stop], state.level[start:stop]
    out_row, out_gain = state.rows[start:stop], state.gains[start:stop]
    chosen, centre, scale = state.chosen[c], rows.centres[c], rows.scale[c]
    size, count, known = state.size[c], state.taken[c], state.known[c]
    wide = pairs.shape[1]
    own = 0.0
    for j in range(wide // 2):
        own += 2.0 * centre[j] * centre[wide // 2 + j]
    usual, spread = 0.0, 0.0
    for q in range(size):
        room.mark[left[q]] = 0
        usual += mean[left[q]]
        spread += apart[left[q]]
    usual, spread = usual / size, spread / size
    for j in range(wide):
        room.scaled[j] = chosen[j] * scale
    block, evaluated, more = 0, 0, 0
    extra, reach = 0.5 * _PICKS, 0.0
    stopped = False
    while count < most and size > 0 and not stopped:
        picks = min(max(_PICKS, size // 32), _MOST_PICKS, most - count)
        if reach == 0.0:
            reach = 1.3 * spread * np.sqrt(picks) + 1e-3
        offset(chosen, count, centre, room.kept[block])
        for b in range(block):
            room.moved[b] = distance(room.kept[block], room.kept[b])
        room.moved[block] = 0.0
        found, outside = _candidates(
            left, size, level, mean, apart, room, scale, count, picks, usual, reach, int(picks + extra)
        )  # fmt: skip
        _evaluate(pairs, start, room, found, base, mean, apart, level, scale, count, known, block)
        evaluated += found
        done, why, known, usual, moved, more = _pick(
            pairs, start, room, found, base, mean, apart, chosen, centre, scale, count, picks, known,
            usual, reach, outside, own, floor, out_row, out_gain,
        )  # fmt: skip
        evaluated += more
        if why == _BELOW:
            stopped = True
        if done == 0 and why == _OUTSIDE:
            extra = 2.0 * extra + 8.0
        elif why == _OUTSIDE:
            extra = 1.4 * extra + 8.0
        else:
            extra = max(0.93 * extra, 16.0)
        if why == _MOVED:
            reach *= 1.4
        elif done > 0:
            reach = 0.5 * reach + 0.6 * moved * np.sqrt(_PICKS / done) + 1e-3
        if done > 0:
            size = _drop_taken(left, size, room, out_row, count, done)
            count += done
        block += 1
        if block == _KEPT:
            _settle(left, size, level, apart, room, chosen, centre, scale, count, block)
            block = 0
    _settle(left, size, level, apart, room, chosen, centre, scale, count, block)
    state.size[c], state.taken[c], state.known[c] = size, count, known
    if stopped:
        # the best of now, as found by its evaluation
        state.best[c] = room.top[0]
    return evaluated


@njit(nogil=True, cache=True)
def _candidates(left, size, level, mean, apart, room, scale, count, picks, usual, reach, want):
    """Choose about ``want`` rows, or all, by their bounds; in ``room.row``, with ``room.top``.

    ``top`` less scale * (usual * picks since + h) is a bound on the gain of a candidate and of all that come
    after it, for ``picks`` picks and while D moves by at most ``reach``.

    Returns:
        Their number, and the same bound for the rows left out.
    """
    key = room.key
    low, high = np.inf, -np.inf
    for q in range(size):
        i = left[q]
        bound = level[i] - scale * (count * mean[i] - apart[i] * (room.moved[room.mark[i]] + reach))
        # a row whose gain falls more slowly than the usual counts as it will stand at the end of the block
        bound += max(0.0, scale * picks * (usual - mean[i]))
        key[q] = bound
        low, high = min(low, bound), max(high, bound)
    per = (_BINS - 1) / max(high - low, 1e-30)
    bins = room.histogram
    bins[:] = 0
    for q in range(size):
        bins[int((key[q] - low) * per)] += 1
    last, found = _BINS, 0
    while last > 0 and found < want:
        last -= 1
        found += bins[last]
    # from counts to where each bin begins, the highest bin first
    at = 0
    for b in range(_BINS - 1, last - 1, -1):
        number = bins[b]
        bins[b] = at
        at += number
    outside = -np.inf
    for q in range(size):
        b = int((key[q] - low) * per)
        if b >= last:
            room.row[bins[b]], room.top[bins[b]] = left[q], key[q]
            bins[b] += 1
        else:
            outside = max(outside, key[q])
    for p in range(found - 2, -1, -1):
        room.top[p] = max(room.top[p], room.top[p + 1])
    return found, outside


@njit(nogil=True, cache=True)
def _evaluate(pairs, start, room, found, base, mean, apart, level, scale, count, known, block):
    """Evaluate all candidates; write what their bounds in this block are made of."""
    for p in range(min(_AHEAD, found)):
        prefetch(pairs, start + room.row[p])
    for p in range(found):
        if p + _AHEAD < found:
            prefetch(pairs, start + room.row[p + _AHEAD])
        i = room.row[p]
        gain = base[i] - dot(pairs, start + i, room.scaled)
        room.gain[p], room.when[p] = gain, count
        room.first[p], room.later[p] = gain + scale * known, np.inf
        room.slope[p], room.width[p] = scale * mean[i], scale * apart[i]
        level[i], room.mark[i] = room.first[p] + scale * count * mean[i], block


_FULL, _OUTSIDE, _MOVED, _BELOW = 0, 1, 2, 3


@njit(nogil=True, cache=True)
def _pick(
    pairs, start, room, found, base, mean, apart, chosen, centre, scale, count, picks, known, usual,
    reach, outside, own, floor, out_row, out_gain,
):  # fmt: skip
    """Pick from the candidates.

    Returns:
        How many, why no more, h, the m of the picked on average, how far D has moved, evaluations.
    """
    d = pairs.shape[1] // 2
    rounding = _ROUNDING * scale * (count + picks) + 1e-9
    room.drift[:] = 0.0
    moved, path, total, evaluated = 0.0, 0.0, 0.0, 0
    head, tail, ahead, why, done = 0, 0, 0, _FULL, 0
    while done < picks and head < found:
        shift = scale * known - rounding
        best, best_gain, second, second_gain = -1, -np.inf, -1, -np.inf
        if ahead >= 0:
            # the runner-up of the pick before is a good guess, and so spares evaluations
            best, best_gain = ahead, room.gain[ahead]
            if room.when[ahead] != count + done:
                best_gain = base[room.row[ahead]] - dot(pairs, start + room.row[ahead], room.scaled)
                _note(room, ahead, best_gain, count, done, scale * known, path)
                evaluated += 1
        line = best_gain + shift + done * scale * usual
        while tail < found and room.top[tail] >= line:
            tail += 1
        _bounds(room.first, room.later, room.width, room.slope, room.bound, head, tail, moved, path, done)
        for p in range(head, tail):
            if room.bound[p] < best_gain + shift or p == ahead:
                continue
            i = room.row[p]
            if room.when[p] != count + done:
                gain = base[i] - dot(pairs, start + i, room.scaled)
                _note(room, p, gain, count, done, scale * known, path)
                evaluated += 1
            gain = room.gain[p]
            if best < 0 or gain > best_gain or (gain == best_gain and i < room.row[best]):
                second, second_gain = best, best_gain
                best, best_gain = p, gain
            elif second < 0 or gain > second_gain:
                second, second_gain = p, gain
        if best_gain + shift + done * scale * usual < outside:
            why = _OUTSIDE
            break
        if best_gain < floor:
            room.top[0] = best_gain
            why = _BELOW
            break
        i = room.row[best]
        out_row[count + done], out_gain[count + done] = i, best_gain
        room.first[best], room.later[best], ahead = -np.inf, -np.inf, second
        done += 1
        add_swapped(pairs, start + i, d, chosen, room.scaled, scale)
        moved = drift(pairs[start + i], centre, d, room.drift)
        path += apart[i]
        known += mean[i] - own
        total += mean[i]
        while head < found and room.first[head] == -np.inf:
            head += 1
        if moved > reach:
            why = _MOVED
            break
    return done, why, known, total / done if done else usual, moved, evaluated


@njit(nogil=True, cache=True)
def _note(room, p, gain, count, done, known, path):
    """Keep a gain just evaluated, and what bounds it from now on."""
    room.gain[p], room.when[p] = gain, count + done
    room.later[p] = gain + known + done * room.slope[p] - room.width[p] * path


@njit(nogil=True, cache=True, fastmath=_NO_NAN)
def _bounds(first, later, width, slope, bound, head, tail, moved, path, done):
    """Bounds on gains, plus scale * h: from the start of the block, and from the last evaluation in it."""
    for p in range(head, tail):
        x = first[p] + width[p] * moved
        y = later[p] + width[p] * path
        x = x if x < y else y
        bound[p] = x - done * slope[p]


@njit(nogil=True, cache=True)
def _drop_taken(left, size, room, out_row, count, done):
    """Take what was picked off ``left``; returns the new size."""
    for f in range(count, count + done):
        room.mark[out_row[f]] = -1
    kept = 0
    for q in range(size):
        if room.mark[left[q]] >= 0:
            left[kept] = left[q]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _settle(left, size, level, apart, room, chosen, centre, scale, count, blocks):
    """Let the levels be bounds for D as it is now, so that the D of earlier blocks can be forgotten."""
    if blocks == 0:
        return
    # the drift is free between blocks
    offset(chosen, count, centre, room.drift)
    for b in range(blocks):
        room.moved[b] = distance(room.drift, room.kept[b])
    for q in range(size):
        i = left[q]
        level[i] += scale * apart[i] * room.moved[room.mark[i]]
        room.mark[i] = 0
