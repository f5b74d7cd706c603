"""What a model finds nearest to a few fixed queries of an evaluation set: does the meaning survive?"""

import hashlib
from typing import Any

import numpy as np

from clipcov_pipeline.evaluation.pairs import EmbeddedPairs

QUERIES = 12

NEIGHBOURS = 5


def fixed_queries(pairs: EmbeddedPairs, count: int = QUERIES) -> list[int]:
    """Return rows of up to ``count`` pairs by a hash of their uid: the same for every model.

    Captions and images are distinct, because a query that stands for many has no nearest answer.
    """
    order = sorted(
        range(len(pairs.uids)), key=lambda row: hashlib.sha256(pairs.uids[row].encode()).hexdigest()
    )
    rows: list[int] = []
    captions: set[str] = set()
    images: set[str] = set()
    for row in order:
        caption, image = pairs.captions[row], pairs.image_sha256[row]
        if caption not in captions and image not in images:
            rows.append(row)
        captions.add(caption)
        images.add(image)
        if len(rows) == count:
            break
    return rows


def nearest(pairs: EmbeddedPairs, queries: int = QUERIES, k: int = NEIGHBOURS) -> list[dict[str, Any]]:
    """Return each fixed query with its nearest images, by its image and by its caption.

    A query is uid, shard, key, caption, ``image_to_image`` and ``caption_to_image`` (up to ``k`` of uid,
    shard, key, caption, similarity, nearest first, each image file once, the query's own left out of the
    first), ``rank`` of its own image by its caption (from 1, ties before it) and ``of`` how many images.
    What is not defined, because the model gives no embedding (NaN), is empty or None.
    """
    images = np.nan_to_num(pairs.image_embedding, nan=0.0)
    absent = np.asarray(np.isnan(pairs.image_embedding).any(axis=1))
    found = []
    for row in fixed_queries(pairs, queries):
        by_image = _similarity(pairs.image_embedding[row], images, absent)
        by_caption = _similarity(pairs.text_embedding[row], images, absent)
        found.append(
            {
                **_names(pairs, row),
                "image_to_image": _first(pairs, by_image, k, {pairs.image_sha256[row]}),
                "caption_to_image": _first(pairs, by_caption, k, set()),
                "rank": _rank(by_caption, row),
                "of": len(images),
            }
        )
    return found


def _similarity(query: np.ndarray, images: np.ndarray, absent: np.ndarray) -> np.ndarray | None:
    if np.isnan(query).any():
        return None
    values = images @ query
    values[absent] = -np.inf
    return values


def _rank(values: np.ndarray | None, row: int) -> int | None:
    if values is None or np.isneginf(values[row]):
        return None
    return int((values >= values[row]).sum())


def _first(pairs: EmbeddedPairs, values: np.ndarray | None, k: int, skip: set[str]) -> list[dict[str, Any]]:
    if values is None:
        return []
    found, seen = [], set(skip)
    for row in np.argsort(-values, kind="stable").tolist():
        if len(found) == k or np.isneginf(values[row]):
            break
        if pairs.image_sha256[row] in seen:
            continue
        seen.add(pairs.image_sha256[row])
        found.append({**_names(pairs, row), "similarity": round(float(values[row]), 4)})
    return found


def _names(pairs: EmbeddedPairs, row: int) -> dict[str, Any]:
    return {
        "uid": pairs.uids[row],
        "shard": pairs.shards[row],
        "key": pairs.keys[row],
        "caption": pairs.captions[row],
        "image_sha256": pairs.image_sha256[row],
    }
