"""How much the subsets of several methods have in common."""

from collections.abc import Mapping
from itertools import combinations

import polars as pl

OVERLAP_SCHEMA = {"method": pl.String, "other": pl.String, "jaccard": pl.Float64, "common": pl.Int64}


def overlap(subsets: Mapping[str, pl.Series], pool: int) -> tuple[pl.DataFrame, float]:
    """Compare subsets of one fraction.

    Args:
        subsets: method -> uids.
        pool: number of pairs in the pool.

    Returns:
        (table of `OVERLAP_SCHEMA`, every ordered pair of different methods once; what two independent random
        subsets of the first one's size are expected to share, as a Jaccard index).
    """
    rows = []
    for one, other in combinations(subsets, 2):
        common = int(subsets[one].is_in(subsets[other].implode()).sum())
        union = len(subsets[one]) + len(subsets[other]) - common
        for left, right in ((one, other), (other, one)):
            rows.append(
                {
                    "method": left,
                    "other": right,
                    "jaccard": common / union if union else 0.0,
                    "common": common,
                }
            )
    share = len(next(iter(subsets.values()))) / pool
    return pl.DataFrame(rows, schema=OVERLAP_SCHEMA), share / (2 - share)
