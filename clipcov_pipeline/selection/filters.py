"""Filters in front of any method: pairs that are not to be ranked at all."""

from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import captions_of
from clipcov_pipeline.selection.filter_files import language_model, names_in, read_rows
from clipcov_pipeline.selection.filter_parameters import score_column
from clipcov_pipeline.selection.pool import Pool


def passing_rows(pool: Pool, filters: dict[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """Pool rows that pass every filter, and how many pass each.

    Args:
        filters: as `filter_parameters.filters` fills them. Each is asked of the whole pool, but for the
            duplicates, of which the copy of largest pair similarity among those that passed so far stays.

    Returns:
        int64 [m], ascending; the number of pairs that pass a filter, whatever the others say (for duplicates:
        that are left after it), by its name, and that pass all of them, by "all".

    Raises:
        InputError: a filter reads a column the pool has not, or a file that it cannot use.
    """
    masks = {
        name: mask(pool, filters[name]) for name, mask in _MASKS.items() if filters.get(name) is not None
    }
    passing = np.logical_and.reduce([np.ones(len(pool), np.bool_), *masks.values()])
    passed = {name: int(mask.sum()) for name, mask in masks.items()}
    for name, column in (
        ("drop_duplicate_images", "image_hash"),
        ("drop_duplicate_captions", "caption_hash"),
    ):
        if filters[name]:
            passing = _first_copies(pool, passing, pool.column(column, f"filter {name}"))
            passed[name] = int(passing.sum())
    rows = np.flatnonzero(passing)
    return rows, {**passed, "all": len(rows)}


def _first_copies(pool: Pool, passing: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(passing)
    # best first, ties to the lower row: np.unique returns the first place of each value
    rows = rows[np.argsort(-pool.pair_similarity()[rows], kind="stable")]
    _, first = np.unique(values[rows], return_index=True)
    left = np.zeros(len(passing), np.bool_)
    left[rows[first]] = True
    return left


def _min_similarity(pool: Pool, least: float) -> np.ndarray:
    return pool.pair_similarity() >= least


def _caption_length(pool: Pool, bounds: list[int]) -> np.ndarray:
    length = pool.column("caption_length", "filter caption_length")
    return (length >= bounds[0]) & (length <= bounds[1])


def _clip_score(pool: Pool, settings: dict[str, Any]) -> np.ndarray:
    """By a share as DataComp has it: all that score as the pair at place floor(share * N), the best at 0."""
    arch, threshold = settings["arch"], settings["threshold"]
    score = pool.pair_similarity() if arch is None else pool.column(score_column(arch), "filter clip_score")
    if threshold is None:
        place = int(len(score) * settings["share"])
        best_first = -np.sort(-np.nan_to_num(score, nan=-np.inf))  # where there is no score, last
        threshold = -np.inf if place == len(score) else best_first[place]
    return score >= threshold


def _basic(pool: Pool, bounds: dict[str, Any]) -> np.ndarray:
    passing = np.ones(len(pool), np.bool_)
    for bound, column in (("min_words", "caption_words"), ("min_characters", "caption_length")):
        if bounds[bound] is not None:
            passing &= pool.column(column, "filter basic") >= bounds[bound]
    if bounds["min_side"] is None and bounds["max_aspect"] is None:
        return passing
    sides = [pool.column(name, "filter basic").astype(np.float64) for name in ("width", "height")]
    least, most = np.minimum(*sides), np.maximum(*sides)
    if bounds["min_side"] is not None:
        passing &= least >= bounds["min_side"]
    if bounds["max_aspect"] is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            passing &= most / least <= bounds["max_aspect"]
    return passing


def _language(pool: Pool, settings: dict[str, Any]) -> np.ndarray:
    language_of = language_model(settings["model"])
    captions = pool.column("caption", "filter language")
    spoken = (language_of(text) in settings["keep"] for text in captions_of(captions))
    return np.fromiter(spoken, np.bool_, len(captions))


def _text_based(pool: Pool, settings: dict[str, Any]) -> np.ndarray:
    return names_in(pool.column("caption", "filter text_based"), settings["class_names"])


def _image_based(pool: Pool, settings: dict[str, Any]) -> np.ndarray:
    from clipcov_pipeline.selection.latent_classes import assign_clusters, spherical_kmeans

    target = read_rows(settings["target"], pool.dim)
    images = pool.pairs[:, : pool.dim]
    if settings["centroids"] is not None:
        centres = read_rows(settings["centroids"], pool.dim)
    else:
        clusters = settings["n_clusters"] or max(1, min(100_000, round(len(pool) / 100)))
        if clusters > len(pool):
            raise InputError(f"image_based.n_clusters: found {clusters}, expected at most {len(pool)} pairs")
        centres = spherical_kmeans(images, clusters, settings["seed"], sample=max(64 * clusters, 50_000))
    near = np.zeros(len(centres), np.bool_)
    near[assign_clusters(target, centres)[0]] = True
    passing = np.empty(len(pool), np.bool_)
    passing[pool.order] = near[assign_clusters(images, centres)[0]]
    return passing


_MASKS = {
    "min_similarity": _min_similarity,
    "caption_length": _caption_length,
    "clip_score": _clip_score,
    "basic": _basic,
    "language": _language,
    "text_based": _text_based,
    "image_based": _image_based,
}
