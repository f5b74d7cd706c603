"""Runs one training with open_clip_train in this process, from the newest checkpoint there is.

A run is cut into virtual epochs of equal length, after each of which open_clip_train leaves a checkpoint that
the run can go on from. Arms that are given the same `samples_seen` take exactly the same number of steps,
whatever the sizes of their subsets. Each virtual epoch draws without replacement: a pass over the shards in
random order, through a shuffle buffer, begun anew when it is exhausted. Where a virtual epoch is smaller than
the subset, the next one does not go on from there: it begins a pass in another order of shards, so over
several of them some samples come more often than others. (DataComp draws shards with replacement, which
leaves out a third of the shards of a small subset in each pass.)

`python -m clipcov_pipeline.training.launch SPEC.json OUT_DIR` runs one training from a `TrainSpec` in JSON.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.proxy.models import ModelSpec, check_model, register_model_configs, resolve_device
from clipcov_pipeline.training.command import arguments, data_workers, expand_shards
from clipcov_pipeline.training.folder import claim_folder, is_complete
from clipcov_pipeline.training.kept_samples import kept_in_memory
from clipcov_pipeline.training.log import Point, progress_of
from clipcov_pipeline.training.result import finish
from clipcov_pipeline.training.spec import TrainSpec, from_json, steps
from clipcov_pipeline.training.tar_pairs import pairs_as_everywhere


def launch(
    spec: TrainSpec,
    on_progress: Callable[[Point], None] | None = None,
    on_evaluation: Callable[[Point], None] | None = None,
) -> None:
    """Train in this process (one of several under torchrun), going on from the newest checkpoint there is.

    A run that is already complete returns at once. ``on_progress`` is called on the first process for each
    line that open_clip_train logs, with step, total_steps, epoch, loss, lr, samples_per_second (mean since
    the line before), logit_scale and eta_seconds; ``on_evaluation`` for each evaluation on the held-out
    pairs, with step, loss, and the recalls by `metrics.retrieval_recall`'s names.

    Raises:
        InputError: as `check_model` and `arguments`; a shard is missing; the folder holds a run with other
            settings.
        RuntimeError: open_clip_train returned without having trained to the last step.
    """
    check_model(ModelSpec(spec.model, spec.pretrained))
    n_gpus, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    spec = dataclasses.replace(spec, device=resolve_device(spec.device))
    args = arguments(spec, n_gpus)
    if not spec.index:
        _check_shards(spec.train_data)
    if rank == 0:
        claim_folder(spec)
    if is_complete(spec):
        return
    register_model_configs()
    from open_clip_train.main import main as open_clip_train

    if spec.device == "cpu":
        _share_cores(data_workers(spec, n_gpus))
    kernels = cpu_kernels() if spec.device == "cpu" else nullcontext()
    data = _index_data(spec) if spec.index else kept_in_memory(expand_shards(spec.train_data))
    with progress_of(spec, on_progress, on_evaluation), kernels, pairs_as_everywhere(), data:
        open_clip_train(args)
    if rank == 0 and not is_complete(spec):
        raise RuntimeError(
            f"open_clip_train ended without the checkpoint of epoch {steps(spec).virtual_epochs};"
            f" see {spec.folder / 'out.log'}"
        )


def _index_data(spec: TrainSpec) -> AbstractContextManager[None]:
    from clipcov_pipeline.training.index_loader import IndexData, data_from_index

    assert spec.index is not None
    options = dict(spec.storage_options or {})
    return data_from_index(IndexData(spec.index, spec.batch_size, spec.seed, spec.quota, spec.cache, options))


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
    spec = from_json(Path(argv[0]).read_text())
    launch(spec)
    if int(os.environ.get("RANK", 0)) == 0:
        finish(spec, argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
