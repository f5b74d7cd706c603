"""What a pass draws: a list of rows that is a function of a seed and the pass alone.

Random numbers are the raw output of Philox, a counter-based generator: numpy keeps that stream the same in
all its versions, which it does not promise of `Generator.permutation`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.subsets.index import check_weights, draws_of_pass, whole_draws

Rows = npt.NDArray[np.int64]
_SHUFFLE, _PHASE, _CHOICE, CAPTIONS = range(4)  # streams of one (seed, pass)


class Draws(Protocol):
    """The draws of each pass of a training."""

    @property
    def size(self) -> int:
        """Draws in every pass."""
        ...

    def rows(self, number: int) -> Rows:
        """The rows drawn in pass ``number`` (from 0), int64 [size], in random order."""
        ...


def random_words(seed: int, number: int, stream: int, n: int) -> npt.NDArray[np.uint64]:
    """``n`` words of 64 random bits, a function of the arguments."""
    key = np.random.SeedSequence([seed, number, stream]).generate_state(2, np.uint64)
    return np.random.Philox(key=key).random_raw(n)


def random_order(seed: int, number: int, stream: int, n: int) -> Rows:
    """A permutation of ``n``, a function of the arguments, int64 [n]."""
    low = np.uint64((1 << n.bit_length()) - 1)
    # with its place in the low bits no word is like another, and a plain sort, the fastest, has one result
    words = (random_words(seed, number, stream, n) & ~low) | np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & low).astype(np.int64)


@dataclass(frozen=True)
class EachOnce:
    """Every one of ``n`` rows once a pass."""

    n: int
    seed: int

    @property
    def size(self) -> int:
        return self.n

    def rows(self, number: int) -> Rows:
        return _shuffled(np.arange(self.n), self.seed, number)


class Weighted:
    """Rows drawn in proportion to weights, always the same number of draws a pass.

    Whole-numbered weights (after division by their greatest common divisor at most `index.MOST_REPEATS`) are
    the numbers of draws themselves: DataComp's repeated uids. Else a pass has as many draws as there are rows
    with a weight above 0, and a row's share ``e = size * weight / sum`` is drawn floor(e) or ceil(e) times:
    systematic sampling along a new random order in each pass, so that its mean over passes is ``e``.
    """

    def __init__(self, weight: npt.NDArray[np.float64], seed: int, where: str = "train.weights") -> None:
        check_weights(weight, where)
        self._seed = seed
        self._counts, self._size = whole_draws(weight), draws_of_pass(weight)
        share = weight / weight.max()  # the sum of very small or very large weights has no reciprocal
        self._shares = share * (self._size / share.sum())

    @property
    def size(self) -> int:
        return self._size

    def rows(self, number: int) -> Rows:
        counts = self._counts if self._counts is not None else self._systematic(number)
        return _shuffled(np.repeat(np.arange(len(counts)), counts), self._seed, number)

    def _systematic(self, number: int) -> npt.NDArray[np.int64]:
        """Draws of each row, floor or ceil of its share; they add up to `size`."""
        order = random_order(self._seed, number, _CHOICE, len(self._shares))
        phase = float(random_words(self._seed, number, _PHASE, 1)[0] >> np.uint64(11)) / 2**53
        whole = np.floor(self._shares)
        # the whole parts apart: what is left to sum is below 1 a row, and rounding cannot add a draw
        ends = np.cumsum((self._shares - whole)[order])
        rest = self._size - int(whole.sum())
        if rest:  # a row without a rest must not get the last draw by rounding
            ends = np.where(ends == ends[-1], rest, ends * (rest / ends[-1]))
        marks = np.floor(ends + phase).astype(np.int64)
        counts = whole.astype(np.int64)
        counts[order] += np.diff(np.minimum(marks, rest), prepend=0)
        return counts


class Fresh:
    """A new choice in every pass: ``quota[c]`` of the rows of class ``c``, without replacement.

    classes: int [n], class of each row, those below 0 are never drawn; quota: int [classes].
    """

    def __init__(self, classes: npt.NDArray[np.integer], quota: npt.NDArray[np.integer], seed: int) -> None:
        self._eligible = np.flatnonzero(classes >= 0)
        self._classes = classes[self._eligible].astype(np.int64)
        self._quota, self._seed = np.asarray(quota, np.int64), seed
        if len(self._classes) and int(self._classes.max()) >= len(self._quota):
            raise InputError(
                f"train.fresh: class {int(self._classes.max())} has no quota, {len(self._quota)} were given;"
                " give one for each class"
            )
        there = np.bincount(self._classes, minlength=len(self._quota))
        if (wrong := (self._quota > there) | (self._quota < 0)).any():
            found = int(wrong.argmax())
            raise InputError(
                f"train.fresh: the quota of class {found} is {self._quota[found]}, it has {there[found]}"
                f" samples; give 0 to {there[found]}"
            )
        if not self._quota.any():
            raise InputError("train.fresh: all quotas are 0; give at least one above 0")

    @property
    def size(self) -> int:
        return int(self._quota.sum())

    def rows(self, number: int) -> Rows:
        words = random_words(self._seed, number, _CHOICE, len(self._classes))
        order = np.lexsort((words, self._classes))
        sorted_classes = self._classes[order]
        first = np.searchsorted(sorted_classes, np.arange(len(self._quota)))
        within = np.arange(len(order)) - first[sorted_classes]
        chosen = order[within < self._quota[sorted_classes]]
        return _shuffled(self._eligible[np.sort(chosen)], self._seed, number)


def _shuffled(rows: Rows, seed: int, number: int) -> Rows:
    return rows[random_order(seed, number, _SHUFFLE, len(rows))]
