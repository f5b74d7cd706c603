"""Has open_clip_train read tars as all others here read shards: image and caption, decoded the same way.

Left to itself it decodes every member of a sample, drops the pair where one of them cannot be decoded, and
knows images by four suffixes only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS, to_rgb


@contextmanager
def pairs_as_everywhere() -> Iterator[None]:
    """Inside the block open_clip_train gets its pairs from `decoded_pair`, for training and validation.

    Pillow's bound on pixels, which a random crop of a large image meets again, is off: which images are too
    large was said when the shards were read.
    """
    import webdataset
    from open_clip_train import data
    from PIL import Image

    def decode(_spec: str, handler: Any) -> Any:
        return webdataset.map(decoded_pair, handler=handler)  # pyright: ignore[reportAttributeAccessIssue]

    module: Any = webdataset
    before = module.decode, data.filter_no_caption_or_no_image, Image.MAX_IMAGE_PIXELS
    module.decode, data.filter_no_caption_or_no_image, Image.MAX_IMAGE_PIXELS = decode, is_pair, None
    try:
        yield
    finally:
        module.decode, data.filter_no_caption_or_no_image, Image.MAX_IMAGE_PIXELS = before


def is_pair(sample: dict[str, Any]) -> bool:
    """Whether a sample, a value by suffix, has an image and a caption."""
    return "txt" in sample and any(extension in sample for extension in IMAGE_EXTENSIONS)


def decoded_pair(sample: dict[str, Any]) -> dict[str, Any]:
    """The image in RGB, under a suffix that open_clip_train looks for, and the caption of a sample.

    Raises:
        UnusableImageError: the image cannot be decoded.
        UnicodeDecodeError: the caption is no UTF-8.
    """
    extension = next(extension for extension in IMAGE_EXTENSIONS if extension in sample)
    own = {name: value for name, value in sample.items() if name.startswith("__")}
    return {**own, "png": to_rgb(sample[extension]), "txt": sample["txt"].decode("utf-8")}
