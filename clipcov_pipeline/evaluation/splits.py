"""Embeds a split of an evaluation folder; its decoded images stay in memory for the next arm."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import psutil

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.probe import stratified
from clipcov_pipeline.pool.captions import caption_text
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS, RULES, ImageRules, UnusableImageError, usable_rgb
from clipcov_pipeline.pool.tars import Group, NotATarError, iter_all_groups, map_in_order
from clipcov_pipeline.proxy.prompts import TextEncoder

if TYPE_CHECKING:
    from PIL import Image

KEPT_BYTES = 1 << 30

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a container sees the whole machine's free memory

_CHUNK = 1024

NO_LABEL = -1


class FolderEncoder(TextEncoder, Protocol):
    """What is needed of an `Encoder` to embed a folder; rows are float32 [n, d], of unit norm or NaN."""

    @property
    def pixels_key(self) -> str: ...

    def pixels_of(self, image: "Image.Image") -> np.ndarray | None: ...

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray: ...


@dataclass
class Chunk:
    """Some samples of a shard, decoded: pixels uint8 [n, height, width, 3]; labels int64 [n], -1 for none."""

    pixels: np.ndarray
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    damaged: list[str]
    """``KEY: why``, of samples that are not among the n."""


def kept_bytes(processes: int) -> int:
    """Return how many bytes decoded images may take: at least 1 GiB, at most half of what is free now.

    Args:
        processes: how many do the same side by side; they share that half.
    """
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    free = psutil.virtual_memory().available
    if limit != "max":
        free = min(free, int(limit))
    return max(KEPT_BYTES, free // (2 * processes))


class DecodedImages:
    """Decoded chunks of shards, kept as far as a bound of memory allows, for the next checkpoint.

    Decoding 32-pixel images takes a quarter of the time that the smallest model takes for them on a CPU, and
    more than a model on a GPU.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used = 0
        self._kept: dict[Any, list[Chunk]] = {}

    def chunks(self, key: Any, read: Callable[[], Iterable[Chunk]]) -> Iterator[Chunk]:
        """Yield what ``read`` gives, the second time from memory if it fitted."""
        if key in self._kept:
            yield from self._kept[key]
            return
        found: list[Chunk] | None = []
        size = 0
        for chunk in read():
            size += chunk.pixels.nbytes
            if self.used + size > self.max_bytes:
                found = None
            if found is not None:
                found.append(chunk)
            yield chunk
        if found is not None:
            self._kept[key] = found
            self.used += size


@dataclass(frozen=True)
class EmbeddedSplit:
    """The readable samples of a split, embedded: float32 [n, d], unit rows or NaN."""

    image_embedding: np.ndarray
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    damaged: list[str] = field(default_factory=list)

    @property
    def n_without_embedding(self) -> int:
        """Images that the model gives no finite embedding: counted as misses."""
        return int(np.isnan(self.image_embedding).any(axis=1).sum())


def embed_split(
    encoder: FolderEncoder,
    shards: Sequence[Shard],
    decoded: DecodedImages,
    chosen: frozenset[tuple[str, str]] | None = None,
    rules: ImageRules = RULES,
) -> EmbeddedSplit:
    """Decode and embed the samples of shards, or of them those chosen by (shard name, key).

    Args:
        encoder: the loaded model.
        shards: of one split.
        decoded: where decoded images are kept.
        chosen: samples to read; None for all.
        rules: which images are usable; others are among the damaged.

    Raises:
        InputError: a shard that is no tar, or no readable sample in any of them.
    """
    embedded, labels, captions, damaged = [], [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of images that are odd but readable
        for shard, chunk in _chunks(encoder, shards, decoded, chosen, rules):
            if len(chunk.pixels):
                embedded.append(encoder.encode_pixels(chunk.pixels))
            labels.append(chunk.labels)
            captions += chunk.captions
            damaged += [f"{shard.name}/{reason}" for reason in chunk.damaged]
    if not embedded:
        where = str(Path(shards[0].url).parent)
        first = f", first {damaged[0]}" if damaged else ""
        raise InputError(f"{where}: none of its {len(damaged)} images is readable{first}; copy it again")
    return EmbeddedSplit(np.concatenate(embedded), np.concatenate(labels), captions, damaged)


def _chunks(
    encoder: FolderEncoder,
    shards: Sequence[Shard],
    decoded: DecodedImages,
    chosen: frozenset[tuple[str, str]] | None,
    rules: ImageRules,
) -> Iterator[tuple[Shard, Chunk]]:
    for shard in shards:
        keys = None if chosen is None else frozenset(key for name, key in chosen if name == shard.name)
        if keys is None or keys:
            read = partial(_decode, encoder, shard, keys, rules)
            for chunk in decoded.chunks((shard, keys, rules, encoder.pixels_key), read):
                yield shard, chunk


def _decode(
    encoder: FolderEncoder, shard: Shard, keys: frozenset[str] | None, rules: ImageRules
) -> Iterator[Chunk]:
    def one(group: Group) -> tuple[Group, np.ndarray | None, str | None]:
        image = group.image()
        if not image or group.damage or not group.first:
            return group, None, group.damage
        try:
            return group, encoder.pixels_of(usable_rgb(image[1], rules)), None
        except UnusableImageError as error:
            return group, None, f"{error.status}, {error}"

    pixels: list[np.ndarray] = []
    labels: list[int] = []
    captions: list[tuple[str, ...]] = []
    damaged: list[str] = []

    def chunk() -> Chunk:
        stacked = np.stack(pixels) if pixels else np.empty((0, 1, 1, 3), np.uint8)
        return Chunk(stacked, np.array(labels, np.int64), list(captions), list(damaged))

    for group, image, why in map_in_order(one, _groups(shard, keys)):
        if image is None:
            damaged.append(f"{group.key}: {why or 'no readable image'}")
            continue
        pixels.append(image)
        labels.append(_label(group))
        text = caption_text(group.get("txt") or b"", "replace")
        captions.append(tuple(line.strip() for line in text.splitlines() if line.strip()))
        if len(pixels) == _CHUNK:
            yield chunk()
            for part in (pixels, labels, captions, damaged):
                part.clear()
    if pixels or damaged:
        yield chunk()


def _groups(shard: Shard, keys: frozenset[str] | None) -> Iterator[Group]:
    try:
        for group in iter_all_groups(shard, {*IMAGE_EXTENSIONS, "cls", "txt"}):
            if keys is None or group.key in keys:
                yield group
    except NotATarError as error:
        raise InputError(f"{shard.url}: {error}; copy the folder again") from None


def _label(group: Group) -> int:
    text = (group.get("cls") or b"").strip()
    return int(text) if text.isdigit() else NO_LABEL


def draw(shards: Sequence[Shard], count: int) -> frozenset[tuple[str, str]]:
    """Draw up to ``count`` samples by class, always the same of the same files; returns (shard name, key)."""
    places, labels = [], []
    for shard in shards:
        try:
            for group in iter_all_groups(shard, {"cls"}):
                if (label := _label(group)) != NO_LABEL and group.first and not group.damage:
                    places.append((shard.name, group.key))
                    labels.append(label)
        except NotATarError as error:
            raise InputError(f"{shard.url}: {error}; copy the folder again") from None
    return frozenset(places[row] for row in stratified(np.array(labels, np.int64), count))
