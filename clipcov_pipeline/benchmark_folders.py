"""Evaluation sets in CLIP_benchmark's `webdataset` layout: listing them, reading them, scoring a checkpoint.

A folder holds `SPLIT/nshards.txt`, `SPLIT/0.tar`, ... with an image and `KEY.cls` (class index) or `KEY.txt`
(captions, one a line) a sample, and `classnames.txt` and `zeroshot_classification_templates.txt` (`{c}` is
the class name). Samples that cannot be read are counted and are in no denominator.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from clipcov_pipeline.config import TRAINED_TASKS, EvaluationSet
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluate import (
    classification_metrics,
    record,
    retrieval_chance_level,
    retrieval_recall,
    zero_shot_chance_level,
    zero_shot_metrics,
)
from clipcov_pipeline.probe import K_NEIGHBOURS, KNN_TEMPERATURE, knn_scores, linear_probe, stratified
from clipcov_pipeline.shards import (
    IMAGE_EXTENSIONS,
    Group,
    NotATarError,
    Shard,
    iter_all_groups,
    map_in_order,
)
from clipcov_pipeline.store import digest_of_file

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
VALID_SPLITS = ("valid", "val")
TRAIN_SPLIT = "train"
KEPT_BYTES = 1 << 30
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a container sees the whole machine's free memory
_CHUNK = 1024
_NO_LABEL = -1


class FolderEncoder(Protocol):
    """What is needed of an `embed.Encoder` here; embeddings are float32 [n, d], unit rows or NaN."""

    @property
    def pixels_key(self) -> str: ...

    def pixels_of(self, image: bytes) -> np.ndarray | None: ...

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray: ...

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...


# --- listing ----------------------------------------------------------------------------------------


def list_folder(name: str, folder: Path, chosen: EvaluationSet) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """List what the tasks of an evaluation set read: its shards, and digests of its small files.

    Args:
        name: label of the set, for messages.
        folder: an existing folder.
        chosen: the set's settings.

    Returns:
        (shards of all splits that are read, named ``SPLIT__INDEX``; {file name: digest}).

    Raises:
        InputError: a split, a shard, class names or templates that are not there, or a kind of folder that
            does not fit the tasks.
    """
    where = f"evaluate.sets.{name}"
    _check_kind(where, folder, chosen)
    shards = list_split(where, folder, chosen.split)
    if chosen.reads_train:
        if chosen.split == TRAIN_SPLIT:
            raise InputError(
                f"{where}.split: found 'train', expected another: {list(TRAINED_TASKS)} learn from it"
            )
        shards += list_split(where, folder, TRAIN_SPLIT)
        valid = valid_split(folder, chosen)
        shards += list_split(where, folder, valid) if valid and "linear_probe" in chosen.tasks else []
    tokens: dict[str, str] = {}
    if set(chosen.tasks) != {"retrieval"} and (folder / CLASS_NAMES).is_file():
        tokens[CLASS_NAMES] = digest_of_file(folder / CLASS_NAMES)  # their number is the number of classes
    if "zeroshot_classification" in chosen.tasks:
        _existing(where, folder, CLASS_NAMES, "write one class name a line")
        if chosen.templates is None:
            advice = "add it, or give `templates:` in the YAML, e.g. ['a photo of a {}']"
            tokens[TEMPLATES] = digest_of_file(_existing(where, folder, TEMPLATES, advice))
    return tuple(shards), tokens


def list_split(where: str, folder: Path, split: str) -> list[Shard]:
    """Return the shards of a split, named ``SPLIT__INDEX``; raise InputError where one is missing."""
    path = _existing(where, folder, f"{split}/nshards.txt", "is this a folder in CLIP_benchmark's layout?")
    text = path.read_text(errors="replace").strip()
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{where}: {path} holds {text[:40]!r}, expected the number of shards")
    shards = []
    for index in range(int(text)):
        tar = folder / split / f"{index}.tar"
        if not tar.is_file():
            raise InputError(f"{where}: {tar} is missing, {path} says {text} shards: copy the folder again")
        status = tar.stat()
        shards.append(Shard(f"{split}__{index}", str(tar), f"{status.st_size}-{status.st_mtime_ns}"))
    return shards


def valid_split(folder: Path, chosen: EvaluationSet) -> str | None:
    """Return the folder's own validation split, if it has one that is not the split that is scored."""
    found = (split for split in VALID_SPLITS if (folder / split / "nshards.txt").is_file())
    return next((split for split in found if split != chosen.split), None)


