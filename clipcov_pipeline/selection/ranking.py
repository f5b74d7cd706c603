"""``rank``: one signature for ClipCov and every baseline."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.filter_parameters import filters_anything
from clipcov_pipeline.selection.methods import as_random, budget_count, validate_method
from clipcov_pipeline.selection.pool import Pool


@dataclass(frozen=True)
class Ranking:
    """Pool rows in the order a method takes them.

    Attributes:
        rows: int64 [m], distinct positions in the pool.
        gains: float64 [m], what each brought when it was taken (for a baseline: its score).
        passed: how many pairs of the pool pass each filter (`filters.passing`), and all of them ("all").
    """

    rows: np.ndarray
    gains: np.ndarray
    passed: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def rank(
    pool: Pool,
    method: str = "clipcov",
    budget: float | int | None = None,
    *,
    threads: int | None = None,
    **params: Any,
) -> Ranking:
    """Rank the pool, or the first ``budget`` of it.

    The ranking at a smaller budget is a prefix of the one at a larger (near-ties, gains within 1e-6, may
    swap; ``redundancy="budget_share"`` ranks for one budget and does not nest). The result does not depend
    on ``threads``.

    Args:
        pool: the pairs to choose from.
        method: one of ``METHODS``.
        budget: an int count, a float fraction of the whole pool (``budget_count``), or None for everything.
            Filters do not change what a fraction stands for. (``external`` without ``fill``: its list.)
        threads: threads over latent classes; all processors when None.
        **params: of the method, JSON-able, checked by ``validate_method``: `methods` says what they mean.

    Raises:
        InputError: unknown method or parameter, a value out of range, a budget the pool cannot give, a
            column the method needs and the pool has not.
    """
    method, filled = as_random(method, validate_method(method, params))
    count = budget_count(budget, len(pool))
    filters = filled.pop("filters")
    rejected = filters.pop("rejected")
    if method == "external":
        from clipcov_pipeline.selection.external import check_listed

        # of the whole pool, where a list has to have some; a part of it may have none
        check_listed(pool, filled, None if budget is None else count)
    if not filters_anything(filters):
        return _rank(pool, method, count, filled, threads)
    passing, passed = _passing(pool, filters, rejected, None if budget is None else count)
    parts = [passing] if rejected == "drop" else [passing, rows_apart(passing, len(pool))]
    ranking = _rank_in_turn(pool, method, parts, count, filled, threads)
    if budget is not None:
        _check_enough(len(ranking), count)
    return replace(ranking, passed=passed)


def _passing(
    pool: Pool, filters: dict[str, Any], rejected: str, count: int | None
) -> tuple[np.ndarray, dict[str, int]]:
    """What `passing_rows` gives, where that is enough to rank (None: any) or the others are ranked, too."""
    from clipcov_pipeline.selection.filters import passing_rows

    passing, passed = passing_rows(pool, filters)
    each = ", ".join(f"{name} {number:,}" for name, number in passed.items() if name != "all")
    if rejected == "drop" and len(passing) == 0:
        raise InputError(
            f"pool: found 0 pairs after the filters ({each}), expected at least 1; loosen the filters"
        )
    if rejected == "drop" and count is not None and count > len(passing):
        raise InputError(
            f"budget: found {count}, expected at most {len(passing)}, which pass the filters ({each}); "
            "loosen them, ask for fewer, or put what they reject last (filters.rejected: last)"
        )
    return passing, passed


def _check_enough(n_ranked: int, count: int) -> None:
    """A list may have less than was asked for, when the filters are through with it."""
    if n_ranked < count:
        raise InputError(
            f"budget: found {count}, expected at most {n_ranked}, which are listed and pass the filters;"
            " ask for fewer, or have the rest drawn (fill: random)"
        )


def rows_apart(rows: np.ndarray, n: int) -> np.ndarray:
    """The others of ``n`` rows (int64, ascending)."""
    left = np.ones(n, np.bool_)
    left[rows] = False
    return np.flatnonzero(left)


def _rank_in_turn(
    pool: Pool, method: str, parts: list[np.ndarray], count: int, params: dict[str, Any], threads: int | None
) -> Ranking:
    """Rank each part of the pool on its own, one after the other, until ``count`` are ranked."""
    found = []
    for rows in parts:
        n = min(count - sum(len(done.rows) for done in found), len(rows))
        if n > 0 or len(parts) == 1:  # an empty pool says so itself
            with pool.take(rows) as part:
                inner = _rank(part, method, n, params, threads)
            found.append(Ranking(rows[inner.rows], inner.gains))
    return Ranking(
        np.concatenate([done.rows for done in found]), np.concatenate([done.gains for done in found])
    )


def _rank(pool: Pool, method: str, count: int, params: dict[str, Any], threads: int | None) -> Ranking:
    if method == "clipcov":
        from clipcov_pipeline.selection.clipcov import rank_clipcov

        rows, gains = rank_clipcov(pool, count, params, threads)
    else:
        from clipcov_pipeline.selection.baselines import BASELINES

        rows, gains = BASELINES[method](pool, count, params, threads)
    return Ranking(rows.astype(np.int64), gains.astype(np.float64))
