"""Progress of long work as text: a bar, the count, the rate and the time left, not more often than asked."""

import time
from collections.abc import Callable

FULL_BLOCK, EMPTY_BLOCK = "■", "□"
WIDTH = 20


class Progress:
    """Count work and report it.

    ``total`` may be None where it is not known. ``report`` takes one line; a terminal may draw such lines in
    place (they start with a block character), a log keeps them as lines.
    """

    def __init__(
        self, report: Callable[[str], None], total: int | None, unit: str, every: float = 5.0
    ) -> None:
        self.report = report
        self.total = total
        self.unit = unit
        self.every = every
        self.done = 0
        self._started = time.monotonic()
        self._last = self._started

    def add(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.to(self.done + n)

    def to(self, done: int) -> None:
        """Set the count; report when the last report is long enough ago, and at the end."""
        self.done = done
        now = time.monotonic()
        if now - self._last >= self.every or (done == self.total and self._last > self._started):
            self._last = now
            self.report(self.text())

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(time.monotonic() - self._started, 1e-9)

    def text(self) -> str:
        """Return the line: ``■■■■□□□□  42%  5,200/12,382 images  850/s  8 s left``."""
        if not self.total:
            return f"{EMPTY_BLOCK * WIDTH}  {self.done:,} {self.unit}  {self.rate:,.0f}/s"
        share = min(self.done / self.total, 1.0)
        full = int(share * WIDTH)
        left = max(self.total - self.done, 0) / self.rate if self.done else float("inf")
        bar = FULL_BLOCK * full + EMPTY_BLOCK * (WIDTH - full)
        eta = f"  {left:,.0f} s left" if left < float("inf") else ""
        return f"{bar} {share:4.0%}  {self.done:,}/{self.total:,} {self.unit}  {self.rate:,.0f}/s{eta}"
