"""Starts trainings from a process that has everything imported: that takes longer than many steps do.

``python -m assets.training.server`` forks a training for each line it is sent, a JSON object of environment
variables, and answers with its exit code (below 0: a signal) when it has ended.
"""

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from assets.training.worker import main
from clipcov_pipeline.training.launch import SLEEPING_THREADS

FORK = multiprocessing.get_context("fork")

TERMINATION_SECONDS = 20.0  # for a training to end by itself once it was interrupted; Pipes' own default

LOOK_UP_SECONDS = 1.0


def serve() -> None:
    """Fork trainings one after another until stdin is closed."""
    import mlflow  # noqa: F401
    import open_clip_train.main  # noqa: F401

    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the training
    for line in sys.stdin:
        # a process of multiprocessing ends without taking down all that was imported, which takes 2 s
        training = FORK.Process(target=_train, args=(json.loads(line), interrupted))
        training.start()
        training.join()
        sys.stdout.write(f"{training.exitcode}\n")
        sys.stdout.flush()


def _train(environment: Mapping[str, str], interrupted: Any) -> None:
    signal.signal(signal.SIGINT, interrupted)
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(environment)
    main()


class TrainServer:
    """The server's other side: started with the first training, it ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def train(self, environment: Mapping[str, str]) -> int:
        """Run one training, `worker.main`, in a process of its own; return its exit code.

        Raises:
            RuntimeError: the server itself has ended.
            BaseException: what interrupted the wait, after the training has ended, too.
        """
        server = self._server()
        assert server.stdin is not None and server.stdout is not None  # noqa: PT018
        try:
            server.stdin.write(json.dumps(dict(environment)) + "\n")
            server.stdin.flush()
            # a signal that comes just before a read does not end it: look up now and then
            while not select.select([server.stdout], [], [], LOOK_UP_SECONDS)[0]:
                pass
            answer = server.stdout.readline()
        except BaseException:
            self.close()
            raise
        if not answer:
            raise RuntimeError(f"the process that starts trainings ended with code {server.wait()}")
        return int(answer)

    def close(self) -> None:
        """End the server, and a training that is at work: by an interruption, or else by force."""
        if self._process is None:
            return
        server, self._process = self._process, None
        trainings = []
        if server.poll() is None:
            process = psutil.Process(server.pid)
            process.suspend()  # it starts none meanwhile
            trainings = process.children()
        server.kill()
        server.communicate()
        for training in trainings:
            with suppress(psutil.NoSuchProcess):
                training.send_signal(signal.SIGINT)
        _, still_at_work = psutil.wait_procs(trainings, TERMINATION_SECONDS)
        for training in still_at_work:
            training.kill()

    def _server(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-m", "assets.training.server"]
            pipe = subprocess.PIPE
            environment = {**SLEEPING_THREADS, **os.environ}
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        return self._process


if __name__ == "__main__":
    serve()
