"""The tidy table of diagnostics: one row a quantity."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

SCHEMA = {
    "scope": pl.String,  # overall, class, ranking
    "latent_class": pl.Int64,  # null but for scope class
    "samples": pl.Int64,  # the first so many of the ranking; null but for scope ranking
    "quantity": pl.String,
    "value": pl.Float64,  # of the subset; null where it is not defined, and the note says why
    "pool": pl.Float64,  # the same of the whole pool, where that makes sense
    "random_mean": pl.Float64,  # the same of random subsets of the same size
    "random_std": pl.Float64,
    "note": pl.String,
}


class Undefined(ValueError):
    """A quantity that has no value here; the message is the reason, without "not defined, because"."""


@dataclass
class QuantityRows:
    """Rows of `SCHEMA` as they come."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        quantity: str,
        value: float | None,
        *,
        pool: float | None = None,
        random: Sequence[float | None] = (),
        scope: str = "overall",
        latent_class: int | None = None,
        samples: int | None = None,
        note: str = "",
    ) -> None:
        """Add a row; a value that is None or not finite needs a note that begins with the reason."""
        drawn = [r for r in random if r is not None and np.isfinite(r)]
        if value is None or not np.isfinite(value):
            value, note = None, f"not defined, because {note or 'the value is not finite'}"
        self.rows.append(
            {
                "scope": scope,
                "latent_class": latent_class,
                "samples": samples,
                "quantity": quantity,
                "value": value,
                "pool": pool,
                "random_mean": float(np.mean(drawn)) if drawn else None,
                "random_std": float(np.std(drawn, ddof=1)) if len(drawn) > 1 else None,
                "note": note,
            }
        )

    def frame(self) -> pl.DataFrame:
        """Return the rows as a polars frame."""
        return pl.DataFrame(self.rows, schema=SCHEMA)
