"""A process that ends when the one that asked for it was killed: nobody would take its result, and the next
one asked for the same would write to the same folder."""

import os
import threading
import time

import psutil

PARENT_VARIABLE = "CLIPCOV_PARENT"  # environment variable: the pid of the process that asked

PARENT_SECONDS = 2.0  # between two looks


def end_with_parent() -> None:
    """End this process when the one that asked for it, or the one that started it, is gone.

    Does nothing where nobody asked: ``PARENT_VARIABLE`` is not set.
    """
    asked_by, started_by = os.environ.get(PARENT_VARIABLE), os.getppid()
    if asked_by is None:
        return
    try:
        parent = psutil.Process(int(asked_by))
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch() -> None:
        while not _has_ended(parent) and os.getppid() == started_by:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _has_ended(process: psutil.Process) -> bool:
    """A zombie has: one that nobody collects is listed as long as its container lives."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
