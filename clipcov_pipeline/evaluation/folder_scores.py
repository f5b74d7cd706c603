"""Scores a checkpoint on an evaluation folder in CLIP_benchmark's `webdataset` layout.

A folder holds `SPLIT/nshards.txt`, `SPLIT/0.tar`, ... with an image and `KEY.cls` (class index) or `KEY.txt`
(captions, one a line) a sample, and `classnames.txt` and `zeroshot_classification_templates.txt` (`{c}` is
the class name). Samples that cannot be read are counted and are in no denominator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.folders import (
    CLASS_NAMES,
    TRAIN_SPLIT,
    VALID_SPLITS,
    FolderSettings,
    read_class_names,
    read_templates,
)
from clipcov_pipeline.evaluation.metrics import (
    classification_metrics,
    record,
    retrieval_chance_level,
    retrieval_recall,
    zero_shot_chance_level,
    zero_shot_metrics,
)
from clipcov_pipeline.evaluation.probe import K_NEIGHBOURS, KNN_TEMPERATURE, knn_scores, linear_probe
from clipcov_pipeline.evaluation.splits import (
    NO_LABEL,
    DecodedImages,
    EmbeddedSplit,
    FolderEncoder,
    draw,
    embed_split,
)
from clipcov_pipeline.evaluation.tasks import METRICS, Ties
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.pixels import RULES, ImageRules


@dataclass(frozen=True)
class FolderSet:
    """An evaluation set as a checkpoint is scored on it.

    class_names and templates are None where no task reads them. drawn: the samples (shard name, key) of the
    train and validation splits that a probe learns from.
    """

    name: str
    settings: FolderSettings
    shards: Sequence[Shard]
    class_names: Sequence[str] | None
    templates: Sequence[str] | None
    drawn: frozenset[tuple[str, str]] | None

    @classmethod
    def open(cls, name: str, folder: Path, settings: FolderSettings, shards: Sequence[Shard]) -> "FolderSet":
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
    rules: ImageRules = RULES,
    ties: Ties = "expected",
) -> list[dict[str, Any]]:
    """Score a checkpoint on a folder: one record a task; every image is read and embedded once.

    Args:
        encoder: the checkpoint's.
        chosen: the set.
        model: for the record.
        pretrained: for the record.
        decoded: decoded images of earlier checkpoints.
        classifier: (class names, templates) -> float32 [n_classes, d], as `prompts.class_embeddings`.
        rules: which images are usable; others are counted as damaged.
        ties: what one counts, see `ties`.

    Raises:
        InputError: nothing readable, labels or captions missing, a label without a class name.
    """
    splits = _embed_splits(partial(embed_split, encoder, decoded=decoded, rules=rules), chosen)
    named: dict[str, Any] = {"dataset": chosen.name, "model": model, "pretrained": pretrained, "ties": ties}
    return [
        _retrieval(encoder, chosen, splits.test, named)
        if task == "retrieval"
        else _classification(task, chosen, splits, classifier, named)
        for task in chosen.settings.tasks
    ]


@dataclass(frozen=True)
class _Splits:
    """A folder as one checkpoint embeds it; train and valid are None where nothing learns from them."""

    test: EmbeddedSplit
    train: EmbeddedSplit | None = None
    valid: EmbeddedSplit | None = None


def _embed_splits(embed: Callable[..., EmbeddedSplit], chosen: FolderSet) -> _Splits:
    """Embed the splits that are read; embed: `embed_split` less its shards and what is chosen of them."""
    settings = chosen.settings
    test = embed(_of_split(chosen.shards, settings.split))
    if not settings.reads_train:
        return _Splits(test)
    drawn, valid = {shard for shard, _ in chosen.drawn or ()}, None
    train = embed(_of_split(chosen.shards, TRAIN_SPLIT), chosen=chosen.drawn)
    for split in VALID_SPLITS:
        found = [] if split == settings.split else _of_split(chosen.shards, split)
        if any(shard.name in drawn for shard in found):  # none is where it has no labels
            valid = embed(found, chosen=chosen.drawn)
    return _Splits(test, train, valid)


def _classification(
    task: str,
    chosen: FolderSet,
    splits: _Splits,
    classifier: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    named: Mapping[str, Any],
) -> dict[str, Any]:
    """Record of a task that asks for the class of every image that has one."""
    test = splits.test
    rows = np.flatnonzero(test.labels != NO_LABEL)
    if not len(rows):
        raise InputError(f"evaluate.sets.{chosen.name}: no image has a .cls member with a class index")
    images, targets, n_classes = test.image_embedding[rows], test.labels[rows], _n_classes(chosen, splits)
    if task == "zeroshot_classification":
        metrics, details = _zero_shot(chosen, images, targets, classifier, named["ties"])
    else:
        scores, details = _trained(task, chosen.name, splits, images, n_classes)
        metrics = classification_metrics(scores, targets, named["ties"])
    chance = zero_shot_chance_level(n_classes)
    return record(
        task=task,
        metrics=_task_metrics(task, metrics),
        n_samples=len(rows),
        chance=_task_metrics(task, chance),
        **named,
        n_classes=n_classes,
        n_damaged=len(test.damaged) + len(test.labels) - len(rows),
        damaged=test.damaged[:5],
        n_without_embedding=test.n_without_embedding,
        **details,
    )


def _task_metrics(task: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracies that a task gives, by its names for them (``lp_acc1``, ``knn_acc1``)."""
    prefix = {"linear_probe": "lp_", "knn": "knn_"}.get(task, "")
    return {name: values[name.removeprefix(prefix)] for name in METRICS[task]}


