"""Trains a CLIP model with open_clip_train: how many steps, the command line, one resumable run, its result.

A run is cut into virtual epochs of equal length, after each of which open_clip_train leaves a checkpoint that
the run can go on from. Arms that are given the same `samples_seen` take exactly the same number of steps,
whatever the sizes of their subsets. Each virtual epoch draws without replacement: a pass over the shards in
random order, through a shuffle buffer, begun anew when it is exhausted. Where a virtual epoch is smaller than
the subset, the next one does not go on from there: it begins a pass in another order of shards, so over
several of them some samples come more often than others. (DataComp draws shards with replacement, which
leaves out a third of the shards of a small subset in each pass.)

`python -m clipcov_pipeline.train SPEC.json OUT_DIR` runs one training from a `TrainSpec` in JSON.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from clipcov_pipeline.embed import ModelSpec, check_model, register_model_configs, resolve_device
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.kept_samples import kept_in_memory

Precision = Literal["fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"]
Scheduler = Literal["cosine", "const"]
Progress = dict[str, float]

CHECKPOINT = "open_clip_pytorch_model.bin"
EARLY_CHECKPOINT = "early_pytorch_model.bin"  # the weights after the first virtual epoch
RECORD = "training.json"
EVALUATIONS = 10  # of a training, on its held-out pairs
# steps an epoch are rounded up to a multiple of this where that adds less than a tenth, so that 2, 4 or 8
# workers can share them equally: the number of steps must not depend on the number of workers
STEP_MULTIPLE = 8
# what changes speed or place only: a run may be continued under other values
FREE_TO_CHANGE = {
    "val_data", "val_samples", "keep_early", "grad_checkpointing", "workers", "device", "log_dir", "name",
}  # fmt: skip


@dataclass(frozen=True)
class TrainSpec:
    """One training run.

    Attributes:
        model: open_clip architecture.
        pretrained: weights to start from (open_clip tag or checkpoint file), None to start from scratch.
        train_data: WebDataset shards: a path or URL with braces, or several joined by ``::``.
        n_samples: samples in these shards.
        batch_size: samples a step, over all GPUs and all parts (`accum_freq`) together.
        lr, wd, beta1, beta2, eps: AdamW's settings.
        warmup: steps of linear warm-up.
        lr_scheduler: ``cosine`` (to 0) or ``const``.
        precision: open_clip_train's ``--precision``.
        workers: most data-loading processes a GPU (0: decode in the training process).
        seed: of the weights and of the order of shards (the order inside the shuffle buffer is not seeded
            by open_clip_train, so two runs differ a little).
        device: torch device or ``auto``.
        samples_seen: samples in all, the same for subsets of any size; exactly one of this and `epochs`.
        epochs: passes over the subset.
        num_checkpoints: virtual epochs that samples_seen are cut into (an epoch is one under `epochs`).
        log_dir, name: open_clip_train's ``--logs`` and ``--name``: the run lives in ``log_dir/name``.
        aug_cfg: how training images are varied, by the names of ``open_clip.AugmentationCfg``; None: its
            default.
        val_data, val_samples: shards of held-out pairs (as `train_data`), and how many they hold: retrieval
            among them is measured after a virtual epoch, at most about `EVALUATIONS` times, and decides
            nothing. None: not measured.
        keep_early: also keep the weights after the first virtual epoch, if there are several.
        accum_freq: parts that a GPU cuts its share of the batch into; the loss is over the whole batch, and
            BatchNorm over a part.
        grad_checkpointing: compute activations again in the backward pass, where the model can.
        extra: further arguments of open_clip_train, passed as they are.
    """

    model: str
    train_data: str
    n_samples: int
    batch_size: int
    lr: float
    warmup: int
    log_dir: str
    name: str
    pretrained: str | None = None
    samples_seen: int | None = None
    epochs: int | None = None
    wd: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    lr_scheduler: Scheduler = "cosine"
    precision: Precision = "fp32"
    workers: int = 1
    seed: int = 0
    device: str = "auto"
    num_checkpoints: int = 4
    aug_cfg: Mapping[str, Any] | None = None
    val_data: str | None = None
    val_samples: int = 0
    keep_early: bool = False
    accum_freq: int = 1
    grad_checkpointing: bool = False
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.samples_seen is None) == (self.epochs is None):
            raise InputError(
                f"train: samples_seen is {self.samples_seen} and epochs is {self.epochs}; give exactly one"
            )
        for name in ("n_samples", "batch_size", "accum_freq", "num_checkpoints", "samples_seen", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"train.{name}: {value} is too small; give 1 or more")

    @property
    def folder(self) -> Path:
        """Where open_clip_train writes its log and checkpoints."""
        return Path(self.log_dir) / self.name


@dataclass(frozen=True)
class StepPlan:
    """How a run is cut: ``total_steps = virtual_epochs * steps_per_epoch`` steps of one batch each."""

    virtual_epochs: int
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int


def steps(spec: TrainSpec) -> StepPlan:
    """Number of steps of a run. Under samples_seen it depends on nothing but that and batch_size.

    Raises:
        InputError: fewer samples than one batch.
    """
    if spec.n_samples < spec.batch_size:
        raise InputError(
            f"train.batch_size: {spec.batch_size} is more than the {spec.n_samples} samples to train on;"
            f" give at most {spec.n_samples}, or a larger fraction"
        )
    if spec.samples_seen is not None:
        in_all = math.ceil(spec.samples_seen / spec.batch_size)
        epochs = min(spec.num_checkpoints, in_all)
        per_epoch = math.ceil(in_all / epochs)
    else:
        assert spec.epochs is not None
        epochs = spec.epochs
        per_epoch = math.ceil(spec.n_samples / spec.batch_size)
    if per_epoch >= 10 * STEP_MULTIPLE:
        per_epoch = math.ceil(per_epoch / STEP_MULTIPLE) * STEP_MULTIPLE
    return StepPlan(epochs, per_epoch * spec.batch_size, per_epoch, epochs * per_epoch)


def expand_shards(train_data: str) -> list[str]:
    """Shards that a ``train_data`` string names, as webdataset expands it."""
    import braceexpand

    return [url for part in train_data.split("::") for url in braceexpand.braceexpand(part)]


def shard_list(shards: Iterable[str | Path]) -> str:
    """The ``train_data`` string that names these shards and no others, whatever characters are in a path.

    Raises:
        InputError: a path holds ``::``, which separates shards.
    """
    names = [str(shard) for shard in shards]
    if bad := [name for name in names if "::" in name]:
        raise InputError(f"train_data: {bad[0]!r} holds '::', which separates shards; move it elsewhere")
    return "::".join(re.sub(r"([\\{}])", r"\\\1", name) for name in names)


def local_batch_size(spec: TrainSpec, n_gpus: int = 1) -> int:
    """Samples that one GPU takes at once, open_clip_train's ``--batch-size``.

    Raises:
        InputError: a batch that the GPUs, and the parts of each, cannot share equally.
    """
    parts = n_gpus * spec.accum_freq
    if spec.batch_size % parts:
        raise InputError(
            f"train.batch_size: {spec.batch_size} cannot be shared equally by {n_gpus} GPUs with"
            f" train.accum_freq {spec.accum_freq}; give a multiple of {parts}"
        )
    return spec.batch_size // parts


def data_workers(spec: TrainSpec, n_gpus: int = 1) -> int:
    """Data-loading processes for each GPU: at most ``spec.workers``, fewer where the data asks for it.

    open_clip_train deals whole shards out to the processes and each makes its own full batches (parts of one
    under `accum_freq`), so that a process whose shards hold less than a batch would wait for ever; and it
    rounds the batches of an epoch up to a multiple of the processes, which would make the steps depend on
    them.

    Raises:
        InputError: as `local_batch_size`; fewer shards than GPUs, or too few samples for them.
    """
    shards = len(expand_shards(spec.train_data))
    local_batch = local_batch_size(spec, n_gpus)
    per_epoch = steps(spec).steps_per_epoch * spec.accum_freq

    def enough(processes: int) -> bool:
        # one shard less than the fair share: the last shard of a set may be nearly empty
        dealt = shards // processes - (processes > 1)
        return processes == 1 or dealt * (spec.n_samples // shards) >= local_batch

    for workers in range(spec.workers, 0, -1):
        if per_epoch % workers == 0 and shards >= workers * n_gpus and enough(workers * n_gpus):
            return workers
    if spec.workers == 0 and shards >= n_gpus and enough(n_gpus):
        return 0
    raise InputError(
        f"train.train_data: {shards} shards with {spec.n_samples} samples are too few to feed {n_gpus} GPUs"
        f" with batches of {local_batch}; write smaller shards or use fewer GPUs"
    )


def warnings(spec: TrainSpec, n_gpus: int = 1) -> list[str]:
    """What the user should know before the run starts, one line each.

    Raises:
        InputError: as `steps` and `data_workers`.
    """
    plan = steps(spec)
    found = []
    if spec.warmup >= plan.total_steps:
        found.append(
            f"warm-up of {spec.warmup} steps is not over when training ends after {plan.total_steps}:"
            f" the learning rate never reaches {spec.lr:g}; lower train.warmup"
        )
    workers = data_workers(spec, n_gpus)
    if workers < spec.workers:
        found.append(
            f"{workers} data workers instead of {spec.workers}: the {len(expand_shards(spec.train_data))}"
            " shards do not feed more with full batches"
        )
    if spec.precision == "fp16":
        found.append("precision fp16 trains unreliably (open_clip says so itself); use amp or amp_bf16")
    return found


def arguments(spec: TrainSpec, n_gpus: int = 1) -> list[str]:
    """Command line of open_clip_train for a run, without the program's name.

    Raises:
        InputError: as `steps` and `data_workers`.
    """
    plan = steps(spec)
    device = "cuda" if spec.device == "auto" else spec.device
    given: dict[str, object] = {
        "model": spec.model,
        "train-data": spec.train_data,
        "dataset-type": "webdataset",
        "train-num-samples": plan.samples_per_epoch,
        "epochs": plan.virtual_epochs,
        "batch-size": local_batch_size(spec, n_gpus),
        "workers": data_workers(spec, n_gpus),
        "lr": spec.lr,
        "wd": spec.wd,
        "beta1": spec.beta1,
        "beta2": spec.beta2,
        "eps": spec.eps,
        "warmup": spec.warmup,
        "lr-scheduler": spec.lr_scheduler,
        "precision": spec.precision,
        "seed": spec.seed,
        "device": device,
        "logs": spec.log_dir,
        "name": spec.name,
        "resume": "latest",
        # only the newest checkpoint is kept; the last one is written in any case
        "save-frequency": 0,
        "log-every-n-steps": max(1, min(100, plan.steps_per_epoch // 10)),
    }
    if spec.pretrained:
        given["pretrained"] = spec.pretrained
    if spec.accum_freq > 1:
        given["accum-freq"] = spec.accum_freq
    if spec.val_data:
        given["val-data"] = spec.val_data
        given["val-num-samples"] = spec.val_samples
        given["val-frequency"] = math.ceil(plan.virtual_epochs / EVALUATIONS)
    flags = ["--save-most-recent"] + (["--local-loss", "--gather-with-grad"] if n_gpus > 1 else [])
    if n_gpus > 1 and device.startswith("cuda"):  # torch has none for the CPU
        flags.append("--use-bn-sync")  # the number of GPUs must not change what BatchNorm is over
    if spec.grad_checkpointing:
        flags.append("--grad-checkpointing")
    if spec.aug_cfg:
        flags += ["--aug-cfg", *(f"{key}={value!r}" for key, value in spec.aug_cfg.items())]
    return [*(text for key, value in given.items() for text in (f"--{key}", str(value))), *flags, *spec.extra]


def command(spec: TrainSpec, n_gpus: int, module: str) -> list[str]:
    """Argv that runs ``module`` once, or under torchrun once for each GPU of this machine."""
    arguments(spec, n_gpus)  # refuse what cannot be run before a process is started
    if n_gpus == 1:
        return [sys.executable, "-m", module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_gpus)]
    return [sys.executable, *torchrun, "-m", module]


def launch(
    spec: TrainSpec,
    on_progress: Callable[[Progress], None] | None = None,
    on_evaluation: Callable[[Progress], None] | None = None,
) -> None:
    """Train in this process (one of several under torchrun), going on from the newest checkpoint there is.

    A run that is already complete returns at once. ``on_progress`` is called on the first process for each
    line that open_clip_train logs, with step, total_steps, epoch, loss, lr, samples_per_second (mean since
    the line before), logit_scale and eta_seconds; ``on_evaluation`` for each evaluation on the held-out
    pairs, with step, loss, and the recalls by `evaluate.retrieval_recall`'s names.

    Raises:
        InputError: as `check_model` and `arguments`; a shard is missing; the folder holds a run with other
            settings.
        RuntimeError: open_clip_train returned without having trained to the last step.
    """
    check_model(ModelSpec(spec.model, spec.pretrained))
    n_gpus, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    spec = dataclasses.replace(spec, device=resolve_device(spec.device))
    args = arguments(spec, n_gpus)
    _check_shards(spec.train_data)
    if rank == 0:
        _claim_folder(spec)
    if is_complete(spec):
        return
    register_model_configs()
    from open_clip_train.main import main as open_clip_train

    if spec.device == "cpu":
        _share_cores(data_workers(spec, n_gpus))
    kernels = cpu_kernels() if spec.device == "cpu" else nullcontext()
    kept = kept_in_memory(expand_shards(spec.train_data))
    with _progress_of(spec, on_progress, on_evaluation), kernels, kept:
        open_clip_train(args)
    if rank == 0 and not is_complete(spec):
        raise RuntimeError(
            f"open_clip_train ended without the checkpoint of epoch {steps(spec).virtual_epochs};"
            f" see {spec.folder / 'out.log'}"
        )


def _check_shards(train_data: str) -> None:
    """open_clip_train skips a shard that is not there, and waits for ever when none is."""
    for shard in expand_shards(train_data):
        if "://" not in shard and not shard.startswith("pipe:") and not Path(shard).is_file():
            raise InputError(f"train_data: no shard at {shard}; write the shards again or mend the path")


def _share_cores(workers: int) -> None:
    """Leave the data workers a core each: torch's threads spin, and take several times as long otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Two things that open_clip_train leaves at torch's default, and that slow down a small model on a CPU:
    AdamW goes once over the weights, not once for each of its operations (most weights are the token
    embedding), and images lie channels last, for which convolutions, pooling and batch norm are faster. The
    results differ in rounding only."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def fuse(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if "amsgrad" in group:  # Adam's and AdamW's alone
                group["fused"] = True

    def channels_last(module: Any, images: tuple[Any, ...]) -> Any:  # torch declares None, and takes a tuple
        if isinstance(module, torch.nn.Conv2d) and images[0].dim() == 4:
            return (images[0].contiguous(memory_format=torch.channels_last),)  # stays so from there on
        return None

    handles = register_optimizer_step_pre_hook(fuse), register_module_forward_pre_hook(channels_last)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _claim_folder(spec: TrainSpec) -> None:
    """Note the run's settings in its folder, so that it is continued under the same ones only."""
    note = spec.folder / "spec.json"
    settings = {k: v for k, v in json.loads(to_json(spec)).items() if k not in FREE_TO_CHANGE}
    settings["train_data"] = _contents(expand_shards(spec.train_data))
    if spec.pretrained is not None:
        settings["pretrained"] = _contents([spec.pretrained])
    if note.exists():
        newer = {f.name: f.default for f in dataclasses.fields(spec)}  # than an earlier version's note
        before = {**newer, "train_data": settings["train_data"], **json.loads(note.read_text())}
        changed = sorted(key for key in settings if settings[key] != before[key])
        if changed:
            raise InputError(
                f"train: {spec.folder} holds a run with {changed[0]} = {before.get(changed[0])!r}, now it is"
                f" {settings[changed[0]]!r}; remove that folder or use another name"
            )
    else:
        spec.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2))


