"""Opens a file of a source for reading, wherever it lies."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def open_shard(url: str, storage_options: dict | None, *, seekable: bool = False) -> Any:
    """Return a context manager of a shard opened for reading bytes from front to back; raises OSError.

    seekable: for reading here and there; a shard of a web server without ranges is then copied first.
    """
    if "://" not in url:
        return Path(url).open("rb")
    import fsspec

    options = storage_options or {}
    if not url.startswith(("http://", "https://")) or _answers_ranges(url):
        return fsspec.open(url, "rb", **options)
    from aiohttp import ClientTimeout

    # as one answer, however long it takes, as long as bytes come
    whole = {"block_size": 0, "client_kwargs": {"timeout": ClientTimeout(total=None, sock_read=300)}}
    stream = fsspec.open(url, "rb", **{**whole, **options})
    return _copied(stream) if seekable else stream


def open_beside(url: str, name: str, storage_options: dict | None) -> Any:
    """As `open_shard`, of a file named relative to the one at ``url``."""
    return open_shard(f"{url.rpartition('/')[0]}/{name}", storage_options)


@contextmanager
def _copied(stream: Any) -> Iterator[Any]:
    with stream as source, tempfile.TemporaryFile() as copy:
        while data := source.read(1 << 20):
            copy.write(data)
        copy.seek(0)
        yield copy


_RANGES: dict[str, bool] = {}  # by server


def _answers_ranges(url: str) -> bool:
    """Whether a web server says that it answers range requests, or does not let itself be asked."""
    server = "/".join(url.split("/")[:3])
    if server not in _RANGES:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=30) as answer:
                _RANGES[server] = answer.headers.get("Accept-Ranges") == "bytes"
        except OSError:
            return True
    return _RANGES[server]
