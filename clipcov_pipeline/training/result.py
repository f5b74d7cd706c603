"""What a finished training leaves behind: its weights as open_clip loads them, and its record."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcov_pipeline.files import write_text_at_once
from clipcov_pipeline.proxy.models import register_model_configs, resolve_device
from clipcov_pipeline.training.folder import early_checkpoint, final_checkpoint, is_complete, load_checkpoint
from clipcov_pipeline.training.log import Point, parse_evaluation, parse_line
from clipcov_pipeline.training.spec import CHECKPOINT, EARLY_CHECKPOINT, RECORD, TrainSpec, steps, to_json

if TYPE_CHECKING:
    import torch


def learning_curve(spec: TrainSpec) -> list[Point]:
    """Return the curve of a run from its log, by step; steps that were repeated after a break count once."""
    by_step: dict[float, Point] = {}
    with (spec.folder / "out.log").open(encoding="utf-8", errors="replace") as lines:
        for point in filter(None, (parse_line(line, spec) for line in lines)):
            by_step[point["step"]] = point
    return [by_step[step] for step in sorted(by_step)]


def evaluations(spec: TrainSpec) -> list[Point]:
    """Return the evaluations of a run from its log, by step, as `learning_curve`."""
    with (spec.folder / "out.log").open(encoding="utf-8", errors="replace") as lines:
        found = filter(None, (parse_evaluation(line.rstrip("\n"), spec) for line in lines))
        by_step = {point["step"]: point for point in found}
    return [by_step[step] for step in sorted(by_step)]


def _training_seconds(curve: Iterable[Point], batch_size: int) -> float:
    """Seconds spent in training steps (data loading in it, imports and checkpoints not)."""
    seconds, before = 0.0, 0.0
    for point in curve:
        seconds += (point["step"] - before) * batch_size / point["samples_per_second"]
        before = point["step"]
    return seconds


def finish(spec: TrainSpec, out_dir: str | Path) -> dict[str, Any]:
    """Write a complete run's model and its training record.

    ``out_dir`` then holds ``open_clip_pytorch_model.bin`` (weights only, no optimizer state; for
    ``open_clip.create_model_and_transforms(model, pretrained=path)``), ``open_clip_config.json`` beside it
    (for ``create_model_and_transforms("local-dir:OUT_DIR")``, which then knows the architecture and the
    preprocessing by itself), and ``training.json``, which is returned; with ``keep_early``, and several
    virtual epochs, also ``early_pytorch_model.bin``.

    Raises:
        RuntimeError: the run is not complete, or its weights are not finite.
    """
    if not is_complete(spec):
        raise RuntimeError(f"the run in {spec.folder} has not reached its last epoch; launch it again")
    model, out = _trained_model(spec), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write_model(spec, model, out)
    record = _record(spec, sum(parameter.numel() for parameter in model.parameters()))
    record |= {"weights_digest": digest_of_weights(model.state_dict()), **_seen(spec, out)}
    write_text_at_once(out / RECORD, json.dumps(record, indent=2))
    return record


def _trained_model(spec: TrainSpec) -> "torch.nn.Module":
    """The model with the weights of the last epoch."""
    import open_clip
    import torch

    register_model_configs()
    weights = _weights(final_checkpoint(spec))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise RuntimeError(f"training of {spec.name} diverged (weights are not finite); lower train.lr")
    # the architecture alone: it checks that the weights fit, and holds the preprocessing of the start weights
    model = open_clip.create_model(spec.model, spec.pretrained, load_weights=False)
    model.load_state_dict(weights)
    return model


def _write_model(spec: TrainSpec, model: "torch.nn.Module", out: Path) -> None:
    """Write the weights, those of the first epoch, and what open_clip needs beside them."""
    import open_clip
    import torch
    from open_clip.push_to_hf_hub import save_config_for_hf

    torch.save(model.state_dict(), out / CHECKPOINT)
    if spec.keep_early and early_checkpoint(spec).exists() and steps(spec).virtual_epochs > 1:
        torch.save(_weights(early_checkpoint(spec)), out / EARLY_CHECKPOINT)
    config = open_clip.get_model_config(spec.model)
    save_config_for_hf(model, out / "open_clip_config.json", config)  # type: ignore[arg-type]
    tokenizer = open_clip.get_tokenizer(spec.model)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(out))  # type: ignore[union-attr]


def _record(spec: TrainSpec, parameters: int) -> dict[str, Any]:
    plan, curve = steps(spec), learning_curve(spec)
    return {
        "model": spec.model,
        "pretrained": spec.pretrained,
        "parameters": parameters,
        "n_samples": spec.n_samples,
        "steps": plan.total_steps,
        "samples_seen": plan.total_steps * spec.batch_size,
        "passes": plan.total_steps * spec.batch_size / spec.n_samples,
        "training_seconds": _training_seconds(curve, spec.batch_size),
        "first_loss": curve[0]["loss"],
        "last_loss": curve[-1]["loss"],
        "spec": json.loads(to_json(spec)),
        "reproducible": _reproducible(spec),
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy")
        },
        "learning_curve": curve,
        "held_out_retrieval": evaluations(spec),
    }


def _reproducible(spec: TrainSpec) -> str:
    """Whether the same training gives the same weights again, in words."""
    if resolve_device(spec.device) == "cpu":
        return f"yes, on such a processor with {torch_threads()} threads"
    return "no: kernels of a GPU add in no fixed order"


def torch_threads() -> int:
    """Threads that torch computes with; another number adds in another order."""
    import torch

    return torch.get_num_threads()


def _seen(spec: TrainSpec, out: Path) -> dict[str, Any]:
    """What was yielded, and bytes fetched; a table of it goes to ``out``."""
    from clipcov_pipeline.training.remote_reads import bytes_fetched, fetched_into
    from clipcov_pipeline.training.seen import SEEN, write_seen_table
    from clipcov_pipeline.training.training_index import read_training_index

    index = read_training_index(spec.index, spec.captions)
    seen = write_seen_table(out / "seen.parquet", spec.folder / SEEN, index.uids().tolist())
    fetched = bytes_fetched(fetched_into(index, spec.cache)) if spec.cache else []
    return {
        "seen": seen,
        "bytes_fetched": sum(shard.fetched for shard in fetched),
        "bytes_used": sum(shard.used for shard in fetched),
    }


def digest_of_weights(state_dict: Mapping[str, Any]) -> str:
    """Return a sha256 (hex) of a model's weights: names, dtypes, shapes and bytes, in the order of names.

    A file that torch writes holds more than that (its own name and version, in a zip).
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights(checkpoint: Path) -> dict[str, Any]:
    return {
        name.removeprefix("module."): tensor
        for name, tensor in load_checkpoint(checkpoint)["state_dict"].items()
    }