def _zero_shot(
    chosen: FolderSet,
    images: np.ndarray,
    targets: np.ndarray,
    classifier: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    ties: Ties,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracies of a classifier made of the class names, and fields of the record."""
    assert chosen.class_names is not None
    assert chosen.templates is not None
    metrics = zero_shot_metrics(images, classifier(chosen.class_names, chosen.templates), targets, ties)
    where = "folder" if chosen.settings.templates is None else "yaml"
    return metrics, {"n_templates": len(chosen.templates), "templates_from": where}


def _trained(
    task: str, name: str, splits: _Splits, images: np.ndarray, n_classes: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores float [n, n_classes] of a classifier that learns from train, and fields of the record."""
    train, valid = splits.train, splits.valid
    assert train is not None
    counts = {"n_train": len(train.labels), "n_train_damaged": len(train.damaged)}
    if task == "knn":
        scores = knn_scores(train.image_embedding, train.labels, images, n_classes)
        return scores, {**counts, "k": K_NEIGHBOURS, "temperature": KNN_TEMPERATURE, "votes": "exp(cos / t)"}
    own: dict[str, Any] = {}
    if valid is not None:
        known = valid.labels != NO_LABEL
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


def _n_classes(chosen: FolderSet, splits: _Splits) -> int:
    found = (split for split in (splits.test, splits.train, splits.valid) if split is not None)
    highest = max(int(split.labels.max(initial=0)) for split in found)
    if chosen.class_names is None:
        return highest + 1
    if highest >= len(chosen.class_names):
        raise InputError(
            f"evaluate.sets.{chosen.name}: found the class index {highest}, expected below"
            f" {len(chosen.class_names)}, the lines of {CLASS_NAMES}"
        )
    return len(chosen.class_names)


def _retrieval(
    encoder: FolderEncoder, chosen: FolderSet, test: EmbeddedSplit, named: Mapping[str, Any]
) -> dict[str, Any]:
    rows = [row for row, captions in enumerate(test.captions) if captions]
    if not rows:
        raise InputError(f"evaluate.sets.{chosen.name}: no image has a .txt member with a caption")
    captions = [caption for row in rows for caption in test.captions[row]]
    image_of = np.repeat(np.arange(len(rows)), [len(test.captions[row]) for row in rows])
    images, texts = test.image_embedding[rows], encoder.encode_texts(captions)
    return record(
        task="zeroshot_retrieval",
        metrics=retrieval_recall(images, texts, image_of, ties=named["ties"]),
        n_samples=len(rows),
        n_captions=len(captions),
        chance=retrieval_chance_level(image_of, len(rows)),
        n_damaged=len(test.damaged) + len(test.captions) - len(rows),
        damaged=test.damaged[:5],
        n_without_embedding=test.n_without_embedding,
        **named,
    )
