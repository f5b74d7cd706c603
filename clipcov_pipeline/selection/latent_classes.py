"""Latent classes: zero-shot labels from class prompts, or clusters where there are no prompts.

Everything goes through the embeddings in blocks, so memory does not grow with the pool.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.parallel import over_stream

Labels = tuple[np.ndarray, np.ndarray, np.ndarray]


# rows a block: its scores against 1,000 classes stay in the processor's cache
_BLOCK = 4096


def zero_shot_labels(
    image_embedding: np.ndarray | Iterable[tuple[np.ndarray, np.ndarray]],
    class_embedding: np.ndarray,
    text_embedding: np.ndarray | None = None,
    *,
    threads: int | None = None,
) -> Labels:
    """Zero-shot class of each image, and how well its caption fits that class's prompts.

    Args:
        image_embedding: [n, d] float16 or float32, unit norm (memory-mapped is fine), with
            ``text_embedding`` of the same shape; or an iterator of (image block, text block) pairs, for a
            stream.
        class_embedding: float32 [K, d], unit norm: the prompts' embeddings w_k.

    Returns:
        latent_class (int32 [n], argmax_k <v_i, w_k>, ties to the lower), label_similarity (float32 [n],
        <t_i, w_k(i)>), margin (float32 [n], best minus second best <v_i, w_k>; 0 when there is one class).

    Raises:
        InputError: widths or lengths differ, there are no classes, or an image embedding is not finite.
    """
    classes = np.ascontiguousarray(class_embedding, np.float32)
    if classes.ndim != 2 or len(classes) == 0:
        raise InputError(
            f"class_embedding: found shape {classes.shape}, expected [K, d] with at least one class"
        )

    def label(block: tuple[np.ndarray, np.ndarray]) -> Labels:
        from clipcov_pipeline.selection import kernels

        image, text = block
        if image.shape[1] != classes.shape[1]:
            raise InputError(
                f"class_embedding: found width {classes.shape[1]}, expected {image.shape[1]}, the embeddings'"
            )
        best, _, margin = _nearest(image, classes)
        similarity = np.empty(len(best), np.float32)
        kernels.matched(kernels.bits(_plain(text)), classes, best, similarity)
        return best, similarity, margin

    return _joined(list(over_stream(label, _blocks(image_embedding, text_embedding), threads)))


def spherical_kmeans(
    x: np.ndarray, k: int, seed: int = 0, n_iter: int = 20, sample: int | None = None
) -> np.ndarray:
    """Centres of spherical k-means (cosine similarity; Lloyd's algorithm from a random start).

    Args:
        x: [n, d] float16 or float32, unit norm.
        k: number of centres, 1 to n.
        seed: fixes the sample and the start; the same seed gives the same centres.
        n_iter: most iterations; it ends sooner when no row changes its centre.
        sample: rows to fit on, drawn without replacement; all when None.

    Returns:
        float32 [k, d], unit norm. A centre left without rows moves to the row farthest from its own centre.

    Raises:
        InputError: k is not in 1 to n.
    """
    n = len(x)
    if not 1 <= k <= n:
        raise InputError(f"clusters: found {k}, expected 1 to {n}, the number of samples")
    rng = np.random.default_rng(seed)
    if sample is not None and max(sample, k) < n:
        x = x[np.sort(rng.choice(n, max(sample, k), replace=False))]
    centres = _unit(x[np.sort(rng.choice(len(x), k, replace=False))].astype(np.float32))
    before = None
    for _ in range(n_iter):
        nearest, similarity, _ = assign_clusters(x, centres)
        if before is not None and np.array_equal(before, nearest):
            break
        before = nearest
        sums = _sums(x, nearest, k)
        empty = np.flatnonzero(np.bincount(nearest, minlength=k) == 0)
        sums[empty] = x[np.argsort(similarity, kind="stable")[: len(empty)]]
        centres = _unit(sums)
    return centres


def assign_clusters(x: np.ndarray, centres: np.ndarray) -> Labels:
    """Nearest centre (int32 [n]), similarity to it, margin to the second nearest (float32 [n]), in blocks."""
    centres = np.ascontiguousarray(centres, np.float32)
    parts = (x[at : at + _BLOCK] for at in range(0, len(x), _BLOCK))
    return _joined(list(over_stream(lambda rows: _nearest(rows, centres), parts)))


def cluster_labels(
    image_embedding: np.ndarray,
    text_embedding: np.ndarray,
    k: int,
    seed: int = 0,
    *,
    n_iter: int = 20,
    sample: int | None = None,
) -> Labels:
    """Latent classes without prompts: spherical k-means on [image; caption] embeddings.

    Args:
        image_embedding, text_embedding: [n, d] float16 or float32, unit norm.
        k, seed, n_iter, sample: as in ``spherical_kmeans``.

    Returns:
        latent_class (int32 [n]), label_similarity (float32 [n], <t_i, caption half of the centre, made
        unit>),
        margin (float32 [n], similarity to the nearest centre minus to the second nearest).
    """
    pairs = _Pairs(image_embedding, text_embedding)
    centres = spherical_kmeans(pairs, k, seed, n_iter, sample)  # type: ignore[arg-type]
    nearest, _, margin = assign_clusters(pairs, centres)  # type: ignore[arg-type]
    captions = _unit(centres[:, image_embedding.shape[1] :])
    similarity = np.empty(len(nearest), np.float32)
    for at in range(0, len(nearest), _BLOCK):
        part = slice(at, at + _BLOCK)
        similarity[part] = np.einsum(
            "ij,ij->i", text_embedding[part].astype(np.float32), captions[nearest[part]]
        )
    return nearest, similarity, margin


def silhouettes(
    image_embedding: np.ndarray, text_embedding: np.ndarray, seed: int = 0, *, sample: int = 5000
) -> dict[int, float]:
    """How well the pairs fall into 2, 3, 4, 6, 8, 11, ... clusters: mean silhouette in cosine distance.

    Each number is twice the one two before it, up to an eighth of the sample, so that clusters have members
    enough to be judged by. k-means has one random start, as when the pool is clustered. Memory does not
    grow with the pool.

    Args:
        image_embedding, text_embedding: [n, d] float16 or float32, unit norm.
        seed: fixes the sample and the start of each k-means.
        sample: rows that are looked at.

    Returns:
        Mean silhouette (Rousseeuw 1987; -1 to 1, larger is better) by number of clusters. A number that
        k-means does not reach, because rows are equal, is left out.

    Raises:
        InputError: fewer than 3 pairs, or no two that differ.
    """
    from sklearn.metrics import silhouette_score

    n = len(image_embedding)
    if n < 3:
        raise InputError(f"labels.n_clusters: found auto and {n} samples, expected 3 or more; give a number")
    rows = np.sort(np.random.default_rng(seed).choice(n, min(n, sample), replace=False))
    pairs = _Pairs(image_embedding, text_embedding)[rows]
    scores = {}
    for k in _geometric(max(2, len(pairs) // 8)):
        labels = assign_clusters(pairs, spherical_kmeans(pairs, k, seed))[0]
        if 2 <= len(np.unique(labels)) < len(pairs):
            scores[k] = float(silhouette_score(pairs, labels, metric="cosine"))
    if not scores:
        raise InputError(
            "labels.n_clusters: found auto and embeddings that are all equal, expected some that differ;"
            " look at the shards, or give a number"
        )
    return scores


def _geometric(largest: int) -> list[int]:
    """Whole numbers from 2 to ``largest``, each sqrt(2) times the one before."""
    steps = int(2 * np.log2(largest / 2) + 1e-9)
    return sorted({round(2 * 2 ** (step / 2)) for step in range(steps + 1)})


class _Pairs:
    """[v; t] / sqrt(2) of two arrays, put together a block at a time."""

    def __init__(self, image: np.ndarray, text: np.ndarray) -> None:
        if image.shape != text.shape:
            raise InputError(
                f"embeddings: found image {image.shape} and text {text.shape}, expected one shape"
            )
        self.image, self.text = image, text

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Any) -> np.ndarray:
        pair = np.concatenate([self.image[rows], self.text[rows]], axis=1).astype(np.float32)
        pair *= np.float32(np.sqrt(0.5))
        return pair


def _blocks(image: Any, text: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    stream = [(image, text)] if hasattr(image, "shape") else image
    for one, other in stream:
        if other is None or one.shape != other.shape:
            shape = None if other is None else other.shape
            raise InputError(
                f"embeddings: found image {one.shape} and text {shape}, expected one shape [n, d]"
            )
        for at in range(0, len(one), _BLOCK):
            yield one[at : at + _BLOCK], other[at : at + _BLOCK]


def _nearest(rows: np.ndarray, centres: np.ndarray) -> Labels:
    """Best centre (the first of equals), similarity to it, and margin to the second best, of a block."""
    from clipcov_pipeline.selection import kernels

    wide = np.empty(rows.shape, np.float32)
    kernels.widen(kernels.bits(_plain(rows)), wide)
    best, top, margin = (
        np.empty(len(rows), np.int32),
        np.empty(len(rows), np.float32),
        np.empty(len(rows), np.float32),
    )
    kernels.top_two(wide @ centres.T, best, top, margin)
    if not np.isfinite(top).all():
        raise InputError(
            f"embedding: found {int((~np.isfinite(top)).sum())} of {len(rows)} rows with values that are not "
            "finite, expected unit norm; drop those rows"
        )
    return best, top, margin


def _plain(rows: np.ndarray) -> np.ndarray:
    """Contiguous float16 or float32."""
    return np.ascontiguousarray(rows, rows.dtype if rows.dtype == np.float16 else np.float32)


def _sums(x: np.ndarray, nearest: np.ndarray, k: int) -> np.ndarray:
    """Sum of the rows of each cluster: float64 [k, d]."""
    sums = np.zeros((k, x[:1].shape[1]))
    for at in range(0, len(nearest), _BLOCK):
        part = nearest[at : at + _BLOCK]
        order = np.argsort(part, kind="stable")
        rows, begins = x[at : at + _BLOCK][order], np.flatnonzero(np.r_[True, np.diff(part[order]) > 0])
        sums[part[order][begins]] += np.add.reduceat(rows.astype(np.float64), begins, axis=0)
    return sums


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(norms > 0, norms, 1)).astype(np.float32)


def _joined(parts: list[Labels]) -> Labels:
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)
    one, two, three = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return one, two, three
