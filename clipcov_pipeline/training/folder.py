"""The folder that open_clip_train works in: under which settings, which checkpoints, whether complete."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import write_text_at_once
from clipcov_pipeline.training.spec import FREE_TO_CHANGE, TrainSpec, steps, to_json

NOTE = "spec.json"  # the settings that a folder's run was begun with


def claim_folder(spec: TrainSpec) -> None:
    """Note the run's settings in its folder, so that it is continued under the same ones only.

    Raises:
        InputError: the folder holds a run with other settings.
    """
    from clipcov_pipeline.training.training_index import digest_of_index

    note = spec.folder / NOTE
    settings = {k: v for k, v in json.loads(to_json(spec)).items() if k not in FREE_TO_CHANGE}
    digest = digest_of_index(spec.index, classes=spec.quota is not None)
    settings["samples"] = f"index of digest {digest[:16]}"
    if spec.pretrained is not None:
        settings["pretrained"] = _contents([spec.pretrained])
    if note.exists():
        newer = {f.name: f.default for f in dataclasses.fields(spec)}  # than an earlier version's note
        before = {**newer, **json.loads(note.read_text())}
        changed = sorted(key for key in settings if settings[key] != before.get(key))
        if changed:
            raise InputError(
                f"train: {spec.folder} holds a run with {changed[0]} = {before.get(changed[0])!r}, now it is"
                f" {settings[changed[0]]!r}; remove that folder or use another name"
            )
    else:
        write_text_at_once(note, json.dumps(settings, indent=2))


def _contents(files: Sequence[str]) -> str:
    """Say what files are, wherever they lie: a run goes on after its project was moved."""
    sizes = [(Path(file).name, Path(file).stat().st_size) if Path(file).is_file() else file for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(files)} of digest {digest[:16]}, the first {Path(files[0]).name}"


def final_checkpoint(spec: TrainSpec) -> Path:
    """Return where open_clip_train puts the checkpoint of the last epoch."""
    return spec.folder / "checkpoints" / f"epoch_{steps(spec).virtual_epochs}.pt"


def early_checkpoint(spec: TrainSpec) -> Path:
    """Return where the checkpoint of the first epoch is kept."""
    return spec.folder / "checkpoints" / "epoch_1.pt"


def keep_early(spec: TrainSpec) -> None:
    """Give the newest checkpoint, that of the first epoch, a name of its own: open_clip_train replaces it."""
    early = early_checkpoint(spec)
    if not early.exists():
        try:
            early.hardlink_to(spec.folder / "checkpoints" / "epoch_latest.pt")
        except OSError:  # a file system without links
            shutil.copyfile(spec.folder / "checkpoints" / "epoch_latest.pt", early)


def is_complete(spec: TrainSpec) -> bool:
    """Return whether the run's folder holds the whole checkpoint of its last epoch."""
    latest = spec.folder / "checkpoints" / "epoch_latest.pt"
    if not latest.exists() or not final_checkpoint(spec).exists():
        return False
    # open_clip_train writes epoch_N.pt first and renames epoch_latest.pt into place after it
    return load_checkpoint(latest)["epoch"] == steps(spec).virtual_epochs


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; its tensors stay in the file until they are used."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
