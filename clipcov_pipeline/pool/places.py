"""Where each good sample lies in its shard, so that it can be read without walking the tar.

A subset is an index of such places over the original shards: nothing is copied to train on it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.pool.captions import TXT, CaptionRule, caption_digest
from clipcov_pipeline.pool.tars import Group

MEMBERS = ("image", "caption", "json")
PLACES_SCHEMA = {
    "uid": pl.String,
    "key": pl.String,
    "image_ext": pl.String,
    **{f"{member}_{what}": pl.Int64 for member in MEMBERS for what in ("offset", "size")},
    "image_hash": pl.Int64,
    "caption_hash": pl.Int64,
}
# one more column, where a training draws one of several captions: the hash of each of a sample's
CHOICES_SCHEMA = {"caption_hashes": pl.List(pl.Int64)}


def places_schema(captions: CaptionRule) -> dict[str, Any]:
    """Return the columns of `places_of` under a rule for captions."""
    return {**PLACES_SCHEMA, **(CHOICES_SCHEMA if captions.draws else {})}


def places_of(group: Group, row: Mapping[str, Any], captions: CaptionRule = TXT) -> dict[str, Any]:
    """Return the row of `places_schema` of a good sample, whose row of the manifest is given.

    Offsets and sizes are in bytes, from the tar's first; null for a json that is not there and for a member
    that is stored sparse, whose bytes do not lie in one piece (such a sample is kept aside). The caption's
    are of the first member there of those that the rule reads: of the `.json` where it is not the `.txt`.
    The hashes are the first 64 bits of the sha256 of the image's bytes and of the captions that may count,
    one after the other: equal where those are.
    """
    image = group.image()
    assert image is not None  # the sample is good
    place: dict[str, Any] = {"uid": row["uid"], "key": group.key, "image_ext": image[0]}
    caption = next((suffix for suffix in captions.members if suffix in group.suffixes), "txt")
    for member, suffix in zip(MEMBERS, (image[0], caption, "json"), strict=True):
        offset, size = group.places.get(suffix, (None, None))
        place |= {f"{member}_offset": offset, f"{member}_size": size}
    place["image_hash"] = short_hash(row["image_sha256"])
    texts = captions.captions(group.get)
    place["caption_hash"] = short_hash(caption_digest(texts))
    if captions.draws:
        place["caption_hashes"] = [short_hash(caption_digest([text])) for text in texts]
    return place


def gather_places(files: Mapping[str, Path]) -> pl.DataFrame:
    """Return the places of all shards in their order: `PLACES_SCHEMA` and shard; ``files`` by shard name."""
    parts = [pl.scan_parquet(path).with_columns(shard=pl.lit(name)) for name, path in files.items()]
    return pl.concat(parts).collect()


def short_hash(sha256: str) -> int:
    """Return the first 64 bits of a sha256 in hex, as a signed integer."""
    return int.from_bytes(bytes.fromhex(sha256[:16]), "big", signed=True)
