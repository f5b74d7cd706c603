"""Scores of a checkpoint on image-caption pairs, defined and recorded as CLIP_benchmark does.

Everything is counted so that a tie never helps: a wrong answer as similar as the right one ranks before it,
where CLIP_benchmark's `topk` leaves the order of ties to chance. A collapsed model, which embeds all alike,
thus scores 0. A row of NaN (a model that diverged) is a miss and stays in the denominator.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any, Protocol

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.prompts import class_embeddings
from clipcov_pipeline.shards import SampleStatus, Shard, iter_samples

# Similarities closer than this are ties: equal images of two batches differ by float32 rounding.
TIE = 1e-6
_BLOCK_ROWS = 1024


class PairEncoder(Protocol):
    """What evaluation needs of a model; `embed.Encoder` is one. Rows are float32 [n, d], unit norm or NaN."""

    def encode_images(
        self, images: Iterable[Any], progress: Callable[[int], None] | None = None
    ) -> np.ndarray: ...

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...


# --- metrics --------------------------------------------------------------------------------------


def retrieval_recall(
    image_embedding: np.ndarray,
    text_embedding: np.ndarray,
    image_of_caption: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k in both directions, by the names and the definition of CLIP_benchmark (zeroshot_retrieval).

    image_embedding [n, d] and text_embedding [m, d]: float, unit rows. image_of_caption [m]: row of each
    caption's image; every image has a caption. `image_retrieval_recall@k` is the share of captions whose
    image is among the k most similar images; `text_retrieval_recall@k` the share of images with at least one
    of their captions among the k most similar captions. Only an image's own captions count: an equal caption
    of another image is a tie, so a miss at k = 1. Raises ValueError where the shapes do not fit.
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
    """`acc1`, `acc5` and `mean_per_class_recall`, as CLIP_benchmark names them (zeroshot_classification).

    image_embedding [n, d] and classifier [n_classes, d]: float, unit rows. targets [n]: class index of each
    image. The recall is averaged over the classes that have an image. Raises ValueError where the shapes do
    not fit.
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
    """What `retrieval_recall` expects of a random order, with the same keys."""
    n_captions = len(image_of_caption)
    own = np.bincount(image_of_caption, minlength=n_images)
    levels = {f"image_retrieval_recall@{k}": min(1.0, k / n_images) for k in ks}
    for k in ks:
        drawn = min(k, n_captions)
        misses = {n: comb(n_captions - n, drawn) / comb(n_captions, drawn) for n in set(own.tolist())}
        levels[f"text_retrieval_recall@{k}"] = 1 - sum(misses[n] for n in own.tolist()) / n_images
    return levels


