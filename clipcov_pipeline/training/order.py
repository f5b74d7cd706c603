"""The order that a training sees its samples in: exact, seeded, the same for any number of workers and GPUs.

The draws of pass 0, 1, 2, ... follow one another without a gap, and step ``s`` of batches of ``b`` takes
places ``s * b`` to ``(s + 1) * b`` of that line: where a run is cut into virtual epochs, or resumed, changes
nothing, and a batch at the end of a pass is filled from the next one.

**The batch rule.** A batch (of a step: all GPUs, all parts) never holds one row, caption or image file twice,
for a repeated pair is a false negative. Draws that break it change places with others of their pass. Where
that cannot be (more copies than batches) the rule is relaxed and `Order.relaxed` counts it.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.training.draws import Draws, Rows

Keys = tuple[int, ...]  # of a row, one for each way that two rows can be alike
# A pass of fewer batches than this is laid out after all passes before it; a longer one from itself and the
# last draws of the pass before: those are then fixed first, which a short pass has no room for.
LONG_PASS = 4
_MOST_TRIES = 20_000  # places looked at for one draw before the rule is relaxed for it


class Order:
    """The line of rows that the steps of a training take their batches from.

    n_rows: rows of the index. draws: what each pass draws of them. batch_size: samples of a step, over all
    GPUs and parts. hashes: int64 [n_rows] each; rows that agree in one of them may not share a batch.

    Raises:
        InputError: a pass has fewer draws than a batch.
    """

    def __init__(
        self,
        n_rows: int,
        draws: Draws,
        batch_size: int,
        hashes: Sequence[npt.NDArray[np.int64]] = (),
    ) -> None:
        if draws.size < batch_size:
            raise InputError(
                f"train.batch_size: {batch_size} is more than the {draws.size} draws of a pass; give at most"
                f" {draws.size}, or a larger fraction"
            )
        self._draws, self._batch, self._hashes = draws, batch_size, [np.arange(n_rows), *hashes]
        codes = [_codes_of_repeated(column) for column in hashes]
        self._codes = [column for column in codes if column is not None]
        self._long = draws.size >= LONG_PASS * batch_size
        self._kept: dict[int, Rows] = {}
        self._relaxed: dict[int, int] = {}

    @property
    def pass_size(self) -> int:
        """Draws in a pass."""
        return self._draws.size

    def batch(self, step: int) -> Rows:
        """The rows of a step, int64 [batch_size]."""
        return self.places(step * self._batch, (step + 1) * self._batch)

    def places(self, start: int, stop: int) -> Rows:
        """Rows at places ``start`` to ``stop`` of the line, int64."""
        parts = []
        while start < stop:
            number, within = divmod(start, self._draws.size)
            part = self.pass_rows(number)[within : within + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def pass_rows(self, number: int) -> Rows:
        """The rows of a pass in their order, int64 [pass_size]."""
        first = number
        if not self._long:
            first = max((known for known in self._kept if known <= number), default=0)
        for current in range(first, number + 1):
            if current not in self._kept:
                self._kept[current] = self._laid_out(current)
                # a batch spans two passes at most
                self._kept.pop(current - 2, None)
        if number not in self._kept:
            self._kept = {number: self._laid_out(number)}
        return self._kept[number]

    def relaxed(self, number: int) -> int:
        """Draws of a pass that share their batch with an equal one, because no other place was found."""
        self.pass_rows(number)
        return self._relaxed[number]

    def repeats(self, rows: Rows) -> int:
        """How many of these rows are equal to an earlier one of them, by row or by any hash."""
        return int(self._repeated(rows, np.zeros(len(rows), np.int64)).sum())

    def _laid_out(self, number: int) -> Rows:
        rows = self._draws.rows(number)
        start = number * self._draws.size
        before = self._end_of(number - 1, start)
        if self._long:
            rows = self._with_end_fixed(rows, start)
        layout = _Layout(self, rows, start, before)
        fixed = (start + len(rows)) % self._batch if self._long else 0
        self._relaxed[number] = layout.mend(len(rows) - fixed)
        return layout.rows

    def _end_of(self, number: int, end: int) -> Rows:
        """The last draws of a pass, those that share a batch with the first of the next."""
        count = end % self._batch
        if not count:
            return np.empty(0, np.int64)
        if self._long and number not in self._kept:
            return self._with_end_fixed(self._draws.rows(number), end - self._draws.size)[-count:]
        return self._kept[number][-count:]

    def _with_end_fixed(self, rows: Rows, start: int) -> Rows:
        """The draws with no two alike in their last, unfinished batch; the same whatever came before."""
        count = (start + len(rows)) % self._batch
        if not count:
            return rows
        # what is brought in may not break the rule among the last; what is sent away is mended later
        layout = _Layout(self, rows[::-1], 0, np.empty(0, np.int64), end_only=count)
        layout.mend(len(rows))
        return layout.rows[::-1]

    def _repeated(self, rows: Rows, batches: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which places hold what an earlier place of their batch holds, bool [rows]."""
        found = np.zeros(len(rows), bool)
        twice = np.bincount(rows, minlength=len(self._hashes[0]))[rows] > 1
        for codes in (np.where(twice, rows, -1), *(column[rows] for column in self._codes)):
            places = np.flatnonzero(codes >= 0)  # most rows are like no other: the sort is of few
            together = batches[places] * (int(codes.max(initial=0)) + 1) + codes[places]
            order = np.argsort(together, kind="stable")
            same = together[order][1:] == together[order][:-1]
            found[places[order[1:][same]]] = True
        return found

    def keys(self, row: int) -> Keys:
        """What a row may not share with another of its batch."""
        return tuple(int(column[row]) for column in self._hashes)


