"""Filters in front of any method: pairs that are not to be ranked at all."""

from typing import Any

import numpy as np

from clipcov_pipeline.selection.pool import Pool


def passing_rows(pool: Pool, filters: dict[str, Any]) -> np.ndarray:
    """Pool rows (int64, ascending) that pass every filter.

    Args:
        filters: ``min_similarity`` (least <v_i,t_i>), ``drop_duplicate_images`` and
            ``drop_duplicate_captions`` (keep the copy of largest pair similarity among those that passed so
            far), ``caption_length``
            ([shortest, longest] in characters); as ``validate_method`` fills them.

    Raises:
        InputError: a filter reads a column the pool has not.
    """
    passing = np.ones(len(pool), np.bool_)
    if filters["min_similarity"] is not None:
        passing &= pool.pair_similarity() >= filters["min_similarity"]
    if filters["caption_length"] is not None:
        length = pool.column("caption_length", "filter caption_length")
        passing &= (length >= filters["caption_length"][0]) & (length <= filters["caption_length"][1])
    for name, column in (
        ("drop_duplicate_images", "image_hash"),
        ("drop_duplicate_captions", "caption_hash"),
    ):
        if filters[name]:
            rows = np.flatnonzero(passing)
            # best first, ties to the lower row: np.unique returns the first place of each value
            rows = rows[np.argsort(-pool.pair_similarity()[rows], kind="stable")]
            _, first = np.unique(pool.column(column, f"filter {name}")[rows], return_index=True)
            passing[:] = False
            passing[rows[first]] = True
    return np.flatnonzero(passing)
