"""The one way from an image's bytes to its pixels: embedding, training, scoring and looking see the same.

The pixels are those of webdataset's ``pilrgb``, which open_clip_train and CLIP_benchmark decode with: RGB
before anything is resized, transparency dropped, no turning by EXIF.
"""

import io
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# suffix of a member -> format inside; in open_clip_train's order of preference, for a sample that has several
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "avif", "gif", "bmp", "tif", "tiff")
# what may be inside a file with one of these: crawlers often keep the address's extension
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
# of more than 8 bits a channel, which a conversion to RGB clips: all but black turns white
HIGH_BIT_DEPTH = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
HighBitDepth = Literal["refuse", "scale"]


class HighBitDepthError(ValueError):
    """An image of more than 8 bits a channel, which is not to be scaled."""


def open_image(data: bytes) -> "Image.Image":
    """Open an image of `IMAGE_FORMATS`; nothing is decoded yet.

    Raises what Pillow does: UnidentifiedImageError for another format.
    """
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def to_rgb(image: "bytes | Image.Image", high_bit_depth: HighBitDepth = "refuse") -> "Image.Image":
    """Decode an image to RGB.

    Args:
        image: a file's bytes, or an image that is open.
        high_bit_depth: what becomes of 16-bit and 32-bit grey: refused, or scaled linearly so that the
            image's smallest value is black and its largest white.

    Raises:
        HighBitDepthError: more than 8 bits a channel, and not to be scaled.
        Exception: what Pillow raises for bytes that it cannot decode.
    """
    opened = open_image(image) if isinstance(image, bytes) else image
    opened.load()
    if opened.mode not in HIGH_BIT_DEPTH:
        return opened.convert("RGB")
    if high_bit_depth == "refuse":
        raise HighBitDepthError(f"found an image of mode {opened.mode}, expected 8 bits a channel")
    return _scaled(opened)


def _scaled(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("found values that are not finite, expected numbers in every pixel")
    low, high = values.min(), values.max()
    grey = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")


def is_one_colour(image: "Image.Image") -> bool:
    """Whether every pixel of an RGB image is the same."""
    return all(low == high for low, high in image.getextrema())  # type: ignore[misc]
