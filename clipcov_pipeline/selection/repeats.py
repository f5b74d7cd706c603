"""Repeats of a caption or of an image lower a pair's base score, so that copies do not fill a small budget.

F rewards a pair for being like its class, and nothing is more like a class than what is often repeated in
it: a pool with a thousand copies of one caption would give it a thousand places. With a penalty the j-th best
copy stands j - 1 steps lower (docs/evidence.md, ClipCov+).
"""

import numpy as np

from clipcov_pipeline.selection.pool import Pool

COLUMNS = ("image_hash", "caption_hash")


def repeat_term(pool: Pool, base: np.ndarray, penalty: float) -> np.ndarray:
    """What is to be added to the base scores for repeats: not above 0.

    Args:
        base: float64 [N], in sorted order.
        penalty: how much each better pair with the same caption, and each with the same image, costs, in
            standard deviations of ``base`` inside a latent class.

    Returns:
        float64 [N], in sorted order.

    Raises:
        InputError: the pool has no ``image_hash`` or no ``caption_hash``.
    """
    better = np.zeros(len(pool), np.int64)
    for name in COLUMNS:
        group = pool.column(name, "clipcov repeat_penalty")[pool.order]
        better += places(base, group, pool.order)
    return -penalty * deviation(pool, base) * better


def places(values: np.ndarray, group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many of the same group have a larger value (or an equal one and a lower row): int64 [n]."""
    order = np.lexsort((rows, -values, group))
    grouped = group[order]
    first = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    lengths = np.diff(np.r_[first, len(order)])
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) - np.repeat(first, lengths)
    return found


def deviation(pool: Pool, base: np.ndarray) -> float:
    """Root mean square distance of the base scores (sorted order) from their class's mean."""
    classes = pool.latent_class[pool.order]
    means = np.bincount(classes, base, pool.n_classes) / np.maximum(pool.class_sizes, 1)
    return float(np.sqrt(np.mean((base - means[classes]) ** 2)))
