"""The process that forks trainings. These wait for their settings, which come through a pipe, or never."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from assets.training.server import TrainServer
from assets.training.worker import SPEC_VARIABLE
from clipcov_pipeline.training.parent import PARENT_VARIABLE
from lab import still_there

ENDS_AT_ONCE: dict[str, str] = {}  # a training that is not told what to train


@pytest.fixture(scope="module")
def server() -> Iterator[TrainServer]:
    server = TrainServer()
    yield server
    server.close()


@pytest.fixture
def waits(tmp_path: Path) -> dict[str, str]:
    """The environment of a training that waits for ever for its settings."""
    os.mkfifo(tmp_path / "spec.json")
    return {PARENT_VARIABLE: str(os.getpid()), SPEC_VARIABLE: str(tmp_path / "spec.json")}


def servers() -> list[psutil.Process]:
    """The servers this process has, and not what else other test files have left: compilers, daemons."""
    processes = psutil.process_iter(["ppid", "cmdline"])  # None for one that has just ended
    mine = [process for process in processes if process.info["ppid"] == os.getpid()]
    return [child for child in mine if "assets.training.server" in (child.info["cmdline"] or [])]


def trainings() -> list[psutil.Process]:
    return [training for server in servers() for training in server.children()]


def once_it_is_there(act: Callable[[psutil.Process], None]) -> None:
    """Do something to the training as soon as there is one."""

    def wait_and_act() -> None:
        while not (found := trainings()):
            time.sleep(0.05)
        act(found[0])

    threading.Thread(target=wait_and_act, daemon=True).start()


def test_one_server_starts_all_and_tells_how_they_end(server: TrainServer, waits: dict[str, str]) -> None:
    before = servers()  # of other test files
    assert server.train(ENDS_AT_ONCE) == 1
    [process] = [one for one in servers() if one not in before]
    once_it_is_there(lambda training: training.kill())  # as the kernel does when memory is short
    assert server.train(waits) == -signal.SIGKILL
    assert server.train(ENDS_AT_ONCE) == 1
    assert [process] == [one for one in servers() if one not in before]


def ignores_interruptions(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    [ignored] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(ignored, 16) & (1 << (signal.SIGINT - 1)))


def test_an_interruption_ends_the_training(server: TrainServer, waits: dict[str, str]) -> None:
    seen = []
    alone = {name: value for name, value in waits.items() if name != PARENT_VARIABLE}  # it ends by this alone

    def interrupt(training: psutil.Process) -> None:
        seen.append(training)
        while ignores_interruptions(training):  # as its server does, until it has set that right
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    once_it_is_there(interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.train(alone)
    assert still_there(seen) == []
    assert server.train(ENDS_AT_ONCE) == 1  # and the next one is started as ever


def test_a_server_that_ends_is_named_and_replaced(server: TrainServer, waits: dict[str, str]) -> None:
    seen = []

    def kill_the_server(training: psutil.Process) -> None:
        time.sleep(1)  # the training itself is at work
        seen.append(training)
        (training.parent() or training).kill()

    once_it_is_there(kill_the_server)
    with pytest.raises(RuntimeError, match="the process that starts trainings ended with code -9"):
        server.train(waits)
    assert still_there(seen) == []  # the next training of the arm writes to the same folder
    assert server.train(ENDS_AT_ONCE) == 1
