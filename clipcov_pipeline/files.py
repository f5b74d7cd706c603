"""Files that are whole or not there: the one way in which anything that is read again is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A hidden temporary path beside `path`, renamed to it when the block ends well.

    A full disk or a killed process leaves what was there before, or nothing. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.part")  # two processes may write the same file
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_at_once(path: Path, text: str) -> None:
    """Write a text as UTF-8, all of it or nothing."""
    with written_at_once(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
