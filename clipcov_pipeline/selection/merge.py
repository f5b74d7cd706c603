"""Merging per-class orders into one ranking: by gain, or by shares that go with class size."""

import numpy as np


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


def order_by_shares(classes: np.ndarray, sizes: np.ndarray, floor: int, power: float = 1.0) -> np.ndarray:
    """Order in which every prefix holds the classes in proportion to ``sizes ** power``.

    The j-th of a class of n has its turn at (j - 1/2) / n ** power; a class that is used up leaves its turns
    to the others. The first ``floor`` of every class have theirs before all
    that, one of each class after the other, so that rare classes keep at least so many.

    Args:
        classes: int64 [m], class of each entry, non-decreasing, in the order taken inside each.
        sizes: int64 [K], all members of each class; floor: the first so many of each class come first.
        power: 1 for shares in proportion to class size, 0.5 to its square root, 0 for equal shares.

    Returns:
        int64 [m], positions into ``classes``.
    """
    return np.argsort(_turns(classes, sizes, floor, power), kind="stable")


def _turns(classes: np.ndarray, sizes: np.ndarray, floor: int, power: float) -> np.ndarray:
    counts = np.bincount(classes, minlength=len(sizes))
    place = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    turns = (place + 0.5) / np.repeat(sizes**power, counts)
    return np.where(place < floor, place - floor, turns) if floor else turns


def counts_by_shares(sizes: np.ndarray, count: int, floor: int, power: float = 1.0) -> np.ndarray:
    """How many of each class the first ``count`` of ``order_by_shares`` hold: int64 [K]."""
    if count >= sizes.sum():
        return sizes.copy()
    classes = np.repeat(np.arange(len(sizes)), sizes)
    turns = _turns(classes, sizes, floor, power)
    last = np.partition(turns, count - 1)[count - 1]
    before = turns < last
    # of those with the same turn, the lower classes
    equal = np.flatnonzero(turns == last)[: count - int(before.sum())]
    return np.bincount(classes[before], minlength=len(sizes)) + np.bincount(
        classes[equal], minlength=len(sizes)
    )
