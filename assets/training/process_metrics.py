"""CPU and memory of a training and its data workers, and of the GPUs, as MLflow's system metrics."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SECONDS = 10.0  # between two points

Log = Callable[[dict[str, float], int], None]
"""Takes metrics and the number of the point."""


@contextmanager
def logged_process_metrics(log: Log, seconds: float = SECONDS) -> Iterator[None]:
    """Log this process's and its children's use every ``seconds``, and once more at the end."""
    ended = threading.Event()
    meter = ProcessMeter()

    def watch() -> None:
        number = 0
        while True:
            last = ended.wait(seconds)
            with suppress(Exception):  # a point that cannot be had or logged is no reason to lose a training
                log(meter.read(), number)
            if last:
                return
            number += 1

    thread = threading.Thread(target=watch, name="process-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=seconds)


class ProcessMeter:
    """Reads what a process and its children use since the last reading."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._gpus = _gpu_monitor()
        self._seconds: dict[int, float] = {}
        self._read_at = time.monotonic()
        self.read()

    def read(self) -> dict[str, float]:
        """Return ``system/training_*``: CPU in percent of one core, resident memory in megabytes; GPUs.

        Memory that processes share counts once for each of them.
        """
        import psutil

        memory, used, seconds = 0, 0.0, {}
        for process in (self._process, *self._process.children(recursive=True)):
            with suppress(psutil.Error):  # it has ended just now
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
                used += seconds[process.pid] - self._seconds.get(process.pid, 0.0)
                memory += process.memory_info().rss
        now = time.monotonic()
        elapsed, self._read_at, self._seconds = max(now - self._read_at, 1e-3), now, seconds
        return {
            "system/training_cpu_percentage": 100 * used / elapsed,
            "system/training_memory_megabytes": memory / 1e6,
            "system/training_processes": len(seconds),
            **self._gpu_metrics(),
        }

    def _gpu_metrics(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        self._gpus.collect_metrics()
        found = {f"system/{name}": float(value) for name, value in self._gpus.aggregate_metrics().items()}
        self._gpus.clear_metrics()
        return found


def _gpu_monitor() -> Any:
    """Return MLflow's monitor of NVIDIA GPUs; None where there are none, or nvidia-ml-py is not installed."""
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return GPUMonitor()
    except (ImportError, RuntimeError):
        return None
