"""Seconds, CPU seconds and memory of the phases of a run."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EVERY_S = 0.02


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (resident), in bytes; all resident memory where Linux is
    not."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


class Phases:
    """Records phases by name.

    Attributes:
        seconds, cpu_seconds: of each phase, in the order begun (a name used twice adds up).
        anonymous_bytes: largest anonymous resident memory seen in each phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.anonymous_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what runs inside as one phase."""
        done = threading.Event()
        peak = [anonymous_bytes()]

        def watch() -> None:
            while not done.wait(_EVERY_S):
                peak[0] = max(peak[0], anonymous_bytes())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu
            done.set()
            watcher.join()
            self.anonymous_bytes[name] = max(self.anonymous_bytes.get(name, 0), peak[0], anonymous_bytes())
