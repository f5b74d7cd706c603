"""The one error that is the user's to mend: it is shown as a single line, with exit code 2."""

import difflib
from pathlib import Path

from clipcov_pipeline.redaction import redacted


class InputError(ValueError):
    """Something the user gave is unusable.

    The message names the thing, the value found, the value expected and what to do, in one line.
    Addresses in it are shown without what is secret in them.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(part) if isinstance(part, str) else part for part in args))


def near_file(path: Path) -> str:
    """Return ", did you mean NAME?" where the folder of a file that is missing has one of a similar name."""
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
