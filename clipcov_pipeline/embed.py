"""Embeds image-caption pairs with an open_clip model: which models may be named, loading one, running it.

The models are open_clip's own architectures and those in ``model_configs/`` of this package, which
`register_model_configs` makes known to open_clip; here, though not in a YAML, also ``hf-hub:`` and
``local-dir:`` names.
"""

import difflib
import io
import itertools
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipcov_pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from clipcov_pipeline.shards import Sample

MODEL_CONFIGS = Path(__file__).parent / "model_configs"
CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".npz"}

MIN_PAIRS = 30  # fewer say nothing of whether matched pairs are ahead
NO_IMAGE_EMBEDDING = "image_embedding_invalid"
NO_TEXT_EMBEDDING = "text_embedding_invalid"


@dataclass(frozen=True)
class ModelSpec:
    """An open_clip model: ``model`` is an architecture's name, ``pretrained`` its weights.

    ``pretrained`` is an open_clip tag, the path of a checkpoint file, or None (weights not yet trained, or
    named by ``model`` itself: ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``).
    """

    model: str
    pretrained: str | None = None


def model_names() -> list[str]:
    """Names of all architectures: open_clip's built-in ones and ours. Imports neither torch nor open_clip."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("open_clip is not installed: pip install 'open_clip_torch[training]'")
    folders = [Path(package.submodule_search_locations[0]) / "model_configs", MODEL_CONFIGS]
    return sorted(path.stem for folder in folders for path in folder.glob("*.json"))


def register_model_configs() -> None:
    """Make this package's architectures known to open_clip (``list_models`` then names them). Idempotent."""
    import open_clip

    if not {path.stem for path in MODEL_CONFIGS.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(MODEL_CONFIGS)


def check_model(spec: ModelSpec) -> None:
    """Check that a model can be had, as far as that is cheap: open_clip is imported for a tag only.

    Raises:
        InputError: unknown architecture or tag, missing checkpoint file or folder, or a tag whose weights
            were trained with QuickGELU under an architecture without it (open_clip only warns of that, and
            the embeddings are wrong).
    """
    schema, _, place = spec.model.partition(":")
    if schema in ("local-dir", "hf-hub"):
        if spec.pretrained:
            raise InputError(
                f"pretrained: {spec.pretrained!r} has no effect with model {spec.model!r}, which names its"
                " own weights; leave pretrained out"
            )
        if schema == "local-dir" and not (Path(place) / "open_clip_config.json").is_file():
            raise InputError(f"model: {spec.model!r} has no open_clip_config.json; give the folder of one")
        return
    names = model_names()
    if spec.model not in names:
        close = difflib.get_close_matches(spec.model, names, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() names them all"
        raise InputError(f"model: {spec.model!r} is not an open_clip architecture; {advice}")
    if spec.pretrained is None or Path(spec.pretrained).is_file():
        return
    if os.sep in spec.pretrained or Path(spec.pretrained).suffix in CHECKPOINT_SUFFIXES:
        raise InputError(
            f"pretrained: no checkpoint file at {spec.pretrained}; give an existing file or a tag"
        )
    _check_tag(spec.model, spec.pretrained)


def _check_tag(model: str, tag: str) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    found = open_clip.get_pretrained_cfg(model, tag)
    if not found:
        choice = f"choose one of {', '.join(tags)}" if tags else "this architecture has none"
        raise InputError(
            f"pretrained: {tag!r} is neither a file nor an open_clip tag of {model}; {choice}, or give the"
            " path of a checkpoint"
        )
    config = open_clip.get_model_config(model) or {}
    if bool(found.get("quick_gelu", False)) != bool(config.get("quick_gelu", False)):
        other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
        raise InputError(
            f"model: the weights {tag!r} were trained {'with' if found.get('quick_gelu') else 'without'}"
            f" QuickGELU, {model} is the other; use model {other!r}"
        )


def resolve_device(device: str) -> str:
    """Torch device for ``auto`` (cuda, else mps, else cpu); any other name is checked and returned.

    Raises:
        InputError: the device is not there.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, there in present.items() if there)
    if not present.get(device.split(":")[0], False):
        raise InputError(
            f"device: {device!r} is not on this machine; use auto or one of"
            f" {', '.join(name for name, there in present.items() if there)}"
        )
    return device


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

    def pixels_of(self, image: bytes) -> np.ndarray | None:
        """An encoded image resized and cropped for the model: uint8 [height, width, 3]; None if undecodable.

        Cheap to keep, unlike what the model takes; `encode_pixels` goes on from here.
        """
        from PIL import Image

        steps: list[Any] = self.preprocess.transforms[:-2]  # type: ignore[attr-defined]
        try:
            opened: Any = Image.open(io.BytesIO(image))
            for step in steps:
                opened = step(opened)
            return np.asarray(opened)
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
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
        from PIL import Image, UnidentifiedImageError

        try:
            opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
            return self.preprocess(opened)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
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
