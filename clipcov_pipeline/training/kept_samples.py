"""Keeps a small subset in memory: open_clip_train reads its tars and tokenizes its captions in every pass.

On a CPU that is much of what the data of a small model costs, and a small subset is passed over many times.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

KEPT_BYTES = 2**28  # of all shards of a subset together; each data-loading process keeps those that it reads

RawSample = dict[str, Any]
"""As WebDataset reads it: a value by suffix."""

ReadShards = Callable[[Iterable[RawSample]], Iterable[Any]]


@contextmanager
def kept_in_memory(shards: Sequence[str]) -> Iterator[None]:
    """Inside the block open_clip_train reads each of these shards, and tokenizes each caption, once.

    What is trained on is the same, in an order drawn in the same way, and varied anew in each pass. Shards
    that are no local files, or hold more than `KEPT_BYTES`, are read again in each pass, as ever.
    """
    if not _small(shards):
        yield
        return
    from open_clip_train import data, main

    read, get_data = data.tarfile_to_samples_nothrow, main.get_data

    def get_data_once(*args: Any, tokenizer: Any, **kwargs: Any) -> Any:
        return get_data(*args, tokenizer=cache(tokenizer), **kwargs)

    data.tarfile_to_samples_nothrow, main.get_data = read_once(read), get_data_once
    try:
        yield
    finally:
        data.tarfile_to_samples_nothrow, main.get_data = read, get_data


def read_once(read: ReadShards) -> ReadShards:
    """Return a stage of a WebDataset pipeline that yields what ``read`` does, from memory when asked again.

    Shards are told apart by their ``url``. A sample is a new dictionary each time, of the same values:
    the stages that follow put theirs into it.
    """
    kept: dict[str, list[RawSample]] = {}

    def samples(shards: Iterable[RawSample]) -> Iterator[RawSample]:
        for shard in shards:
            url = shard["url"]
            if url not in kept:
                kept[url] = list(read([shard]))
            yield from map(dict, kept[url])

    return samples


def _small(shards: Sequence[str]) -> bool:
    files = [Path(shard) for shard in shards]
    return all(file.is_file() for file in files) and sum(file.stat().st_size for file in files) <= KEPT_BYTES
