"""Runs one training with open_clip_train in this process, from the newest checkpoint there is.

A run is cut into virtual epochs of equal length, after each of which open_clip_train leaves a checkpoint that
the run can go on from, in the middle of a pass over the samples too. Arms that are given the same
`samples_seen` take exactly the same number of steps, whatever the sizes of their subsets. Every pass draws
each sample once (or by its weight), in an order that follows from seed and pass alone. (DataComp draws shards
with replacement, which leaves out a third of the shards of a small subset in each pass.)

`python -m clipcov_pipeline.training.launch SPEC.json OUT_DIR` runs one training from a `TrainSpec` in JSON.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clipcov_pipeline.proxy.models import ModelSpec, check_model, register_model_configs, resolve_device
from clipcov_pipeline.training.command import arguments
from clipcov_pipeline.training.damage import set_aside_damaged
from clipcov_pipeline.training.folder import claim_folder, is_complete
from clipcov_pipeline.training.log import Point, progress_of
from clipcov_pipeline.training.result import finish
from clipcov_pipeline.training.spec import TrainSpec, from_json, steps

# torch's threads spin while they wait, and so keep the data-loading processes off the cores; read once, when
# torch is imported
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "passive"}


def launch(
    spec: TrainSpec,
    on_progress: Callable[[Point], None] | None = None,
    on_evaluation: Callable[[Point], None] | None = None,
) -> None:
    """Train in this process (one of several under torchrun), going on from the newest checkpoint there is.

    A run that is already complete returns at once; a damaged checkpoint is set aside
    (`set_aside_damaged`). ``on_progress`` is called on the first process for each
    line that open_clip_train logs, with step, total_steps, epoch, loss, lr, samples_per_second (mean since
    the line before), logit_scale and eta_seconds; ``on_evaluation`` for each evaluation on the held-out
    pairs, with step, loss, and the recalls by `metrics.retrieval_recall`'s names.

    Raises:
        InputError: as `check_model`, `arguments` and `index_loader.train_data`; a shard is gone or has
            changed; the folder holds a run with other settings.
        RuntimeError: open_clip_train returned without having trained to the last step.
    """
    check_model(ModelSpec(spec.model, spec.pretrained))
    n_gpus, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    spec = dataclasses.replace(spec, device=resolve_device(spec.device))
    args = arguments(spec, n_gpus)
    if rank == 0:
        for line in set_aside_damaged(spec):
            logging.getLogger(__name__).warning(line)
        claim_folder(spec)
    if is_complete(spec):
        return
    register_model_configs()
    from open_clip_train.main import main as open_clip_train

    kernels = cpu_kernels() if spec.device == "cpu" else nullcontext()
    with progress_of(spec, on_progress, on_evaluation), kernels, _data(spec):
        open_clip_train(args)
    if rank == 0 and not is_complete(spec):
        raise RuntimeError(
            f"open_clip_train ended without the checkpoint of epoch {steps(spec).virtual_epochs};"
            f" see {spec.folder / 'out.log'}"
        )


def _data(spec: TrainSpec) -> AbstractContextManager[None]:
    from clipcov_pipeline.training.index_loader import IndexData, data_from_index

    options = dict(spec.storage_options or {})
    return data_from_index(
        IndexData(
            spec.index, spec.batch_size, spec.seed, spec.quota, spec.cache, options, held_out=spec.val_data,
            captions=spec.captions,
        )
    )  # fmt: skip


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Change two defaults of torch inside the block that slow down a small model on a CPU.

    AdamW goes over the weights once, not once for each of its operations (most weights are the token
    embedding), and images lie channels last, for which convolutions, pooling and batch norm are faster. The
    results differ in rounding only.
    """
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


def main(argv: Sequence[str]) -> None:
    """Run one training: ``SPEC.json OUT_DIR``. open_clip_train logs to stderr."""
    os.environ.update(SLEEPING_THREADS | os.environ)
    spec = from_json(Path(argv[0]).read_text())
    launch(spec)
    if int(os.environ.get("RANK", 0)) == 0:
        finish(spec, argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
