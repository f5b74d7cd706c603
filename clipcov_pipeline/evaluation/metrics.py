"""Metrics by CLIP_benchmark's names, their chance levels, and the record that holds them."""

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from clipcov_pipeline.evaluation.tasks import Ties
from clipcov_pipeline.evaluation.ties import Standing, standing, standings

_BLOCK_ROWS = 1024


def retrieval_recall(
    image_embedding: np.ndarray,
    text_embedding: np.ndarray,
    image_of_caption: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "expected",
) -> dict[str, float]:
    """Return recall at k in both directions, as CLIP_benchmark names and defines it (zeroshot_retrieval).

    `image_retrieval_recall@k` is the share of captions whose image is among the k most similar images;
    `text_retrieval_recall@k` the share of images with at least one of their captions among the k most similar
    captions. Only an image's own captions count: an equal caption of another image is a tie.

    Args:
        image_embedding, text_embedding: float [n, d] and [m, d], unit rows.
        image_of_caption: int [m], row of each caption's image; every image has a caption.
        ks: the k.
        ties: what one counts, see `ties`.

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
    of_caption = standings(
        text_embedding,
        image_embedding,
        lambda start, stop: (own[start:stop] - start, image_of_caption[start:stop]),
        ks,
        ties,
        _BLOCK_ROWS,
    )
    by_image = np.argsort(image_of_caption, kind="stable")
    sorted_images = image_of_caption[by_image]

    def own_captions(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.searchsorted(sorted_images, [start, stop])
        return sorted_images[low:high] - start, by_image[low:high]

    of_image = standings(image_embedding, text_embedding, own_captions, ks, ties, _BLOCK_ROWS)
    recall = {f"image_retrieval_recall@{k}": float(of_caption.hits(k, ties).mean()) for k in ks}
    return recall | {f"text_retrieval_recall@{k}": float(of_image.hits(k, ties).mean()) for k in ks}


def zero_shot_metrics(
    image_embedding: np.ndarray, classifier: np.ndarray, targets: np.ndarray, ties: Ties = "expected"
) -> dict[str, float]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`, as CLIP_benchmark's zeroshot_classification.

    The recall is averaged over the classes that have an image. Of under 5 classes acc5 is 1, as is its chance
    level (CLIP_benchmark writes NaN, which JSON has not): it says nothing, and is in no average.

    Args:
        image_embedding, classifier: float [n, d] and [n_classes, d], unit rows.
        targets: int [n], class index of each image.
        ties: what one counts, see `ties`.

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
    found = standings(
        image_embedding,
        classifier,
        lambda start, stop: (rows[start:stop] - start, targets[start:stop]),
        (1, 5),
        ties,
        _BLOCK_ROWS,
    )
    return _accuracies(found, targets, ties)


def classification_metrics(
    scores: np.ndarray, targets: np.ndarray, ties: Ties = "expected"
) -> dict[str, float]:
    """As `zero_shot_metrics`, from any classifier's scores: float [n, n_classes], a row of NaN is a miss."""
    targets = np.asarray(targets)
    return _accuracies(standing(scores, (np.arange(len(scores)), targets), (1, 5), ties), targets, ties)


def _accuracies(found: Standing, targets: np.ndarray, ties: Ties) -> dict[str, float]:
    first = found.hits(1, ties)
    hits, sizes = np.bincount(targets, weights=first), np.bincount(targets)
    return {
        "acc1": float(first.mean()),
        "acc5": float(found.hits(5, ties).mean()),
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
