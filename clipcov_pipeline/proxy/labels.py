"""Pseudo-labels of a pool that lies in LanceDB: which samples belong to it, and the latent class of each.

Embeddings are streamed; only the columns of text, a few numbers a sample, and for clusters a memory-mapped
scratch file are held.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.holdout import split_holdout
from clipcov_pipeline.proxy.vectors import VECTORS, Vectors, vectors_of
from clipcov_pipeline.selection.latent_classes import cluster_labels, silhouettes, zero_shot_labels

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = ("uid", "shard", "key", "image_sha256", "caption")

SAMPLE = ("shard", "uid")  # names a row of the table: a uid may come again in another shard

KMEANS_SAMPLE = 200_000  # rows that centres are fitted on; all rows are assigned


@dataclass(frozen=True)
class Members:
    """Who is in the pool.

    pool, holdout: columns ``METADATA``, sorted by shard and key. repeated: samples left out because an
    earlier one has the same uid.
    """

    pool: pl.DataFrame
    holdout: pl.DataFrame
    repeated: int


def members(
    vectors: Vectors, table: str, version: int, shards: Sequence[str], holdout_fraction: float
) -> Members:
    """List the pool and its held-out share.

    Raises:
        InputError: nothing is left in the pool, or nothing is held out of it though a share is asked for.
    """
    batches = vectors.batches(table, version, shards, METADATA, 65_536)
    none = pl.DataFrame(schema=dict.fromkeys(METADATA, pl.String))
    frames: list[Any] = [none, *(pl.from_arrow(batch) for batch in batches)]
    everything: pl.DataFrame = pl.concat(frames).sort("shard", "key")
    distinct = everything.unique("uid", keep="first", maintain_order=True)
    pool, holdout = split_holdout(distinct, holdout_fraction)
    if pool.is_empty():
        raise InputError(
            f"the pool is empty: found {distinct.height} embedded samples, {holdout.height} of them held out;"
            " lower evaluate.holdout_fraction or give more shards"
        )
    if holdout_fraction and holdout.is_empty():
        raise InputError(
            f"evaluate.holdout_fraction: found {holdout_fraction:g}, which holds out none of {pool.height}"
            " samples, expected a larger one, or 0 for no held-out share"
        )
    return Members(pool, holdout, everything.height - distinct.height)


def label_by_prompts(
    pool: pl.DataFrame, batches: "Iterator[pa.RecordBatch]", class_embedding: np.ndarray
) -> pl.DataFrame:
    """Zero-shot latent classes.

    Args:
        pool: columns ``SAMPLE``, the order of the result.
        batches: columns ``SAMPLE`` and both embeddings; rows of other samples are passed over.
        class_embedding: float32 [K, d], unit rows.

    Returns:
        ``pool`` with latent_class (int32), label_similarity and margin (float32).

    Raises:
        InputError: a sample of the pool has no embedding.
    """
    parts = []
    for batch in batches:
        labels = zero_shot_labels(
            vectors_of(batch, "image_embedding"), class_embedding, vectors_of(batch, "text_embedding")
        )
        parts.append(_samples(batch).hstack(_frame(*labels)))
    labelled = pool.join(pl.concat(parts), on=SAMPLE, how="inner", maintain_order="left")
    _check_complete(labelled.height, pool)
    return labelled


def label_by_clusters(
    pool: pl.DataFrame,
    batches: "Iterator[pa.RecordBatch]",
    k: int | Literal["auto"],
    seed: int,
    scratch: Path,
    stats: dict[str, Any] | None = None,
) -> pl.DataFrame:
    """Latent classes by spherical k-means on [image; caption].

    Args:
        pool, batches: as in `label_by_prompts`.
        k: number of clusters; ``auto`` is that of largest silhouette on a sample, the fewest of equals.
        seed: fixes every draw.
        scratch: folder for a file of the pool's embeddings.
        stats: is given ``n_clusters`` and, under ``auto``, ``silhouettes`` by number of clusters.

    Returns:
        As `label_by_prompts`.

    Raises:
        InputError: more clusters than samples, a sample of the pool has no embedding, or nothing to choose
            a number by (see `silhouettes`).
    """
    stats = {} if stats is None else stats
    rows = pool.select(SAMPLE).with_row_index("row")
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:
        pairs: Any = None
        n_found = 0
        for batch in batches:
            image, text = (vectors_of(batch, name) for name in VECTORS)
            if pairs is None:
                pairs = np.memmap(file, np.float16, "w+", shape=(2, pool.height, image.shape[1]))
            found = _samples(batch).with_row_index("at").join(rows, on=SAMPLE)
            pairs[0, found["row"].to_numpy()] = image[found["at"].to_numpy()]
            pairs[1, found["row"].to_numpy()] = text[found["at"].to_numpy()]
            n_found += found.height
        _check_complete(n_found, pool)
        if k == "auto":
            scores = silhouettes(pairs[0], pairs[1], seed)
            k = max(scores, key=lambda number: (scores[number], -number))
            stats["silhouettes"] = {str(number): round(score, 4) for number, score in scores.items()}
        stats["n_clusters"] = k
        labels = cluster_labels(pairs[0], pairs[1], k, seed, sample=KMEANS_SAMPLE)
        del pairs
    return pool.hstack(_frame(*labels))


def _check_complete(n_found: int, pool: pl.DataFrame) -> None:
    if n_found != pool.height:
        raise InputError(
            f"embeddings: found those of {n_found} samples, expected all {pool.height} of the pool:"
            " materialize embeddings again"
        )


def _samples(batch: "pa.RecordBatch") -> pl.DataFrame:
    return pl.DataFrame({name: batch.column(name).to_pylist() for name in SAMPLE})


def _frame(latent_class: np.ndarray, similarity: np.ndarray, margin: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"latent_class": latent_class, "label_similarity": similarity, "margin": margin})


def label_pool(
    vectors: Vectors,
    table: str,
    version: int,
    shards: Sequence[str],
    pool: pl.DataFrame,
    labeller: Callable[[pl.DataFrame, "Iterator[pa.RecordBatch]"], pl.DataFrame],
) -> pl.DataFrame:
    """Stream the table's embeddings through a labeller; return one row a pool sample, in the pool's order."""
    return labeller(pool, vectors.batches(table, version, shards, (*SAMPLE, *VECTORS)))
