"""Threads over latent classes: the classes are independent, so the result never depends on their number."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np

S = TypeVar("S")
T = TypeVar("T")
# rows a task should have, so that thousands of tiny classes do not cost thousands of calls
_TASK_ROWS = 8192


def thread_count(threads: int | None) -> int:
    """``threads``, or as many as there are processors this process may use."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tasks(sizes: np.ndarray, rows: int = _TASK_ROWS) -> list[np.ndarray]:
    """Non-empty classes (int64) in groups of about ``rows``, the largest class first."""
    classes = np.argsort(-sizes, kind="stable")
    classes = classes[sizes[classes] > 0]
    group = np.cumsum(sizes[classes]) // rows
    return np.split(classes, np.flatnonzero(np.diff(group)) + 1)


def over_classes(
    work: Callable[[np.ndarray], T], sizes: np.ndarray, threads: int | None = None, rows: int = _TASK_ROWS
) -> list[T]:
    """Call ``work`` on groups of classes that cover all non-empty ones; it releases the GIL.

    Work that calls BLAS is to be done under ``single_blas``: the threads here are the parallelism.
    """
    groups = tasks(sizes, rows)
    workers = min(thread_count(threads), len(groups))
    if workers == 1:
        return [work(group) for group in groups]
    with ThreadPoolExecutor(workers) as executor:
        return list(executor.map(work, groups))


def single_blas() -> AbstractContextManager:
    """BLAS held to one thread, inside."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def over_stream(work: Callable[[S], T], items: Iterable[S], threads: int | None = None) -> Iterator[T]:
    """``work`` of each item, in order, by several threads that never run far ahead of who reads the results.

    BLAS is held to one thread meanwhile.
    """
    workers = thread_count(threads)
    with single_blas(), ThreadPoolExecutor(workers) as executor:
        pending: deque = deque()
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
