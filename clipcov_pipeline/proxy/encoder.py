"""Embeds image-caption pairs with an open_clip model: which models may be named, loading one, running it.

The models are open_clip's own architectures and those in ``model_configs/`` of this package, which
`register_model_configs` makes known to open_clip; here, though not in a YAML, also ``hf-hub:`` and
``local-dir:`` names.
"""

import itertools
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import to_rgb
from clipcov_pipeline.proxy.models import ModelSpec, check_model, register_model_configs, resolve_device

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Encoder:
    """A loaded model with open_clip's own evaluation preprocessing and tokenizer; embeds images and texts.

    All embeddings are float32 [n, embed_dim] rows of unit norm. A row that cannot be one (undecodable image,
    NaN, infinite or zero output) is all NaN: `embed_samples` refuses it.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        preprocess: Callable[["Image.Image"], "torch.Tensor"],
        tokenizer: Callable[[list[str]], "torch.Tensor"],
        *,
        embed_dim: int,
        device: str,
        batch_size: int = 256,
        workers: int | None = None,
    ) -> None:
        self.model = model
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self.device = device
        self.batch_size = batch_size
        self.workers = workers or min(16, os.cpu_count() or 1)

    def encode_images(
        self,
        images: "Iterable[bytes | Image.Image]",
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embed encoded or opened images, read lazily: decoding in threads runs ahead of the model.

        The model's preprocessing is given what `pixels.to_rgb` makes of each, however large it is.
        ``progress`` is called after each batch with the number of images done.
        """
        done, rows = 0, []
        for pixels in self._decoded_batches(images):
            rows.append(self._image_batch(pixels))
            done += len(pixels)
            if progress:
                progress(done)
        return self._stack(rows)

    @property
    def pixels_key(self) -> str:
        """What `pixels_of` depends on besides the image, in words."""
        return repr(self.preprocess)

    def pixels_of(self, image: "bytes | Image.Image") -> np.ndarray | None:
        """An image resized and cropped for the model: uint8 [height, width, 3]; None if undecodable.

        Cheap to keep, unlike what the model takes; `encode_pixels` goes on from here.
        """
        steps: list[Any] = self.preprocess.transforms[:-2]  # type: ignore[attr-defined]
        try:
            pixels: Any = to_rgb(image)
            for step in steps:
                pixels = step(pixels)
            return np.asarray(pixels)
        except (OSError, ValueError):
            return None

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Embed images as `pixels_of` gives them, uint8 [n, height, width, 3]: what `encode_images` gives."""
        import torch

        normalize: Any = self.preprocess.transforms[-1]  # type: ignore[attr-defined]
        mean, std = (torch.tensor(values)[:, None, None] for values in (normalize.mean, normalize.std))
        rows = []
        for start in range(0, len(pixels), self.batch_size):
            batch = torch.from_numpy(pixels[start : start + self.batch_size]).permute(0, 3, 1, 2)
            scaled = batch.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
            rows.append(self._run("encode_image", scaled.sub_(mean).div_(std)))
        return self._stack(rows)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; those longer than the model's context are cut off, as open_clip's tokenizer does."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(list(texts[start : start + self.batch_size]))
            rows.append(self._run("encode_text", tokens))
        return self._stack(rows)

    def _decode(self, image: "bytes | Image.Image") -> "torch.Tensor | None":
        try:
            return self.preprocess(to_rgb(image))
        except (OSError, ValueError):
            return None

    def _decoded_batches(
        self, images: "Iterable[bytes | Image.Image]"
    ) -> "Iterator[list[torch.Tensor | None]]":
        """Lists of up to batch_size preprocessed images; at most two batches are decoded ahead."""
        source = iter(images)
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = deque(
                pool.submit(self._decode, image) for image in itertools.islice(source, 2 * self.batch_size)
            )
            while waiting:
                batch = [waiting.popleft().result() for _ in range(min(self.batch_size, len(waiting)))]
                waiting.extend(
                    pool.submit(self._decode, image) for image in itertools.islice(source, len(batch))
                )
                yield batch

    def _image_batch(self, pixels: "list[torch.Tensor | None]") -> np.ndarray:
        import torch

        good = [row for row, image in enumerate(pixels) if image is not None]
        embedded = np.full((len(pixels), self.embed_dim), np.nan, np.float32)
        if good:
            embedded[good] = self._run("encode_image", torch.stack([pixels[row] for row in good]))  # type: ignore[misc]
        return embedded

    def _run(self, method: str, inputs: "torch.Tensor") -> np.ndarray:
        """Unit rows, float32 [n, d], NaN where there is no such row."""
        import torch

        kind = torch.device(self.device).type
        with (
            torch.inference_mode(),
            torch.autocast(kind, dtype=torch.float16, enabled=kind == "cuda"),
        ):
            if kind == "cuda":
                inputs = inputs.pin_memory()
            output = getattr(self.model, method)(inputs.to(self.device, non_blocking=True))
        rows = output.float()
        norm = rows.norm(dim=1, keepdim=True)
        good = torch.isfinite(norm) & (norm > 0)
        return torch.where(good, rows / norm, torch.nan).cpu().numpy()

    def _stack(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows) if rows else np.empty((0, self.embed_dim), np.float32)


def load_encoder(
    spec: ModelSpec, *, device: str = "auto", batch_size: int = 256, workers: int | None = None
) -> Encoder:
    """Load a model with its weights for inference (on a GPU: under fp16 autocast).

    Args:
        spec: the model; it must come with weights.
        device: torch device, or ``auto``.
        batch_size: images or texts a forward pass.
        workers: image decoding threads; default one a core, at most 16.

    Raises:
        InputError: as `check_model`; no weights named; a checkpoint that is broken or does not fit.
    """
    check_model(spec)
    if spec.pretrained is None and ":" not in spec.model:
        raise InputError(
            f"pretrained: {spec.model} has no weights named, its embeddings would be random; give an"
            " open_clip tag or the path of a checkpoint"
        )
    import open_clip

    register_model_configs()
    where = resolve_device(device)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            spec.model, pretrained=spec.pretrained, device=where
        )
    except (RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if spec.pretrained is None or not Path(spec.pretrained).is_file():
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"pretrained: {spec.pretrained} cannot be loaded into model {spec.model} ({reason[:200]});"
            " name the architecture that it was trained with"
        ) from error
    config: dict[str, Any] = open_clip.get_model_config(spec.model)  # type: ignore[assignment]
    return Encoder(
        model.eval(),
        preprocess,  # type: ignore[arg-type]
        open_clip.get_tokenizer(spec.model),
        embed_dim=config["embed_dim"],
        device=where,
        batch_size=batch_size,
        workers=workers,
    )