def _contents(files: Sequence[str]) -> str:
    """Say what files are, wherever they lie: a run goes on after its project was moved."""
    sizes = [(Path(file).name, Path(file).stat().st_size) if Path(file).is_file() else file for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(files)} of digest {digest[:16]}, the first {Path(files[0]).name}"


def _final_checkpoint(spec: TrainSpec) -> Path:
    return spec.folder / "checkpoints" / f"epoch_{steps(spec).virtual_epochs}.pt"


def _early_checkpoint(spec: TrainSpec) -> Path:
    return spec.folder / "checkpoints" / "epoch_1.pt"


def _keep_early(spec: TrainSpec) -> None:
    """Give the newest checkpoint, that of the first epoch, a name of its own: open_clip_train replaces it."""
    early = _early_checkpoint(spec)
    if not early.exists():
        try:
            early.hardlink_to(spec.folder / "checkpoints" / "epoch_latest.pt")
        except OSError:  # a file system without links
            shutil.copyfile(spec.folder / "checkpoints" / "epoch_latest.pt", early)


def is_complete(spec: TrainSpec) -> bool:
    """Whether the run's folder holds the whole checkpoint of its last epoch."""
    latest = spec.folder / "checkpoints" / "epoch_latest.pt"
    if not latest.exists() or not _final_checkpoint(spec).exists():
        return False
    # open_clip_train writes epoch_N.pt first and renames epoch_latest.pt into place after it
    return _load(latest)["epoch"] == steps(spec).virtual_epochs


