"""A process ends with the one that asked for it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clipcov_pipeline.training.parent import PARENT_VARIABLE

WATCHES = """
import time
from clipcov_pipeline.training import parent
parent.PARENT_SECONDS = 0.05
parent.end_with_parent()
print("watching", flush=True)
time.sleep(600)
"""


@contextmanager
def started(code: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run code that first prints a line; it is at work inside the block."""
    environment = {name: value for name, value in os.environ.items() if name != PARENT_VARIABLE} | variables
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("collected", [True, False])
def test_it_ends_when_that_one_was_killed(collected: bool) -> None:
    """Collected or not: a container whose first process collects no orphans keeps them as zombies."""
    with (
        started("import time; print(1, flush=True); time.sleep(600)") as parent,
        started(WATCHES, **{PARENT_VARIABLE: str(parent.pid)}) as child,
    ):
        time.sleep(0.5)  # several looks
        assert child.poll() is None
        parent.kill()
        if collected:
            parent.wait()
        assert child.wait(timeout=60) == 1


def test_it_stays_where_nobody_asked() -> None:
    with started(WATCHES) as child:
        time.sleep(0.5)
        assert child.poll() is None
