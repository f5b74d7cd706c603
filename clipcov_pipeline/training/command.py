"""The arguments that open_clip_train is run with, and what is to be said of them before."""

import math
import sys

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.models import resolve_device
from clipcov_pipeline.training.spec import EVALUATIONS, TrainSpec, steps

# settings that open_clip_train has under the same name
_AS_NAMED = ("lr", "wd", "beta1", "beta2", "eps", "warmup", "lr_scheduler", "precision", "seed")


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


def warnings(spec: TrainSpec) -> list[str]:
    """What the user should know before the run starts, one line each.

    Raises:
        InputError: as `steps`.
    """
    plan = steps(spec)
    found = []
    if spec.warmup >= plan.total_steps:
        found.append(
            f"warm-up of {spec.warmup} steps is not over when training ends after {plan.total_steps}:"
            f" the learning rate never reaches {spec.lr:g}; lower train.warmup"
        )
    if spec.precision == "fp16":
        found.append("precision fp16 trains unreliably (open_clip says so itself); use amp or amp_bf16")
    return found


def arguments(spec: TrainSpec, n_gpus: int = 1) -> list[str]:
    """Command line of open_clip_train for a run, without the program's name.

    Raises:
        InputError: as `steps` and `local_batch_size`.
    """
    plan = steps(spec)
    given: dict[str, object] = {
        "model": spec.model,
        "train-data": spec.index,
        "dataset-type": "webdataset",
        "train-num-samples": plan.samples_per_epoch,
        "epochs": plan.virtual_epochs,
        "batch-size": local_batch_size(spec, n_gpus),
        "workers": spec.workers,
        **{name.replace("_", "-"): getattr(spec, name) for name in _AS_NAMED},
        "device": _device(spec),
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
        given["val-frequency"] = math.ceil(plan.virtual_epochs / EVALUATIONS)
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return [*options, *_flags(spec, n_gpus), *spec.extra]


def _device(spec: TrainSpec) -> str:
    return "cuda" if spec.device == "auto" else spec.device


def _flags(spec: TrainSpec, n_gpus: int) -> list[str]:
    flags = ["--save-most-recent"] + (["--local-loss", "--gather-with-grad"] if n_gpus > 1 else [])
    if n_gpus > 1 and _device(spec).startswith("cuda"):  # torch has none for the CPU
        flags.append("--use-bn-sync")  # the number of GPUs must not change what BatchNorm is over
    if spec.grad_checkpointing:
        flags.append("--grad-checkpointing")
    if spec.aug_cfg:
        flags += ["--aug-cfg", *(f"{key}={value!r}" for key, value in spec.aug_cfg.items())]
    return flags


def command(spec: TrainSpec, n_gpus: int, module: str) -> list[str]:
    """Argv that runs ``module`` once, or under torchrun once for each GPU of this machine.

    Raises:
        InputError: as `arguments`; several GPUs of a CPU, which open_clip_train cannot share a model between.
    """
    arguments(spec, n_gpus)  # refuse what cannot be run before a process is started
    if n_gpus == 1:
        return [sys.executable, "-m", module]
    if resolve_device(spec.device) == "cpu":
        raise InputError(
            f"train.gpus: found {n_gpus}, expected 1 on a CPU: open_clip_train is one process there"
        )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_gpus)]
    return [sys.executable, *torchrun, "-m", module]
