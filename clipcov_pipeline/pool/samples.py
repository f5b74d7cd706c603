"""Samples: those of a shard one after another, some by key, and whether one is usable, or why not."""

import hashlib
import json
import tarfile
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import polars as pl

from clipcov_pipeline.pool.captions import MEMBERS, TXT, CaptionRule, NoCaptionError
from clipcov_pipeline.pool.listing import Shard, open_shard
from clipcov_pipeline.pool.pixels import (
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    HighBitDepth,
    ImageRules,
    UnusableImageError,
    check_rules,
    one_colour,
    open_image,
)
from clipcov_pipeline.pool.tars import (
    Group,
    NotATarError,
    StrictTarInfo,
    iter_groups,
    key_and_suffix,
    why_no_tar,
)


class SampleStatus(StrEnum):
    """Why a sample is or is not usable; where several hold, the first below (after `ok`) is given."""

    ok = "ok"
    truncated = "truncated"
    duplicate_key = "duplicate_key"
    missing_image = "missing_image"
    missing_caption = "missing_caption"
    non_utf8_caption = "non_utf8_caption"
    empty_caption = "empty_caption"
    too_many_pixels = "too_many_pixels"
    too_thin = "too_thin"
    high_bit_depth = "high_bit_depth"
    undecodable_image = "undecodable_image"
    one_colour = "one_colour"
    stored_sparse = "stored_sparse"
    unreadable_row = "unreadable_row"
    duplicate_uid = "duplicate_uid"


@dataclass(frozen=True)
class Sample:
    """One image-caption pair; `image` is the file as stored (not decoded), `caption` is stripped.

    Where a training draws one of several captions, it is the first of them.
    """

    key: str
    image: bytes
    image_ext: str
    caption: str
    meta: dict[str, Any] | None


def iter_samples(
    shard: Shard,
    keys: Container[str] | None,
    storage_options: dict | None = None,
    captions: CaptionRule = TXT,
) -> Iterator[Sample]:
    """Yield the samples of a shard with these keys (as in the manifest), in the tar's order.

    `keys=None` gives every sample that has an image and, by the rule for captions, a readable caption. Images
    are not decoded here: take the keys from the manifest's `ok` rows. Of several samples with one key the
    first counts, as there.

    Raises:
        NotATarError: the file is no tar.
    """
    for group in iter_groups(shard, keys, storage_options):
        if (image := group.image()) is None:
            continue
        try:
            caption = captions.captions(group.get)[0]
        except NoCaptionError:
            continue
        extension, data = image
        yield Sample(key=group.key, image=data, image_ext=extension, caption=caption, meta=group.meta())


def read_images(
    shard: Shard, keys: Collection[str], storage_options: dict | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield (key, image as stored) of these keys, as far as the shard still holds them; for a look at a few.

    Headers and these images are read, nothing else; the headers once a process. Images are not checked.

    Raises:
        OSError: the file cannot be read.
        NotATarError: the file is no tar.
    """
    places = _image_places(shard.url, shard.version, json.dumps(storage_options or {}, sort_keys=True))
    wanted = places.filter(pl.col("key").is_in(list(keys)))
    if wanted.height:
        with open_shard(shard.url, storage_options, seekable=True) as file:
            for key, offset, size in wanted.iter_rows():
                file.seek(offset)
                yield key, file.read(size)


@cache  # every gallery looks into every shard; a table takes a few dozen bytes a sample
def _image_places(url: str, version: str, storage_options: str) -> pl.DataFrame:  # noqa: ARG001 (a changed shard has another version)
    """key, offset and size of the image of each key's first sample, in the tar's order."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    current = None
    with open_shard(url, json.loads(storage_options), seekable=True) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo)  # noqa: SIM115
        except tarfile.TarError as error:
            file.seek(0)
            raise NotATarError(why_no_tar(file.read(8), error)) from None
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                key, suffix = key_and_suffix(member)
                if key is None or (key != current and key in places):
                    continue
                current = key
                places.setdefault(key, {}).setdefault(suffix.lower(), (member.offset_data, member.size))
        except tarfile.TarError:
            pass  # it breaks off: what came before can be read
    found = [
        (key, *next(by_suffix[suffix] for suffix in IMAGE_EXTENSIONS if suffix in by_suffix))
        for key, by_suffix in places.items()
        if not by_suffix.keys().isdisjoint(IMAGE_EXTENSIONS)
    ]
    schema = {"key": pl.String, "offset": pl.Int64, "size": pl.Int64}
    return pl.DataFrame(found, schema=schema, orient="row")


def image_digest(data: bytes) -> str:
    """Return what the manifest has as ``image_sha256``: of the file as stored, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def is_checked(_key: str, suffix: str) -> bool:
    """Return whether a member's bytes are looked at by `check_sample`."""
    return suffix in IMAGE_EXTENSIONS or suffix in MEMBERS


def check_sample(
    group: Group, row: dict, rules: ImageRules, captions: CaptionRule = TXT
) -> tuple[SampleStatus, str | None]:
    """Return status and reason; fills in the caption and what is known of the image on the way."""
    if group.damage is not None:
        return SampleStatus.truncated, group.damage
    image, no_caption = group.image(), None
    try:
        row["caption"] = captions.captions(group.get)[0]
    except NoCaptionError as error:
        no_caption = error
    if image is not None:
        row["image_ext"], row["image_sha256"] = image[0], image_digest(image[1])
    found = ", ".join(f".{suffix}" for suffix in sorted(group.suffixes))
    if not group.first:
        return (
            SampleStatus.duplicate_key,
            f"an earlier sample of this shard has the same key (here: {found}); "
            "the members of a sample must be neighbours in the tar",
        )
    if image is None:
        expected = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        return SampleStatus.missing_image, f"no member {expected} (there: {found})"
    if no_caption is not None:
        status = SampleStatus(no_caption.status)
        there = f" (there: {found})" if status is SampleStatus.missing_caption else ""
        return status, f"{no_caption}{there}"
    return _check_image(image[1], rules.max_pixels, row, rules.max_resized_pixels, rules.high_bit_depth)


def _check_image(
    data: bytes,
    max_pixels: int,
    row: dict,
    max_resized_pixels: int = MAX_PIXELS,
    high_bit_depth: HighBitDepth = "refuse",
) -> tuple[SampleStatus, str | None]:
    try:
        with open_image(data) as image:
            row["width"], row["height"] = image.size
            check_rules(image, ImageRules(max_pixels, max_resized_pixels, high_bit_depth))
            if (colour := one_colour(image)) is not None:
                return SampleStatus.one_colour, f"every pixel is {colour} in RGB"
    except UnusableImageError as error:
        return SampleStatus(error.status), str(error)
    return SampleStatus.ok, None
