"""Image-caption pairs as an evaluation set: embedding them, retrieval among them, their captions as classes.

Scores are defined and recorded as CLIP_benchmark does.

A wrong answer as similar as the right one is a tie: it counts by its expected value, where CLIP_benchmark's
`topk` leaves the order to chance (see `ties`). A collapsed model, which embeds all alike, thus scores chance
level. A row of NaN (a model that diverged) is a miss and stays in the denominator.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.metrics import (
    record,
    retrieval_chance_level,
    retrieval_recall,
    zero_shot_chance_level,
    zero_shot_metrics,
)
from clipcov_pipeline.evaluation.tasks import Ties
from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.samples import SampleStatus, iter_samples
from clipcov_pipeline.proxy.prompts import TextEncoder, class_embeddings


class PairEncoder(TextEncoder, Protocol):
    """What is needed of an `Encoder` to embed pairs; rows are float32 [n, d], of unit norm or NaN."""

    def encode_images(
        self, images: Iterable[Any], progress: Callable[[int], None] | None = None
    ) -> np.ndarray: ...


SHOWN = 5  # damaged pairs are named, the others counted


@dataclass(frozen=True)
class EmbeddedPairs:
    """The readable pairs of an evaluation set, embedded.

    uids, captions, image_sha256, shards and keys [n]; image_embedding and text_embedding float32 [n, d], unit
    rows or NaN.
    n_damaged: pairs of the set that cannot be read and are in no denominator; damaged: the first of them, as
    ``SHARD/KEY: why``.
    """

    uids: list[str]
    captions: list[str]
    image_sha256: list[str]
    image_embedding: np.ndarray
    text_embedding: np.ndarray
    n_damaged: int
    shards: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

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
    captions: CaptionRule = TXT,
    progress: Callable[[int], None] | None = None,
) -> EmbeddedPairs:
    """Embed the readable pairs (`ok`, `one_colour` or `stored_sparse`) of a manifest.

    It is `read_shard`'s, of one or several shards, whole or filtered.

    Args:
        encoder: the checkpoint's.
        shards: that the manifest is of; those that it has no pair of are not opened.
        manifest: columns of `MANIFEST_SCHEMA`.
        storage_options: fsspec's, of the shards.
        captions: the rule that the manifest was made by.
        progress: handed to the encoder.

    Raises:
        InputError: no pair is readable, or a shard no longer holds what the manifest says.
    """
    by_shard = _readable_by_shard(manifest, shards)
    rows = pl.concat(by_shard.values())
    texts, images = rows["caption"].to_list(), _images(shards, by_shard, storage_options, captions)
    return EmbeddedPairs(
        uids=rows["uid"].to_list(),
        captions=texts,
        image_sha256=rows["image_sha256"].to_list(),
        image_embedding=encoder.encode_images(images, progress),
        text_embedding=encoder.encode_texts(texts),
        n_damaged=manifest.height - rows.height,
        shards=rows["shard"].to_list(),
        keys=rows["key"].to_list(),
        damaged=_damaged(manifest),
    )


def _damaged(manifest: pl.DataFrame) -> list[str]:
    bad = manifest.filter(pl.col("status") != SampleStatus.ok).head(SHOWN)
    return [f"{row['shard']}/{row['key']}: {row['reason']}" for row in bad.iter_rows(named=True)]


def _readable_by_shard(manifest: pl.DataFrame, shards: Sequence[Shard]) -> dict[str, pl.DataFrame]:
    """Return the readable rows of a manifest by shard, in the order of the shards and of each tar."""
    # an image of one colour is of no use to train on, but a query like any other
    readable = [SampleStatus.ok, SampleStatus.one_colour, SampleStatus.stored_sparse]
    good = manifest.filter(pl.col("status").is_in(readable))
    if good.is_empty():
        first = f", first {some[0]}" if (some := _damaged(manifest)) else ""
        raise InputError(
            f"evaluation set: none of its {manifest.height} pairs is readable{first}; copy it again"
        )
    # the manifest is in each tar's order, so the images come in the order of its rows once shards are grouped
    parts = {name: rows for (name,), rows in good.partition_by("shard", as_dict=True).items()}
    by_shard = {shard.name: parts[shard.name] for shard in shards if shard.name in parts}
    if sum(rows.height for rows in by_shard.values()) != good.height:
        absent = sorted(set(good["shard"]) - {shard.name for shard in shards})
        raise InputError(f"evaluation set: shard {absent[0]} of the manifest is gone; read the shards again")
    return by_shard


def _images(
    shards: Sequence[Shard],
    by_shard: Mapping[str, pl.DataFrame],
    storage_options: dict | None,
    captions: CaptionRule,
) -> Iterator[bytes]:
    """Yield the images of these rows; a shard that lost or reordered one has changed since its manifest."""
    for shard in shards:
        if shard.name not in by_shard:
            continue
        expected = by_shard[shard.name]["key"].to_list()
        n_read = 0
        samples = iter_samples(shard, set(expected), storage_options, captions)
        for sample, key in zip(samples, expected, strict=False):
            if sample.key != key:
                break
            n_read += 1
            yield sample.image
        if n_read != len(expected):
            raise InputError(
                f"evaluation set: shard {shard.name} no longer holds sample {expected[n_read]!r}; "
                "it changed: read the shards again"
            )


@dataclass(frozen=True)
class Counting:
    """What is counted: unique, as in `evaluate_retrieval`; ties, as in `metrics.retrieval_recall`."""

    unique: bool = False
    ties: Ties = "expected"


def evaluate_pairs(
    encoder: PairEncoder,
    pairs: EmbeddedPairs,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    tasks: Sequence[str] = ("retrieval",),
    templates: Sequence[str] = ("{}",),
    counting: Counting = Counting(),
) -> list[dict[str, Any]]:
    """Score a checkpoint on an evaluation set: one record a task, in the order of `tasks`.

    Args:
        encoder: the checkpoint's.
        pairs: the set as that encoder embeds it.
        dataset, model, pretrained: for the records.
        tasks: `retrieval`, `zeroshot_names`.
        templates: as `evaluate_names`, which also says what is raised.
        counting: what is counted.
    """
    named: dict[str, Any] = {"dataset": dataset, "model": model, "pretrained": pretrained}
    named["ties"] = counting.ties
    return [
        evaluate_retrieval(pairs, **named, unique=counting.unique)
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
    ties: Ties = "expected",
) -> dict[str, Any]:
    """Return the record of the retrieval recalls over all pairs, one caption an image, and the chance level.

    Args:
        pairs: the set.
        dataset, model, pretrained: for the record.
        ks: of the recalls.
        unique: leave out each pair whose caption or image file came before in the set: in a pool with
            boilerplate captions most queries have no single right answer. `n_samples` is the denominator,
            `n_left_out` the rest.
        ties: what one counts.
    """
    rows = _first_of_each(pairs) if unique else np.arange(len(pairs.captions))
    own = np.arange(len(rows))
    return record(
        dataset,
        "zeroshot_retrieval",
        model,
        pretrained,
        retrieval_recall(pairs.image_embedding[rows], pairs.text_embedding[rows], own, ks, ties),
        len(rows),
        ties=ties,
        chance=retrieval_chance_level(own, len(rows), ks),
        n_left_out=len(pairs.captions) - len(rows),
        n_damaged=pairs.n_damaged,
        damaged=pairs.damaged,
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
    ties: Ties = "expected",
) -> dict[str, Any]:
    """Return the record of zero-shot classification of the images over the set's captions as class names.

    A name that several images share is one class, the target of each of them; `n_classes` counts the distinct
    names.

    Args:
        encoder: the one that has embedded the pairs.
        pairs: the set.
        dataset, model, pretrained: for the record.
        templates: prompt templates with `{}`; a class's embedding is the normalised mean over them.
        ties: what one counts.

    Raises:
        InputError: as `class_embeddings`.
    """
    names = list(dict.fromkeys(pairs.captions))
    class_of = {name: index for index, name in enumerate(names)}
    targets = np.array([class_of[caption] for caption in pairs.captions])
    classifier = class_embeddings(encoder, names, templates)
    metrics = zero_shot_metrics(pairs.image_embedding, classifier, targets, ties)
    return record(
        dataset,
        "zeroshot_classification",
        model,
        pretrained,
        metrics,
        len(targets),
        ties=ties,
        chance=zero_shot_chance_level(len(names)),
        n_classes=len(names),
        n_damaged=pairs.n_damaged,
        damaged=pairs.damaged,
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