def _existing(where: str, folder: Path, file: str, advice: str) -> Path:
    path = folder / file
    if not path.is_file():
        raise InputError(f"{where}: {path} is missing: {advice}")
    return path


def _check_kind(where: str, folder: Path, chosen: EvaluationSet) -> None:
    path = folder / "dataset_type.txt"
    kind = path.read_text(errors="replace").strip().lower() if path.is_file() else ""
    if kind == "multilabel":
        raise InputError(
            f"{where}: {path} says multilabel, expected classification or retrieval: remove the set"
        )
    if kind == "retrieval" and (wrong := [task for task in chosen.tasks if task != "retrieval"]):
        raise InputError(f"{where}.tasks: found {wrong[0]!r}, expected retrieval alone: {path} says so")


def read_class_names(folder: Path) -> list[str]:
    """Return the class names by class index; ImageNet's own has names that occur twice."""
    return [line.strip() for line in _lines(folder / CLASS_NAMES)]


def read_templates(folder: Path) -> list[str]:
    """Return the folder's prompt templates with ``{}`` where CLIP_benchmark writes ``{c}``.

    Raises:
        InputError: no template, or one without a place for the class name.
    """
    path = folder / TEMPLATES
    templates = [line.strip().replace("{c}", "{}") for line in _lines(path) if line.strip()]
    for template in templates or [""]:
        if "{}" not in template:
            raise InputError(f"{path}: found {template!r}, expected templates with {{c}}, one a line")
    return templates


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); mend or replace it") from error


# --- reading ----------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Some samples of a shard, decoded: pixels uint8 [n, height, width, 3]; labels int64 [n], -1 for none."""

    pixels: np.ndarray
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    damaged: list[str]
    """``KEY: why``, of samples that are not among the n."""


