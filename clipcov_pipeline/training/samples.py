"""Makes a batch of an index: image and caption read, decoded, varied and tokenized as open_clip_train does.

What a sample looks like depends on its place in the training alone: the random numbers that it is varied with
are seeded by (seed, place), so that no number of data-loading processes changes a result.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import to_rgb
from clipcov_pipeline.training.draws import Rows
from clipcov_pipeline.training.member_reads import Pair

KEPT_BYTES = (
    2**28
)  # of decoded images and tokens that each data-loading process keeps, as long as it has room
_WORD = 2**64 - 1


class Wanted(NamedTuple):
    """A batch to be made: rows int64 [n], the place of each in the line of the training, int64 [n], and which
    of its captions it is given with, int64 [n]; None: the first."""

    rows: Rows
    places: npt.NDArray[np.int64]
    captions: Rows | None = None


class Made(NamedTuple):
    """A batch: images float32 [n, 3, h, w], tokens int64 [n, context length], rows as in `Wanted`."""

    images: torch.Tensor
    texts: torch.Tensor
    rows: Rows


class Refused(NamedTuple):
    """What a data-loading process answers in place of a batch: torch would wrap the error in a traceback."""

    message: str


class Reads(Protocol):
    """Where the bytes of a row come from: `read` is asked for rows that were prepared together before."""

    def prepare(self, rows: Rows) -> None: ...

    def read(self, row: int) -> Pair: ...


class Samples(torch.utils.data.Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """The samples of a training, a batch at a time: torch's fetcher calls ``__getitems__`` with a `Wanted`.

    preprocess: PIL image -> tensor, open_clip's. tokenize: caption -> int64 [1, context length], open_clip's.
    """

    def __init__(
        self,
        reads: Reads,
        preprocess: Callable[[Any], Any],
        tokenize: Callable[[str], Any],
        seed: int,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._reads, self._tokenize, self._seed = reads, tokenize, seed
        self._vary, self._finish = _in_two(preprocess)
        self._room = kept_bytes
        self._images: dict[int, Image.Image] = {}
        self._tokens: dict[int, list[torch.Tensor]] = {}  # of each caption
        # such a tokenizer draws anew which words of a long caption it keeps
        self._same_tokens = getattr(tokenize, "reduction_fn", None) is None
        self._seed_numpy = _uses_timm(preprocess)

    def __getitems__(self, wanted: Wanted) -> Made | Refused:
        """A batch; the random numbers of this process are as before afterwards."""
        state = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
        try:
            new = [row for row in wanted.rows.tolist() if row not in self._images]
            self._reads.prepare(np.asarray(new, np.int64))
            captions = np.zeros_like(wanted.rows) if wanted.captions is None else wanted.captions
            columns = (wanted.rows.tolist(), captions.tolist(), wanted.places.tolist())
            made = [
                self._sample(row, caption, place_seed(self._seed, place))
                for row, caption, place in zip(*columns, strict=True)
            ]
        except InputError as error:
            return Refused(str(error))
        finally:
            torch.default_generator.set_state(state[0])
            random.setstate(state[1])
            np.random.set_state(state[2])
        images, texts = zip(*made, strict=True)
        return Made(self._finish(images), torch.stack(texts), wanted.rows)

    def _sample(self, row: int, caption: int, seed: int) -> tuple[Any, torch.Tensor]:
        image, tokens = self._images.get(row), self._tokens.get(row)
        if image is None or tokens is None:
            stored, captions = self._reads.read(row)
            image, tokens = to_rgb(stored), [self._tokenize(text)[0] for text in captions]
            self._keep(row, image, tokens)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if self._seed_numpy:
            np.random.seed(seed % 2**32)
        return self._vary(image), tokens[caption]

    def _keep(self, row: int, image: Image.Image, tokens: list[torch.Tensor]) -> None:
        of_tokens = sum(part.numel() * part.element_size() for part in tokens)
        size = image.width * image.height * 4 + of_tokens + 512
        if size <= self._room and self._same_tokens:
            self._room -= size
            self._images[row], self._tokens[row] = image, tokens


def place_seed(seed: int, place: int) -> int:
    """64 random bits for a place of a training's line (splitmix64)."""
    word = ((seed & _WORD) * 0xD1342543DE82EF95 + (place + 1) * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _in_two(preprocess: Any) -> tuple[Callable[[Any], Any], Callable[[Any], torch.Tensor]]:
    """(what is done to each image, what is done to all images of a batch at once).

    Conversion to float and normalization are the same bits for a batch as for its images one by one, in a
    tenth of the time; they end open_clip's preprocessing unless timm makes it.
    """
    from open_clip.transform import MaybeToTensor
    from torchvision.transforms import Compose, Normalize

    steps = getattr(preprocess, "transforms", [])
    if not isinstance(preprocess, Compose) or len(steps) < 3:
        return preprocess, _stacked
    to_tensor, normalize = steps[-2:]
    if not isinstance(to_tensor, MaybeToTensor) or not isinstance(normalize, Normalize):
        return preprocess, _stacked
    vary = Compose(steps[:-2])

    def finish(images: Any) -> torch.Tensor:
        if not all(isinstance(image, Image.Image) for image in images):
            return torch.stack([normalize(to_tensor(image)) for image in images])
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return normalize(pixels.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div(255))

    return vary, finish


def _stacked(images: Any) -> torch.Tensor:
    return torch.stack([torch.as_tensor(image) for image in images])


def _uses_timm(preprocess: Any) -> bool:
    steps = getattr(preprocess, "transforms", [preprocess])
    return any(type(step).__module__.startswith("timm") for step in steps)
