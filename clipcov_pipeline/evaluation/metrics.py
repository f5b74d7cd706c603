"""Metrics by CLIP_benchmark's names, their chance levels, and the record that holds them."""

from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

# Similarities closer than this are ties: equal images of two batches differ by float32 rounding.
TIE = 1e-6

_BLOCK_ROWS = 1024


def retrieval_recall(
    image_embedding: np.ndarray,
    text_embedding: np.ndarray,
    image_of_caption: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return recall at k in both directions, as CLIP_benchmark names and defines it (zeroshot_retrieval).

    `image_retrieval_recall@k` is the share of captions whose image is among the k most similar images;
    `text_retrieval_recall@k` the share of images with at least one of their captions among the k most similar
    captions. Only an image's own captions count: an equal caption of another image is a tie, so a miss at
    k = 1.

    Args:
        image_embedding, text_embedding: float [n, d] and [m, d], unit rows.
        image_of_caption: int [m], row of each caption's image; every image has a caption.
        ks: the k.

    Raises:
        ValueError: the shapes do not fit.
    """
    image_of_caption = np.asarray(image_of_caption)
    n_images, n_captions = len(image_embedding), len(text_embedding)
    if image_of_caption.shape != (n_captions,):
        raise ValueError(f"image_of_caption has shape {image_of_caption.shape}, expected ({n_captions},)")
    if n_images == 0 or set(np.unique(image_of_caption)) != set(range(n_images)):
        raise ValueError(f"every one of the {n_images} images needs a caption, and every caption an image")
    own = np.arange(n_captions)
    image_rank = _ranks(
        text_embedding,
        image_embedding,
        lambda start, stop: (own[start:stop] - start, image_of_caption[start:stop]),
    )
    by_image = np.argsort(image_of_caption, kind="stable")
    sorted_images = image_of_caption[by_image]

    def own_captions(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.searchsorted(sorted_images, [start, stop])
        return sorted_images[low:high] - start, by_image[low:high]

    text_rank = _ranks(image_embedding, text_embedding, own_captions)
    recall = {f"image_retrieval_recall@{k}": float((image_rank < k).mean()) for k in ks}
    return recall | {f"text_retrieval_recall@{k}": float((text_rank < k).mean()) for k in ks}


def zero_shot_metrics(
    image_embedding: np.ndarray, classifier: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`, as CLIP_benchmark's zeroshot_classification.

    The recall is averaged over the classes that have an image.

    Args:
        image_embedding, classifier: float [n, d] and [n_classes, d], unit rows.
        targets: int [n], class index of each image.

    Raises:
        ValueError: the shapes do not fit.
    """
    targets = np.asarray(targets)
    if targets.shape != (len(image_embedding),) or len(targets) == 0:
        raise ValueError(
            f"targets has shape {targets.shape}, expected ({len(image_embedding)},), at least one"
        )
    if targets.min() < 0 or targets.max() >= len(classifier):
        raise ValueError(
            f"targets reach {targets.min()} to {targets.max()}, there are {len(classifier)} classes"
        )
    rows = np.arange(len(targets))
    rank = _ranks(
        image_embedding, classifier, lambda start, stop: (rows[start:stop] - start, targets[start:stop])
    )
    return _accuracies(rank, targets)


def classification_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """As `zero_shot_metrics`, from any classifier's scores: float [n, n_classes], a row of NaN is a miss."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    rows = np.arange(len(scores))
    ahead = scores >= scores[rows, targets][:, None] - TIE
    ahead[rows, targets] = False
    return _accuracies(ahead.sum(axis=1), np.asarray(targets))


def _accuracies(rank: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    hits, sizes = np.bincount(targets, weights=rank < 1), np.bincount(targets)
    return {
        "acc1": float((rank < 1).mean()),
        "acc5": float((rank < 5).mean()),
        "mean_per_class_recall": float((hits[sizes > 0] / sizes[sizes > 0]).mean()),
    }


def retrieval_chance_level(
    image_of_caption: np.ndarray, n_images: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return what `retrieval_recall` expects of a random order, with the same keys."""
    n_captions = len(image_of_caption)
    own = np.bincount(image_of_caption, minlength=n_images)
    levels = {f"image_retrieval_recall@{k}": min(1.0, k / n_images) for k in ks}
    for k in ks:
        drawn = min(k, n_captions)
        misses = {n: comb(n_captions - n, drawn) / comb(n_captions, drawn) for n in set(own.tolist())}
        levels[f"text_retrieval_recall@{k}"] = 1 - sum(misses[n] for n in own.tolist()) / n_images
    return levels


def zero_shot_chance_level(n_classes: int) -> dict[str, float]:
    """Return what `zero_shot_metrics` expects of a random order, with the same keys."""
    return {
        "acc1": 1 / n_classes,
        "acc5": min(1.0, 5 / n_classes),
        "mean_per_class_recall": 1 / n_classes,
    }


def record(
    dataset: str,
    task: str,
    model: str,
    pretrained: str,
    metrics: Mapping[str, float],
    n_samples: int,
    **extra: Any,
) -> dict[str, Any]:
    """Return a result in the shape of CLIP_benchmark's JSON, which its `build` command reads.

    Args:
        dataset, task, model, pretrained: what was scored, on what.
        metrics: by CLIP_benchmark's names.
        n_samples: the denominator.
        extra: further fields.

    Raises:
        ValueError: a metric is not a finite number: JSON has none.
    """
    if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
        raise ValueError(f"{dataset} {task}: {bad[0]} is {metrics[bad[0]]}, expected a finite number")
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "language": "en",
        "n_samples": n_samples,
        **extra,
    }


def _ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    own_pairs: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """int64 [n_queries]: how many wrong candidates are at least as similar as the best right one (less TIE).

    own_pairs(start, stop): (query - start, candidate) of all right pairs of these queries.
    """
    queries = np.asarray(queries, dtype=np.float32)
    candidates = np.asarray(candidates, dtype=np.float32)
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(queries))
        scores = queries[start:stop] @ candidates.T
        scores[np.isnan(scores)] = -np.inf
        right = own_pairs(start, stop)
        best = np.full(stop - start, -np.inf, np.float32)
        np.maximum.at(best, right[0], scores[right])
        ahead = scores >= (best - TIE)[:, None]
        ahead[right] = False
        ranks[start:stop] = ahead.sum(axis=1)
    return ranks