def kept_bytes(processes: int) -> int:
    """Return how much memory decoded images may take: at least 1 GiB, at most half of what is free now.

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
) -> EmbeddedSplit:
    """Decode and embed the samples of shards, or of them those chosen by (shard name, key).

    Args:
        encoder: the loaded model.
        shards: of one split.
        decoded: where decoded images are kept.
        chosen: samples to read; None for all.

    Raises:
        InputError: a shard that is no tar, or no readable sample in any of them.
    """
    embedded, labels, captions, damaged = [], [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of images that are odd but readable
        for shard, chunk in _chunks(encoder, shards, decoded, chosen):
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
) -> Iterator[tuple[Shard, Chunk]]:
    for shard in shards:
        keys = None if chosen is None else frozenset(key for name, key in chosen if name == shard.name)
        if keys is None or keys:
            read = partial(_decode, encoder, shard, keys)
            for chunk in decoded.chunks((shard, keys, encoder.pixels_key), read):
                yield shard, chunk


def _decode(encoder: FolderEncoder, shard: Shard, keys: frozenset[str] | None) -> Iterator[Chunk]:
    def one(group: Group) -> tuple[Group, np.ndarray | None]:
        image = group.image()
        return group, encoder.pixels_of(image[1]) if image and not group.damage and group.first else None

    pixels: list[np.ndarray] = []
    labels: list[int] = []
    captions: list[tuple[str, ...]] = []
    damaged: list[str] = []

    def chunk() -> Chunk:
        stacked = np.stack(pixels) if pixels else np.empty((0, 1, 1, 3), np.uint8)
        return Chunk(stacked, np.array(labels, np.int64), list(captions), list(damaged))

    for group, image in map_in_order(one, _groups(shard, keys)):
        if image is None:
            damaged.append(f"{group.key}: {group.damage or 'no readable image'}")
            continue
        pixels.append(image)
        labels.append(_label(group))
        text = (group.get("txt") or b"").decode("utf-8", "replace")
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
    return int(text) if text.isdigit() else _NO_LABEL


def draw(shards: Sequence[Shard], count: int) -> frozenset[tuple[str, str]]:
    """Draw up to ``count`` samples by class, always the same of the same files; returns (shard name, key)."""
    places, labels = [], []
    for shard in shards:
        try:
            for group in iter_all_groups(shard, {"cls"}):
                if (label := _label(group)) != _NO_LABEL and group.first and not group.damage:
                    places.append((shard.name, group.key))
                    labels.append(label)
        except NotATarError as error:
            raise InputError(f"{shard.url}: {error}; copy the folder again") from None
    return frozenset(places[row] for row in stratified(np.array(labels, np.int64), count))


# --- scoring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSet:
    """An evaluation set as a checkpoint is scored on it.

    class_names and templates are None where no task reads them. drawn: the samples (shard name, key) of the
    train and validation splits that a probe learns from.
    """

    name: str
    settings: EvaluationSet
    shards: Sequence[Shard]
    class_names: Sequence[str] | None
    templates: Sequence[str] | None
    drawn: frozenset[tuple[str, str]] | None

    @classmethod
    def open(cls, name: str, folder: Path, settings: EvaluationSet, shards: Sequence[Shard]) -> "FolderSet":
        """Read the small files, and draw the train samples that a probe learns from.

        Raises:
            InputError: a small file is missing or unusable, or the train split has no labels.
        """
        zero_shot = "zeroshot_classification" in settings.tasks
        has_names = zero_shot or (settings.reads_train and (folder / CLASS_NAMES).is_file())
        drawn = None
        if settings.reads_train:
            splits = [split for split in (TRAIN_SPLIT, *VALID_SPLITS) if split != settings.split]
            learnt = {split: _of_split(shards, split) for split in splits}
            found = {split: draw(part, settings.probe_samples) for split, part in learnt.items() if part}
            if TRAIN_SPLIT in found and not found[TRAIN_SPLIT]:
                raise InputError(
                    f"evaluate.sets.{name}: no image of its {TRAIN_SPLIT} split has a .cls member with a"
                    " class index, expected them for linear_probe and knn: leave these out or copy it again"
                )
            drawn = frozenset().union(*found.values())
        return cls(
            name,
            settings,
            tuple(shards),
            read_class_names(folder) if has_names else None,
            (settings.templates or read_templates(folder)) if zero_shot else None,
            drawn,
        )


def _of_split(shards: Sequence[Shard], split: str) -> list[Shard]:
    return [shard for shard in shards if shard.name.rpartition("__")[0] == split]


def evaluate_folder(
    encoder: FolderEncoder,
    chosen: FolderSet,
    *,
    model: str,
    pretrained: str,
    decoded: DecodedImages,
    classifier: Callable[[Sequence[str], Sequence[str]], np.ndarray],
) -> list[dict[str, Any]]:
    """Score a checkpoint on a folder: one record a task; every image is read and embedded once.

    Args:
        encoder: the checkpoint's.
        chosen: the set.
        model: for the record.
        pretrained: for the record.
        decoded: decoded images of earlier checkpoints.
        classifier: (class names, templates) -> float32 [n_classes, d], as `prompts.class_embeddings`.

    Raises:
        InputError: nothing readable, labels or captions missing, a label without a class name.
    """
    settings = chosen.settings
    test = embed_split(encoder, _of_split(chosen.shards, settings.split), decoded)
    named = {"dataset": chosen.name, "model": model, "pretrained": pretrained}
    train = valid = None
    if settings.reads_train:
        drawn = {shard for shard, _ in chosen.drawn or ()}
        train = embed_split(encoder, _of_split(chosen.shards, TRAIN_SPLIT), decoded, chosen.drawn)
        for split in VALID_SPLITS:
            found = [] if split == settings.split else _of_split(chosen.shards, split)
            if any(shard.name in drawn for shard in found):  # none is where it has no labels
                valid = embed_split(encoder, found, decoded, chosen.drawn)
    records = []
    for task in settings.tasks:
        if task == "retrieval":
            records.append(_retrieval(encoder, chosen, test, named))
            continue
        rows = np.flatnonzero(test.labels != _NO_LABEL)
        if not len(rows):
            raise InputError(f"evaluate.sets.{chosen.name}: no image has a .cls member with a class index")
        targets = test.labels[rows]
        n_classes = _n_classes(chosen, [test, *([train] if train else []), *([valid] if valid else [])])
        common: dict[str, Any] = {
            "n_classes": n_classes,
            "n_damaged": len(test.damaged) + len(test.labels) - len(rows),
            "damaged": test.damaged[:5],
            "n_without_embedding": test.n_without_embedding,
        }
        images = test.image_embedding[rows]
        chance = zero_shot_chance_level(n_classes)
        if task == "zeroshot_classification":
            assert chosen.class_names is not None
            assert chosen.templates is not None
            metrics = zero_shot_metrics(images, classifier(chosen.class_names, chosen.templates), targets)
            where = "folder" if settings.templates is None else "yaml"
            common |= {"n_templates": len(chosen.templates), "templates_from": where}
        else:
            assert train is not None
            scores, details = _trained(task, chosen.name, train, valid, images, n_classes)
            metrics, common = classification_metrics(scores, targets), {**common, **details}
            short = "lp" if task == "linear_probe" else "knn"
            kept = metrics if task == "linear_probe" else ("acc1",)
            metrics, chance = ({f"{short}_{m}": values[m] for m in kept} for values in (metrics, chance))
        records.append(
            record(task=task, metrics=metrics, n_samples=len(rows), chance=chance, **named, **common)
        )
    return records


def _trained(
    task: str,
    name: str,
    train: EmbeddedSplit,
    valid: EmbeddedSplit | None,
    images: np.ndarray,
    n_classes: int,
) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Scores float [n, n_classes] of a classifier that learns from train, and fields of the record."""
    counts = {"n_train": len(train.labels), "n_train_damaged": len(train.damaged)}
    if task == "knn":
        scores = knn_scores(train.image_embedding, train.labels, images, n_classes)
        return scores, {**counts, "k": K_NEIGHBOURS, "temperature": KNN_TEMPERATURE, "votes": "exp(cos / t)"}
    own: dict[str, Any] = {}
    if valid is not None:
        known = valid.labels != _NO_LABEL
        own = {"valid": valid.image_embedding[known], "valid_labels": valid.labels[known]}
    try:
        scores, fit = linear_probe(train.image_embedding, train.labels, images, n_classes, **own)
    except ValueError as error:
        raise InputError(
            f"evaluate.sets.{name}: linear_probe found {error}, expected at least 2 classes"
        ) from error
    accuracies = {f"{c:g}": accuracy for c, accuracy in fit.valid_acc1.items()}
    return scores, {
        **counts,
        "n_train": fit.n_train,
        "n_valid": fit.n_valid,
        "valid_split": "a part of train" if valid is None else "the folder's own",
        "c": fit.c,
        "valid_acc1": accuracies,
        "converged": fit.converged,
    }


