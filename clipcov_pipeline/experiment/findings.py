"""One line of what ``clipcov check`` has found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the preflight. ``missing`` keeps the experiment from running; the others do not."""

    level: Literal["ok", "note", "warning", "missing"]
    subject: str
    text: str
