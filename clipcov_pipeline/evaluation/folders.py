"""Evaluation folders as CLIP_benchmark lays them out: their splits, class names and prompt templates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard

CLASS_NAMES = "classnames.txt"

TEMPLATES = "zeroshot_classification_templates.txt"

VALID_SPLITS = ("valid", "val")

TRAIN_SPLIT = "train"


class FolderSettings(Protocol):
    """What an evaluation folder is read by; the YAML's ``evaluate.sets.NAME`` has it."""

    @property
    def split(self) -> str: ...
    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def templates(self) -> Sequence[str] | None: ...
    @property
    def probe_samples(self) -> int: ...
    @property
    def reads_train(self) -> bool: ...


def list_split(where: str, folder: Path, split: str) -> list[Shard]:
    """Return the shards of a split, named ``SPLIT__INDEX``; raise InputError where one is missing."""
    path = existing_file(
        where, folder, f"{split}/nshards.txt", "is this a folder in CLIP_benchmark's layout?"
    )
    text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
    try:
        count = int(text)  # as CLIP_benchmark
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"{where}: {path} holds {text[:40]!r}, expected the number of shards")
    shards = []
    for index in range(count):
        tar = folder / split / f"{index}.tar"
        if not tar.is_file():
            raise InputError(f"{where}: {tar} is missing, {path} says {text} shards: copy the folder again")
        status = tar.stat()
        shards.append(Shard(f"{split}__{index}", str(tar), f"{status.st_size}-{status.st_mtime_ns}"))
    return shards


def valid_split(folder: Path, chosen: FolderSettings) -> str | None:
    """Return the folder's own validation split, if it has one that is not the split that is scored."""
    found = (split for split in VALID_SPLITS if (folder / split / "nshards.txt").is_file())
    return next((split for split in found if split != chosen.split), None)


def existing_file(where: str, folder: Path, file: str, advice: str) -> Path:
    """Return the path of a file of a folder; raise InputError, with the advice, where it is missing."""
    path = folder / file
    if not path.is_file():
        raise InputError(f"{where}: {path} is missing: {advice}")
    return path


def read_class_names(folder: Path) -> list[str]:
    """Return the class names by class index, as CLIP_benchmark: blank lines are none, a name may come twice.

    Raises:
        InputError: not readable, or no name in it.
    """
    path = folder / CLASS_NAMES
    names = [line.strip() for line in _lines(path) if line.strip()]
    if not names:
        raise InputError(f"{path}: found no class name, expected one a line; copy it again")
    return names


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
