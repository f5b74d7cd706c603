"""Merging per-class orders into one ranking: by gain, by shares that go with class size, or by quotas."""

import numpy as np

from clipcov_pipeline.selection.methods import BALANCE_POWER


def merge_by_gain(gains: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Order of a greedy merge: always the class whose next gain is largest, ties to the lower class.

    Args:
        gains: float64 [m], class after class, in the order taken inside each; classes: [m], non-decreasing.

    Returns:
        int64 [m], positions into ``gains``.
    """
    # a gain that is above its predecessor's is taken right after it: the running minimum says when
    reached = gains.copy()
    starts = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]]) if len(classes) else []
    for start, stop in zip(starts, [*starts[1:], len(gains)], strict=True):
        np.minimum.accumulate(gains[start:stop], out=reached[start:stop])
    return np.argsort(-reached, kind="stable")


def order_by_shares(
    classes: np.ndarray, sizes: np.ndarray, floor: int, balance: str, gains: np.ndarray
) -> np.ndarray:
    """Order in which every prefix holds the classes by shares of ``sizes ** power``, or in their quotas.

    By shares (Webster's rule), the j-th of a class of n has its turn at (j - 1/2) / n ** power; a class that
    is used up leaves its turns to the others. By quotas (``balance="quota"``), every prefix of t holds
    t n / N of a class, rounded up or down (see `quota`). The first ``floor`` of every class have their turns
    before all that, one of each class after the other, so that rare classes keep at least so many. Equal
    claims go to the larger gain, then to the lower class.

    Args:
        classes: int64 [m], class of each entry, non-decreasing, in the order taken inside each.
        sizes: int64 [K], all members of each class; floor: the first so many of each class come first.
        balance: of `BALANCE_POWER`.
        gains: float64 [m], of each entry.

    Returns:
        int64 [m], positions into ``classes``.
    """
    place = _places(classes, sizes)
    if balance != "quota":
        return _by_turn(_turns(classes, place, sizes, floor, balance), gains)
    from clipcov_pipeline.selection.quota import quota_order

    first = np.flatnonzero(place < floor)
    first = first[np.lexsort((-gains[first], place[first]))]
    rest = np.flatnonzero(place >= floor)
    left = np.maximum(sizes - floor, 0)
    return np.concatenate([first, rest[quota_order(classes[rest], left, gains[rest])]])


def _by_turn(turns: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """As ``np.lexsort((-gains, turns))``, which would sort by gain what has a turn of its own."""
    order = np.argsort(turns, kind="stable")
    again = np.flatnonzero(np.diff(turns[order]) == 0) + 1  # has the turn of the one before it
    if len(again):
        shared = np.union1d(again, again - 1)
        rows = order[shared]
        order[shared] = rows[np.lexsort((-gains[rows], turns[rows]))]
    return order


def most_by_shares(sizes: np.ndarray, count: int, floor: int, balance: str) -> np.ndarray:
    """How many of each class the first ``count`` of `order_by_shares` can hold, int64 [K].

    One more than they do hold, at most: classes with equal claims on the last places are told apart by gain.
    """
    if count >= sizes.sum():
        return sizes.copy()
    floored = np.minimum(sizes, floor)
    if balance == "quota" and count > floored.sum():
        left = sizes - floored
        return floored + -(-(count - floored.sum()) * left // left.sum())
    classes = np.repeat(np.arange(len(sizes)), sizes)
    turns = _turns(classes, _places(classes, sizes), sizes, floor, balance)
    last = np.partition(turns, count - 1)[count - 1]
    return np.bincount(classes[turns <= last], minlength=len(sizes))


def _places(classes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Place of each entry inside its class, from 0."""
    counts = np.bincount(classes, minlength=len(sizes))
    return np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)


def _turns(classes: np.ndarray, place: np.ndarray, sizes: np.ndarray, floor: int, balance: str) -> np.ndarray:
    turns = (place + 0.5) / (sizes ** BALANCE_POWER.get(balance, 1.0))[classes]
    return np.where(place < floor, place - floor, turns) if floor else turns