def _load(path: Path) -> dict[str, Any]:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# e.g. "Train Epoch: 0 [  512/2048 (25%)] Data (t): 0.01 Batch (t): 0.05, 5120/s, 5120/s/gpu LR: 0.000500
# Logit Scale: 14.286 Contrastive_loss: 5.5413 (5.5413) Loss: 5.5413 (5.5413)"
TRAIN_LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<samples>\d+)/.*"
    r"Batch \(t\): (?P<batch_seconds>[\d.]+),.*"
    r"LR: (?P<lr>[\d.e+-]+) Logit Scale: (?P<logit_scale>[\d.]+).* Loss: (?P<loss>[\d.naife+-]+)"
)


# logged when the checkpoint of the first epoch lies there whole, by a resumed run too
SECOND_EPOCH = "Start epoch 1"


def parse_line(line: str, spec: TrainSpec) -> Progress | None:
    """Progress that a line of open_clip_train's log tells of; None for a line about something else."""
    found = TRAIN_LINE.search(line)
    if not found:
        return None
    plan = steps(spec)
    epoch, seconds = int(found["epoch"]), float(found["batch_seconds"])
    step = epoch * plan.steps_per_epoch + int(found["samples"]) // spec.batch_size
    return {
        "step": step,
        "total_steps": plan.total_steps,
        "epoch": epoch,
        "loss": float(found["loss"]),
        "lr": float(found["lr"]),
        "logit_scale": float(found["logit_scale"]),
        "samples_per_second": spec.batch_size / seconds if seconds else math.inf,
        "eta_seconds": (plan.total_steps - step) * seconds,
    }


