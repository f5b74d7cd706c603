"""The models that open_clip knows, with those of this package; what is wrong with a name is one line."""

import difflib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clipcov_pipeline.errors import InputError, near_file

MODEL_CONFIGS = Path(__file__).parent / "model_configs"

CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".npz"}


@dataclass(frozen=True)
class ModelSpec:
    """An open_clip model: ``model`` is an architecture's name, ``pretrained`` its weights.

    ``pretrained`` is an open_clip tag, the path of a checkpoint file, or None (weights not yet trained, or
    named by ``model`` itself: ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``).
    """

    model: str
    pretrained: str | None = None


def model_names() -> list[str]:
    """Return all architectures' names: open_clip's own and ours. Imports neither torch nor open_clip."""
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
            f"pretrained: no checkpoint file at {spec.pretrained}{near_file(Path(spec.pretrained))}; give an"
            " existing file or a tag"
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
    """Return the torch device for ``auto`` (cuda, else mps, else cpu); any other name is checked.

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