def zero_shot_chance_level(n_classes: int) -> dict[str, float]:
    """What `zero_shot_metrics` expects of a random order, with the same keys."""
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
    """A result in the shape of CLIP_benchmark's JSON, which its `build` command reads, and further fields.

    n_samples: the denominator. Raises ValueError for a metric that is not a finite number: JSON has none.
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


# --- from shards to records -----------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedPairs:
    """The readable pairs of an evaluation set, embedded.

    uids, captions, image_sha256, shards and keys [n]; image_embedding and text_embedding float32 [n, d], unit
    rows or NaN.
    n_damaged: pairs of the set that cannot be read and are in no denominator.
    """

    uids: list[str]
    captions: list[str]
    image_sha256: list[str]
    image_embedding: np.ndarray
    text_embedding: np.ndarray
    n_damaged: int
    shards: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def n_without_embedding(self) -> int:
        """Pairs that the model gives no finite embedding: counted as misses."""
        bad = np.isnan(self.image_embedding).any(axis=1) | np.isnan(self.text_embedding).any(axis=1)
        return int(bad.sum())


def embed_pairs(
    encoder: PairEncoder,
    shards: Sequence[Shard],
    manifest: pl.DataFrame,
    *,
    storage_options: dict | None = None,
    progress: Callable[[int], None] | None = None,
) -> EmbeddedPairs:
    """Embed the `ok` pairs of a manifest: `read_shard`'s, of one or several shards, whole or filtered.

    `progress` is handed to the encoder. Raises InputError where no pair is readable, or a shard no longer
    holds what the manifest says.
    """
    good = manifest.filter(pl.col("status") == SampleStatus.ok)
    if good.is_empty():
        raise InputError(
            f"evaluation set: none of its {manifest.height} pairs is readable; see the manifest for reasons"
        )
    # the manifest is in each tar's order, so the images come in the order of its rows once shards are grouped
    parts = {name: rows for (name,), rows in good.partition_by("shard", as_dict=True).items()}
    by_shard = {shard.name: parts[shard.name] for shard in shards if shard.name in parts}
    if sum(rows.height for rows in by_shard.values()) != good.height:
        absent = sorted(set(good["shard"]) - {shard.name for shard in shards})
        raise InputError(f"evaluation set: shard {absent[0]} of the manifest is gone; read the shards again")

    def images() -> Iterator[bytes]:
        for shard in shards:
            if shard.name not in by_shard:
                continue
            expected = by_shard[shard.name]["key"].to_list()
            n_read = 0
            for sample, key in zip(
                iter_samples(shard, set(expected), storage_options), expected, strict=False
            ):
                if sample.key != key:
                    break
                n_read += 1
                yield sample.image
            if n_read != len(expected):
                raise InputError(
                    f"evaluation set: shard {shard.name} no longer holds sample {expected[n_read]!r}; "
                    "it changed: read the shards again"
                )

    rows = pl.concat(by_shard.values())
    captions = rows["caption"].to_list()
    return EmbeddedPairs(
        uids=rows["uid"].to_list(),
        captions=captions,
        image_sha256=rows["image_sha256"].to_list(),
        image_embedding=encoder.encode_images(images(), progress),
        text_embedding=encoder.encode_texts(captions),
        n_damaged=manifest.height - good.height,
        shards=rows["shard"].to_list(),
        keys=rows["key"].to_list(),
    )


def evaluate_shards(
    encoder: PairEncoder,
    shards: Sequence[Shard],
    manifest: pl.DataFrame,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    tasks: Sequence[str] = ("retrieval",),
    templates: Sequence[str] = ("{}",),
    ks: Sequence[int] = (1, 5, 10),
    unique: bool = False,
    storage_options: dict | None = None,
    progress: Callable[[int], None] | None = None,
    on_pairs: Callable[[EmbeddedPairs], None] | None = None,
) -> list[dict[str, Any]]:
    """Score a checkpoint on an evaluation set: one record a task, in the order of `tasks`.

    Every image is read and embedded once; `on_pairs` is given the embedded pairs. tasks: `retrieval`,
    `zeroshot_names`. Other arguments as `embed_pairs`, `evaluate_retrieval` and `evaluate_names`, which also
    say what is raised.
    """
    pairs = embed_pairs(encoder, shards, manifest, storage_options=storage_options, progress=progress)
    if on_pairs is not None:
        on_pairs(pairs)
    named = {"dataset": dataset, "model": model, "pretrained": pretrained}
    return [
        evaluate_retrieval(pairs, **named, ks=ks, unique=unique)
        if task == "retrieval"
        else evaluate_names(encoder, pairs, **named, templates=templates)
        for task in tasks
    ]


def evaluate_retrieval(
    pairs: EmbeddedPairs,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    ks: Sequence[int] = (1, 5, 10),
    unique: bool = False,
) -> dict[str, Any]:
    """Record of the retrieval recalls over all pairs, one caption an image, with the chance level beside.

    unique: leave out each pair whose caption or image file came before in the set: in a pool with boilerplate
    captions most queries have no single right answer. `n_samples` is the denominator, `n_left_out` the rest.
    """
    rows = _first_of_each(pairs) if unique else np.arange(len(pairs.captions))
    own = np.arange(len(rows))
    return record(
        dataset,
        "zeroshot_retrieval",
        model,
        pretrained,
        retrieval_recall(pairs.image_embedding[rows], pairs.text_embedding[rows], own, ks),
        len(rows),
        chance=retrieval_chance_level(own, len(rows), ks),
        n_left_out=len(pairs.captions) - len(rows),
        n_damaged=pairs.n_damaged,
        n_without_embedding=pairs.n_without_embedding,
    )


def evaluate_names(
    encoder: PairEncoder,
    pairs: EmbeddedPairs,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    templates: Sequence[str] = ("{}",),
) -> dict[str, Any]:
    """Record of zero-shot classification of the images over the set's own captions as class names.

    A name that several images share is one class, the target of each of them; `n_classes` counts the distinct
    names. templates: prompt templates with `{}`; a class's embedding is the normalised mean over them.
    """
    names = list(dict.fromkeys(pairs.captions))
    class_of = {name: index for index, name in enumerate(names)}
    targets = np.array([class_of[caption] for caption in pairs.captions])
    metrics = zero_shot_metrics(pairs.image_embedding, class_embeddings(encoder, names, templates), targets)
    return record(
        dataset,
        "zeroshot_classification",
        model,
        pretrained,
        metrics,
        len(targets),
        chance=zero_shot_chance_level(len(names)),
        n_classes=len(names),
        n_damaged=pairs.n_damaged,
        n_without_embedding=pairs.n_without_embedding,
    )


def _first_of_each(pairs: EmbeddedPairs) -> np.ndarray:
    """Rows whose caption and image file are both new."""
    captions: set[str] = set()
    images: set[str] = set()
    rows = []
    for row, (caption, image) in enumerate(zip(pairs.captions, pairs.image_sha256, strict=True)):
        if caption not in captions and image not in images:
            rows.append(row)
        captions.add(caption)
        images.add(image)
    return np.array(rows)
