"""Which caption of a sample a pass gives, where ``shards.caption`` has the rule ``random``.

Every caption of every row has a number. A pass draws numbers in place of rows, so that the order, and with it
the rule that no batch holds one caption twice, is over what is really given.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.training.draws import CAPTIONS, Draws, Rows, random_words


class Given(NamedTuple):
    """Rows of an index, int64 [n], and which of its captions each is given with, from 0, int64 [n]."""

    rows: Rows
    captions: Rows


@dataclass(frozen=True)
class Captions:
    """The captions of ``n`` rows, numbered through.

    Attributes:
        first: int64 [n + 1]; row ``r`` has the numbers ``first[r]`` to ``first[r + 1]``.
        hashes: int64 [captions], `places.short_hash` of each.
    """

    first: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hashes)

    def given(self, numbers: Rows) -> Given:
        """Row and caption of each number, int64 [m]."""
        rows = np.searchsorted(self.first, numbers, side="right") - 1
        return Given(rows, numbers - self.first[rows])


class WithCaptions:
    """The numbers of captions drawn in each pass: for the rows that ``draws`` has, one caption each.

    captions: of the rows. sample: int64 [n], what tells a row's sample from others, whatever else is in the
    index. The caption that a sample has in a pass follows from seed, pass and sample alone.
    """

    def __init__(self, draws: Draws, captions: Captions, sample: npt.NDArray[np.int64], seed: int) -> None:
        self._draws, self._captions, self._seed = draws, captions, seed
        self._sample, self._counts = sample.view(np.uint64), np.diff(captions.first).astype(np.uint64)

    @property
    def size(self) -> int:
        return self._draws.size

    def rows(self, number: int) -> Rows:
        """The captions drawn in pass ``number`` (from 0), int64 [size], in the order of ``draws``."""
        rows = self._draws.rows(number)
        words = _mixed(self._sample[rows] ^ random_words(self._seed, number, CAPTIONS, 1)[0])
        return self._captions.first[rows] + (words % self._counts[rows]).astype(np.int64)


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 bits that look random for each word (the end of splitmix64; products wrap)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
