"""Which rows a block of picks looks at: those of the highest bounds, found by a histogram, compiled."""

import numpy as np
from numba import njit

BINS = 1024


@njit(nogil=True, cache=True)
def choose_candidates(left, size, level, mean, apart, room, scale, count, picks, usual, reach, want):
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
    per = (BINS - 1) / max(high - low, 1e-30)
    bins = room.histogram
    bins[:] = 0
    for q in range(size):
        bins[int((key[q] - low) * per)] += 1
    last, found = BINS, 0
    while last > 0 and found < want:
        last -= 1
        found += bins[last]
    # from counts to where each bin begins, the highest bin first
    at = 0
    for b in range(BINS - 1, last - 1, -1):
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