# e.g. "Eval Epoch: 1 image_to_text_mean_rank: 12.2461\timage_to_text_median_rank: 4.0000\t..."
EVALUATION_LINE = re.compile(r"Eval Epoch: (?P<epoch>\d+) (?P<metrics>image_to_text_.*)")
EVALUATION_NAMES = {
    "clip_val_loss": "loss",
    **{f"image_to_text_R@{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_R@{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
}


def parse_evaluation(line: str, spec: TrainSpec) -> Progress | None:
    """Step and scores of a line of open_clip_train's log that tells of an evaluation; None for another."""
    found = EVALUATION_LINE.search(line)
    if not found:
        return None
    values = dict(item.split(": ") for item in found["metrics"].split("\t"))
    named = {EVALUATION_NAMES[name]: float(values[name]) for name in values if name in EVALUATION_NAMES}
    return {"step": int(found["epoch"]) * steps(spec).steps_per_epoch, **named}


@contextmanager
def _progress_of(
    spec: TrainSpec,
    on_progress: Callable[[Progress], None] | None,
    on_evaluation: Callable[[Progress], None] | None,
) -> Iterator[None]:
    """Hand each line that reaches the root logger to whom it concerns; tidy the logger up after."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if spec.keep_early and record.getMessage() == SECOND_EPOCH:
                _keep_early(spec)
            progress = parse_line(record.getMessage(), spec)
            if progress and on_progress:
                on_progress(progress)
            evaluation = parse_evaluation(record.getMessage(), spec) if on_evaluation else None
            if evaluation and on_evaluation:
                on_evaluation(evaluation)

    root = logging.getLogger()
    level, before = root.level, root.handlers[:]
    root.addHandler(Listener())
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in root.handlers[:]:
            if handler not in before:
                root.removeHandler(handler)
                handler.close()


def learning_curve(spec: TrainSpec) -> list[Progress]:
    """All progress of a run from its log, by step; steps that were repeated after a break count once."""
    by_step: dict[float, Progress] = {}
    with (spec.folder / "out.log").open(encoding="utf-8", errors="replace") as lines:
        for progress in filter(None, (parse_line(line, spec) for line in lines)):
            by_step[progress["step"]] = progress
    return [by_step[step] for step in sorted(by_step)]


def evaluations(spec: TrainSpec) -> list[Progress]:
    """All evaluations of a run from its log, by step, as `learning_curve`."""
    with (spec.folder / "out.log").open(encoding="utf-8", errors="replace") as lines:
        found = filter(None, (parse_evaluation(line.rstrip("\n"), spec) for line in lines))
        by_step = {point["step"]: point for point in found}
    return [by_step[step] for step in sorted(by_step)]


def _training_seconds(curve: Iterable[Progress], batch_size: int) -> float:
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
    import open_clip
    import torch
    from open_clip.push_to_hf_hub import save_config_for_hf

    if not is_complete(spec):
        raise RuntimeError(f"the run in {spec.folder} has not reached its last epoch; launch it again")
    register_model_configs()
    weights = _weights(_final_checkpoint(spec))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise RuntimeError(f"training of {spec.name} diverged (weights are not finite); lower train.lr")
    # the architecture alone: it checks that the weights fit, and holds the preprocessing of the start weights
    model = open_clip.create_model(spec.model, spec.pretrained, load_weights=False)
    model.load_state_dict(weights)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), out / CHECKPOINT)
    if spec.keep_early and _early_checkpoint(spec).exists() and steps(spec).virtual_epochs > 1:
        torch.save(_weights(_early_checkpoint(spec)), out / EARLY_CHECKPOINT)
    config = open_clip.get_model_config(spec.model)
    save_config_for_hf(model, out / "open_clip_config.json", config)  # type: ignore[arg-type]
    tokenizer = open_clip.get_tokenizer(spec.model)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(out))  # type: ignore[union-attr]
    plan, curve = steps(spec), learning_curve(spec)
    record = {
        "model": spec.model,
        "pretrained": spec.pretrained,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_samples": spec.n_samples,
        "steps": plan.total_steps,
        "samples_seen": plan.total_steps * spec.batch_size,
        "passes": plan.total_steps * spec.batch_size / spec.n_samples,
        "training_seconds": _training_seconds(curve, spec.batch_size),
        "first_loss": curve[0]["loss"],
        "last_loss": curve[-1]["loss"],
        "spec": json.loads(to_json(spec)),
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "webdataset", "numpy")
        },
        "learning_curve": curve,
        "held_out_retrieval": evaluations(spec),
    }
    (out / RECORD).write_text(json.dumps(record, indent=2))
    return record


def _weights(checkpoint: Path) -> dict[str, Any]:
    return {name.removeprefix("module."): tensor for name, tensor in _load(checkpoint)["state_dict"].items()}


def to_json(spec: TrainSpec) -> str:
    """A spec as JSON, for `from_json` in the training process."""
    return json.dumps(dataclasses.asdict(spec))


def from_json(text: str) -> TrainSpec:
    """The spec that `to_json` wrote."""
    fields = json.loads(text)
    return TrainSpec(**{**fields, "extra": tuple(fields.get("extra", ()))})


def main(argv: Sequence[str]) -> None:
    """Run one training: ``SPEC.json OUT_DIR``. open_clip_train logs to stderr."""
    spec = from_json(Path(argv[0]).read_text())
    launch(spec)
    if int(os.environ.get("RANK", 0)) == 0:
        finish(spec, argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
