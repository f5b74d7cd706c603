"""The one way from an image's bytes to its pixels: embedding, training, scoring and looking see the same.

The pixels are those of webdataset's ``pilrgb``, which open_clip_train and CLIP_benchmark decode with: RGB
before anything is resized, transparency dropped, no turning by EXIF, the first picture of several. Only where
these would be blank (more than 8 bits a channel) they are scaled.

Which images are usable at all is said by `ImageRules`, before anything is decoded. Pillow's own bound on
pixels (``Image.MAX_IMAGE_PIXELS``) has no part in it.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Literal, NamedTuple

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
MAX_PIXELS = 89_478_485  # as Pillow has it; three bytes each
RESIZED_SIDE = 512  # the largest input of open_clip's models: no manifest depends on which model comes after

_UNBOUNDED = Lock()  # held while Pillow's bound, which is of the whole process, is off


class ImageRules(NamedTuple):
    """Which images are usable: those of the YAML's section ``shards``.

    Attributes:
        max_pixels: width x height of a usable image at most.
        max_resized_pixels: the same once its short side is `RESIZED_SIDE`, as open_clip resizes before it
            crops: what a very thin image costs.
        high_bit_depth: whether 16-bit, 32-bit and float grey is refused or scaled as `to_rgb` says.
    """

    max_pixels: int = MAX_PIXELS
    max_resized_pixels: int = MAX_PIXELS
    high_bit_depth: HighBitDepth = "refuse"


RULES = ImageRules()  # where no YAML says otherwise


class UnusableImageError(ValueError):
    """Why an image is not usable, in words, and the `samples.SampleStatus` that this is."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def open_image(data: bytes) -> "Image.Image":
    """Open an image of `IMAGE_FORMATS`, however large; nothing is decoded yet, see `check_rules`.

    Raises:
        UnusableImageError: another format, or a damaged header.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        try:
            return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError:
            with _without_pillows_bound():
                return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        reason = f"not an image of the formats {', '.join(IMAGE_FORMATS)}"
        raise UnusableImageError("undecodable_image", reason) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise all sorts
        raise _undecodable(error) from error


def check_rules(image: "Image.Image", rules: ImageRules) -> None:
    """Look at an opened image's header.

    Raises:
        UnusableImageError: too many pixels, too thin, or of high bit depth, by the rules.
    """
    width, height = image.size
    if width * height > rules.max_pixels:
        raise UnusableImageError(
            "too_many_pixels",
            f"{width} x {height} = {width * height} pixels, over the bound of {rules.max_pixels}",
        )
    resized = RESIZED_SIDE * (RESIZED_SIDE * max(width, height) // min(width, height))
    if resized > rules.max_resized_pixels:
        raise UnusableImageError(
            "too_thin",
            f"{width} x {height}: {resized} pixels once its short side is {RESIZED_SIDE}, over the bound of"
            f" {rules.max_resized_pixels}",
        )
    if image.mode in HIGH_BIT_DEPTH and rules.high_bit_depth == "refuse":
        raise UnusableImageError(
            "high_bit_depth", f"mode {image.mode}, more than 8 bits a channel; high_bit_depth: scale takes it"
        )


def to_rgb(image: "bytes | Image.Image") -> "Image.Image":
    """Decode an image, a file's bytes or one that is open, to RGB.

    Of more than 8 bits a channel it is scaled linearly, so that its own smallest value is black (0) and its
    largest white (255), rounded half to even; all black where they are the same. Nothing is bounded here.

    Raises:
        UnusableImageError: it cannot be decoded.
    """
    opened = open_image(image) if isinstance(image, bytes) else image
    rgb = _decoded(opened)
    return rgb.copy() if rgb is opened else rgb  # a file's image holds on to its decoder


def usable_rgb(data: bytes, rules: ImageRules) -> "Image.Image":
    """Decode an image file to RGB as `to_rgb`, if the rules take it.

    Raises:
        UnusableImageError: as `check_rules` and `to_rgb`.
    """
    opened = open_image(data)
    check_rules(opened, rules)
    return to_rgb(opened)


def one_colour(opened: "Image.Image") -> tuple[int, int, int] | None:
    """Return the RGB value of every pixel where all have the same, else None; decodes as `to_rgb`.

    Raises:
        UnusableImageError: it cannot be decoded.
    """
    found = _decoded(opened).getcolors(1)  # ends at the first pixel of another colour
    return found[0][1] if found else None  # type: ignore[return-value]


def _decoded(opened: "Image.Image") -> "Image.Image":
    """In RGB; the image itself where it is that already."""
    try:
        _load(opened)
        if opened.mode in HIGH_BIT_DEPTH:
            return _scaled(opened)
        return opened if opened.mode == "RGB" else opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise all sorts
        raise _undecodable(error) from error


def _load(opened: "Image.Image") -> None:
    """Decode; an image that is over Pillow's bound has been let through by the rules."""
    from PIL import Image

    try:
        opened.load()
    except (
        Image.DecompressionBombError
    ):  # TIFF asks again, and of its tiles, which may be bombs in a small image
        if opened.width * opened.height <= 2 * (Image.MAX_IMAGE_PIXELS or 0):
            raise
        with _without_pillows_bound():
            opened.load()


@contextmanager
def _without_pillows_bound() -> Iterator[None]:
    from PIL import Image

    with _UNBOUNDED:
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def _scaled(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("found values that are not finite, expected numbers in every pixel")
    low, high = values.min(), values.max()
    grey = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")


def _undecodable(error: Exception) -> UnusableImageError:
    # an address in the text would make the manifest differ from one run to the next
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", str(error)) or type(error).__name__
    return UnusableImageError("undecodable_image", text)