class _Layout:
    """The draws of one pass while they change places.

    before: rows of the pass before that share the first batch. end_only: instead of batches, the first
    ``end_only`` places are one batch and all others are free.
    """

    def __init__(self, order: Order, rows: Rows, start: int, before: Rows, end_only: int = 0) -> None:
        self.rows = rows.copy()
        self._order, self._before = order, before
        places = np.arange(start, start + len(rows))
        self._batches = places // order._batch - start // order._batch
        if end_only:
            self._batches = (np.arange(len(rows)) >= end_only).astype(np.int64)
        self._free = 1 if end_only else -1  # a batch without a rule
        self._held: dict[int, list[Counter[int]]] = {}
        self._saturated: set[tuple[int, int]] = set()

    def mend(self, movable: int) -> int:
        """Let draws that break the rule change places, among the first ``movable``; how many still do."""
        number = len(self._before)
        rows = np.concatenate([self._before, self.rows])
        batches = np.concatenate([np.zeros(number, np.int64), self._batches])
        broken = self._order._repeated(rows, batches)[number:] & (self._batches != self._free)
        relaxed = 0
        for place in np.flatnonzero(broken):
            place = int(place)
            if not self._clashes(place):
                continue  # the one that it was like has gone meanwhile
            if place >= movable or not self._move(place, movable):
                relaxed += 1
        return relaxed

    def _counts(self, batch: int) -> list[Counter[int]]:
        """How often each key is in a batch, by the way of being alike."""
        if batch not in self._held:
            rows = self.rows[
                np.searchsorted(self._batches, batch) : np.searchsorted(self._batches, batch + 1)
            ]
            if batch == 0:
                rows = np.concatenate([self._before, rows])
            self._held[batch] = [Counter(column[rows].tolist()) for column in self._order._hashes]
        return self._held[batch]

    def _clashes(self, place: int) -> bool:
        counts = self._counts(int(self._batches[place]))
        keys = self._order.keys(self.rows[place])
        return any(count[key] > 1 for count, key in zip(counts, keys, strict=True))

    def _move(self, place: int, movable: int) -> bool:
        """Change places with a draw of another batch, where both then keep the rule."""
        here, keys = int(self._batches[place]), self._order.keys(self.rows[place])
        if any((way, key) in self._saturated for way, key in enumerate(keys)):
            return False
        tries, n_batches = 0, int(self._batches[-1]) + 1
        full = [True] * len(keys)
        for step in range(1, n_batches):
            there = (here + step) % n_batches
            held = self._held_keys(there, keys)
            full = [every and has for every, has in zip(full, held, strict=True)]
            if any(held):
                tries += 1
            else:
                first, last = np.searchsorted(self._batches[:movable], [there, there + 1])
                for other in range(int(first), int(last)):
                    tries += 1
                    if self._may_come(other, here, place):
                        self._swap(place, other)
                        return True
            if tries > _MOST_TRIES:
                return False
        self._saturated |= {(way, keys[way]) for way, every in enumerate(full) if every}
        return False

    def _held_keys(self, batch: int, keys: Keys) -> list[bool]:
        if batch == self._free:
            return [False] * len(keys)
        return [count[key] > 0 for count, key in zip(self._counts(batch), keys, strict=True)]

    def _may_come(self, other: int, here: int, leaving: int) -> bool:
        """Whether the draw at ``other`` is unlike all of batch ``here`` but the one that leaves it."""
        gone = self._order.keys(self.rows[leaving])
        ours = self._order.keys(self.rows[other])
        counts = zip(self._counts(here), ours, gone, strict=True)
        return all(count[key] - (key == left) <= 0 for count, key, left in counts)

    def _swap(self, place: int, other: int) -> None:
        for at, sign in ((place, -1), (other, -1), (place, 1), (other, 1)):
            if sign == 1 and at == place:
                self.rows[place], self.rows[other] = self.rows[other], self.rows[place]
            self._add(at, sign)

    def _add(self, place: int, sign: int) -> None:
        batch = int(self._batches[place])
        if batch == self._free:
            return
        for count, key in zip(self._counts(batch), self._order.keys(self.rows[place]), strict=True):
            count[key] += sign


def _codes_of_repeated(column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """A small number for each value that comes more than once, -1 for the others, int64 [rows]; None where
    no value does."""
    ordered = np.sort(column)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return None
    at = np.minimum(np.searchsorted(repeated, column), len(repeated) - 1)
    return np.where(repeated[at] == column, at, -1)
