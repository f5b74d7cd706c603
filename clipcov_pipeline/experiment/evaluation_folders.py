"""Lists what an evaluation folder's tasks read."""

from pathlib import Path

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.evaluation.folders import (
    CLASS_NAMES,
    TEMPLATES,
    TRAIN_SPLIT,
    existing_file,
    list_split,
    valid_split,
)
from clipcov_pipeline.evaluation.tasks import TRAINED_TASKS
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.pool.listing import Shard


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
        existing_file(where, folder, CLASS_NAMES, "write one class name a line")
        if chosen.templates is None:
            advice = "add it, or give `templates:` in the YAML, e.g. ['a photo of a {}']"
            tokens[TEMPLATES] = digest_of_file(existing_file(where, folder, TEMPLATES, advice))
    return tuple(shards), tokens


def _check_kind(where: str, folder: Path, chosen: EvaluationSet) -> None:
    path = folder / "dataset_type.txt"
    kind = path.read_text(errors="replace").strip().lower() if path.is_file() else ""
    if kind == "multilabel":
        raise InputError(
            f"{where}: {path} says multilabel, expected classification or retrieval: remove the set"
        )
    if kind == "retrieval" and (wrong := [task for task in chosen.tasks if task != "retrieval"]):
        raise InputError(f"{where}.tasks: found {wrong[0]!r}, expected retrieval alone: {path} says so")
