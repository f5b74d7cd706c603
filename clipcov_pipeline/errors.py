"""The one error that is the user's to mend: it is shown as a single line, with exit code 2."""

import difflib
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is unusable.

    The message names the thing, the value found, the value expected and what to do, in one line.
    """


def near_file(path: Path) -> str:
    """Return ", did you mean NAME?" where the folder of a file that is missing has one of a similar name."""
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
