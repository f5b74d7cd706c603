"""Embeds a shard's samples, and says how well images and captions fit: per sample, and on average."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.encoder import Encoder

if TYPE_CHECKING:
    from clipcov_pipeline.pool.samples import Sample

MIN_PAIRS = 30  # fewer say nothing of whether matched pairs are ahead

NO_IMAGE_EMBEDDING = "image_embedding_invalid"

NO_TEXT_EMBEDDING = "text_embedding_invalid"


class Embedded(NamedTuple):
    """Embeddings of the good samples, in their order, and what was refused.

    ``image_embedding`` and ``text_embedding`` are float16 [len(uids), d], of unit norm up to fp16 rounding.
    ``refused`` holds (uid, reason), reason ``image_embedding_invalid`` or ``text_embedding_invalid``.
    """

    uids: list[str]
    image_embedding: np.ndarray
    text_embedding: np.ndarray
    refused: list[tuple[str, str]]


def pair_figures(image: np.ndarray, text: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return what the checks of stored embeddings look at.

    Args:
        image, text: [n, d], row i of both belongs to pair i.
        seed: of the order in which captions are given to other images.

    Returns:
        norm_error: largest distance of a norm from 1 (NaN where a row is); matched_cosine, shuffled_cosine:
        mean cosine of image and own caption, and of image and another's caption; matched_lead: mean of their
        difference in standard errors, or ``matched_lead_undefined`` with the reason.
    """
    image, text = (np.asarray(side, np.float32) for side in (image, text))
    n = len(image)
    norms = [np.linalg.norm(side, axis=1) for side in (image, text)]
    if n < MIN_PAIRS:
        few = f"found {n} pairs, expected at least {MIN_PAIRS}"
        error = (
            {"norm_error": float(np.abs(np.stack(norms) - 1).max())} if n else {"norm_error_undefined": few}
        )
        return {**error, "matched_lead_undefined": few}
    order = np.random.default_rng(seed).permutation(n)
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one cycle: nobody gets the own caption
    with np.errstate(divide="ignore", invalid="ignore"):
        units = [side / norm[:, None] for side, norm in zip((image, text), norms, strict=True)]
        matched = np.einsum("ij,ij->i", units[0], units[1])
        shuffled = np.einsum("ij,ij->i", units[0], units[1][other])
        lead = (matched - shuffled).astype(np.float64)
        error = lead.std(ddof=1) / np.sqrt(n)
    found = {
        "norm_error": float(np.abs(np.stack(norms) - 1).max()),
        "matched_cosine": float(matched.mean()),
        "shuffled_cosine": float(shuffled.mean()),
    }
    if error == 0 and lead.mean() > 0:
        return {**found, "matched_lead_undefined": "the lead of matched pairs does not vary"}
    return {**found, "matched_lead": float(lead.mean() / error) if error != 0 else 0.0}


def pair_similarities(embedded: Embedded) -> np.ndarray:
    """Return <image embedding, text embedding> of each row, float32 [n]."""
    image, text = (side.astype(np.float32) for side in (embedded.image_embedding, embedded.text_embedding))
    return np.einsum("ij,ij->i", image, text)


def with_early_similarity(members: pl.DataFrame, files: Mapping[str, Path]) -> pl.DataFrame:
    """Add ``early_similarity`` (float32) from each shard's file of ``uid`` and ``early_similarity``.

    Raises:
        InputError: the early proxy gave a sample of the pool no embedding.
    """
    parts = [
        pl.read_parquet(path).with_columns(shard=pl.lit(shard, pl.String)) for shard, path in files.items()
    ]
    joined = members.join(pl.concat(parts), on=("shard", "uid"), how="left", maintain_order="left")
    lost = joined.filter(pl.col("early_similarity").is_null())
    if lost.height:
        raise InputError(
            f"early_similarity: found none for {lost.height} samples, first uid {lost['uid'][0]}, expected"
            " one each: the early proxy gives them no finite embedding; use another as proxy.early"
        )
    return joined


def embed_samples(
    encoder: Encoder,
    samples: "Iterable[Sample]",
    uids: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed samples (read lazily, once) and refuse those without a finite, non-zero embedding.

    Args:
        encoder: the loaded model.
        samples: the samples; images are held only while they are in flight.
        uids: their global ids, in the same order.
        progress: called after each batch with the number of images done.

    Raises:
        ValueError: not as many uids as samples.
    """
    captions: list[str] = []

    def images() -> Iterator[bytes]:
        for sample in samples:
            captions.append(sample.caption)
            yield sample.image

    image = encoder.encode_images(images(), progress)
    if len(captions) != len(uids):
        raise ValueError(f"{len(uids)} uids for {len(captions)} samples")
    text = encoder.encode_texts(captions)
    refused: list[tuple[str, str]] = []
    good: list[int] = []
    for row, uid in enumerate(uids):
        if np.isnan(image[row]).any():
            refused.append((uid, NO_IMAGE_EMBEDDING))
        elif np.isnan(text[row]).any():
            refused.append((uid, NO_TEXT_EMBEDDING))
        else:
            good.append(row)
    return Embedded(
        uids=[uids[row] for row in good],
        image_embedding=image[good].astype(np.float16),
        text_embedding=text[good].astype(np.float16),
        refused=refused,
    )
