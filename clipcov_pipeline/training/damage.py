"""What a full disk or a bad sector leaves in a training's folder: set aside, so that it blocks no arm."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

from clipcov_pipeline.training.folder import NOTE, early_checkpoint, final_checkpoint, load_checkpoint
from clipcov_pipeline.training.spec import TrainSpec

NEEDED = {"epoch", "state_dict", "optimizer"}  # what open_clip_train goes on from


def set_aside_damaged(spec: TrainSpec) -> list[str]:
    """Rename what cannot be read in a run's folder to ``*.damaged``; return a line about each.

    Where the newest checkpoint is damaged, the training goes on from that of its first epoch if it was kept,
    else from its beginning. Where the note of the run's settings is damaged, nobody knows what its
    checkpoints were trained under: the whole run begins anew.
    """
    note = spec.folder / NOTE
    if note.exists() and not _is_json(note):
        _rename(spec.folder)
        return [
            f"{note} cannot be read: the training begins anew, {spec.folder.name}.damaged has the old one"
        ]
    checkpoints = spec.folder / "checkpoints"
    lines = [f"{path} is damaged: set aside as {path.name}.damaged" for path in _damaged(checkpoints)]
    if not lines:
        return []
    return [*lines, _go_on(spec)]


def _damaged(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.glob("epoch_*.pt")) if not _is_whole(path)]
    for path in found:
        _rename(path)
    return found


def _go_on(spec: TrainSpec) -> str:
    """Give the run the best checkpoint that is left, under the names that open_clip_train looks for."""
    latest, final = spec.folder / "checkpoints" / "epoch_latest.pt", final_checkpoint(spec)
    known = [path for path in (final, latest, early_checkpoint(spec)) if path.exists()]
    if not known:
        return f"{spec.name}: no other checkpoint is left, the training begins anew"
    best = max(known, key=lambda path: load_checkpoint(path)["epoch"])
    epoch = load_checkpoint(best)["epoch"]
    if best != latest:
        shutil.copyfile(best, latest)
    if epoch == int(final.stem.removeprefix("epoch_")) and not final.exists():
        shutil.copyfile(best, final)
    return f"{spec.name}: the training goes on from {best.name}, epoch {epoch}"


def _is_whole(checkpoint: Path) -> bool:
    """Whether every part of the zip that torch writes has its checksum, and open_clip_train can go on."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            if parts.testzip() is not None:
                return False
        return load_checkpoint(checkpoint).keys() >= NEEDED
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError):
        return False


def _is_json(note: Path) -> bool:
    try:
        return isinstance(json.loads(note.read_text(encoding="utf-8")), dict)
    except ValueError:  # no JSON, no UTF-8
        return False


def _rename(path: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
