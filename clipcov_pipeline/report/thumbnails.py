"""Small pictures of samples for pages that people look at; a picture that cannot be had says why."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.pixels import open_image, to_rgb
from clipcov_pipeline.pool.samples import image_digest, read_images
from clipcov_pipeline.pool.tars import NotATarError
from clipcov_pipeline.redaction import redacted

if TYPE_CHECKING:
    from PIL import Image

SIDE = 96  # pixels of the longer side

QUALITY = 70

Place = tuple[str, str]
"""(shard, key) of a sample."""


@dataclass(frozen=True)
class Thumbnail:
    """A WebP of at most ``SIDE`` x ``SIDE`` pixels, or why there is none."""

    webp: bytes | None
    problem: str | None = None


def thumbnails(
    shards: Mapping[str, Shard],
    wanted: Mapping[Place, str | None],
    storage_options: dict | None = None,
) -> dict[Place, Thumbnail]:
    """Return a thumbnail of every wanted sample, from the original shards.

    Args:
        shards: the pool's shards as they are now, by name.
        wanted: sample -> sha256 of its image as it was read, or None where that is not known: an image that
            was replaced since is not shown in its place.
    """
    found: dict[Place, Thumbnail] = {}
    keys_by_shard: dict[str, set[str]] = {}
    for name, key in wanted:
        keys_by_shard.setdefault(name, set()).add(key)
    for name, keys in keys_by_shard.items():
        images, problem = _images(shards.get(name), name, keys, storage_options)
        for key in keys:
            place = name, key
            found[place] = (
                _thumbnail(images[key], wanted[place]) if key in images else Thumbnail(None, problem)
            )
    return found


def _images(
    shard: Shard | None, name: str, keys: set[str], storage_options: dict | None
) -> tuple[dict[str, bytes], str]:
    """Return the images that can be read, and why the others cannot."""
    if shard is None:
        return {}, f"shard {name} is gone"
    try:
        return dict(read_images(shard, keys, storage_options)), f"no longer in shard {name}"
    except FileNotFoundError:
        return {}, f"shard {name} is gone"
    except NotATarError as error:
        return {}, f"shard {name} is {redacted(str(error))}"
    except Exception as error:  # every remote store has exceptions of its own
        return {}, f"shard {name} cannot be read ({type(error).__name__})"


def _thumbnail(data: bytes, sha256: str | None) -> Thumbnail:
    if sha256 is not None and image_digest(data) != sha256:
        return Thumbnail(None, "the image was replaced since it was read")
    try:
        return Thumbnail(make_thumbnail(data))
    except Exception as error:  # decoders of damaged files raise all sorts
        return Thumbnail(None, f"the image cannot be decoded ({type(error).__name__})")


def make_thumbnail(data: bytes, side: int = SIDE) -> bytes:
    """Return an encoded image as a small WebP, with the pixels that models see: nothing is transparent."""
    file = io.BytesIO()
    small_picture(data, side).save(file, "WEBP", quality=QUALITY, method=4)
    return file.getvalue()


def small_picture(data: bytes, side: int) -> "Image.Image":
    """Return an encoded image in RGB, made smaller where it is over ``side`` pixels in width or height."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the shard's check has taken or refused what Pillow warns of
        with open_image(data) as image:
            image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no more than is needed
            small = to_rgb(image)
    small.thumbnail((side, side))
    return small
