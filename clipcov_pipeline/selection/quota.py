"""Merging classes so that every beginning of the order holds each class's quota, up or down; compiled.

Of t samples a class of n among N has the quota t n / N. Its j-th is due in a window: not before
floor((j - 1) N / n) + 1, else the class would have more than its quota rounded up, and not after
ceil(j N / n), else less than its quota rounded down. Whoever is due first goes first (R. Tijdeman 1980, The
chairman assignment problem, shows that this is always possible).
"""

from heapq import heappop, heappush
from typing import Any

import numpy as np
from numba import njit


def quota_order(classes: np.ndarray, sizes: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Order of entries by the windows of their classes; equal deadlines go to the larger gain.

    Args:
        classes: int64 [m], class of each entry, non-decreasing, in the order taken inside each.
        sizes: int64 [K], all members of each class; entries are the first of these.
        gains: float64 [m], of each entry.

    Returns:
        int64 [m], positions into ``classes``.
    """
    counts = np.bincount(classes, minlength=len(sizes))
    starts = np.cumsum(counts) - counts
    return _by_deadline(starts, counts, sizes, np.asarray(gains, np.float64))


@njit(cache=True)
def _by_deadline(starts: np.ndarray, counts: np.ndarray, sizes: np.ndarray, gains: np.ndarray) -> np.ndarray:
    total = sizes.sum()
    order = np.empty(len(gains), np.int64)
    # (slot from which on the next of a class may come, class); (deadline, -gain, class) of those that may
    waiting = [(np.int64(0), np.int64(0))]
    ready: Any = [(np.int64(0), 0.0, np.int64(0))]
    waiting.clear()
    ready.clear()
    taken = np.zeros(len(counts), np.int64)
    for c in range(len(counts)):
        if counts[c] > 0:
            heappush(waiting, (np.int64(1), np.int64(c)))
    at, slot = 0, np.int64(0)
    while at < len(order):
        slot += 1
        if len(ready) == 0 and waiting[0][0] > slot:
            slot = waiting[0][0]
        while len(waiting) > 0 and waiting[0][0] <= slot:
            c = heappop(waiting)[1]
            due = -(-(taken[c] + 1) * total // sizes[c])
            heappush(ready, (due, -gains[starts[c] + taken[c]], c))
        c = heappop(ready)[2]
        order[at] = starts[c] + taken[c]
        at += 1
        taken[c] += 1
        if taken[c] < counts[c]:
            heappush(waiting, (taken[c] * total // sizes[c] + 1, c))
    return order