def _n_classes(chosen: FolderSet, splits: Sequence[EmbeddedSplit]) -> int:
    highest = max(int(split.labels.max(initial=0)) for split in splits)
    if chosen.class_names is None:
        return highest + 1
    if highest >= len(chosen.class_names):
        raise InputError(
            f"evaluate.sets.{chosen.name}: found the class index {highest}, expected below"
            f" {len(chosen.class_names)}, the lines of {CLASS_NAMES}"
        )
    return len(chosen.class_names)


def _retrieval(
    encoder: FolderEncoder, chosen: FolderSet, test: EmbeddedSplit, named: Mapping[str, str]
) -> dict[str, Any]:
    rows = [row for row, captions in enumerate(test.captions) if captions]
    if not rows:
        raise InputError(f"evaluate.sets.{chosen.name}: no image has a .txt member with a caption")
    captions = [caption for row in rows for caption in test.captions[row]]
    image_of = np.repeat(np.arange(len(rows)), [len(test.captions[row]) for row in rows])
    images, texts = test.image_embedding[rows], encoder.encode_texts(captions)
    return record(
        task="zeroshot_retrieval",
        metrics=retrieval_recall(images, texts, image_of),
        n_samples=len(rows),
        n_captions=len(captions),
        chance=retrieval_chance_level(image_of, len(rows)),
        n_damaged=len(test.damaged) + len(test.captions) - len(rows),
        damaged=test.damaged[:5],
        n_without_embedding=test.n_without_embedding,
        **named,
    )
