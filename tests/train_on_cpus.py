"""A training by several processes of a CPU, for tests; run by torchrun: ``SPEC.json OUT_DIR``.

open_clip_train 3.3 hands the CPU to torch as the device to lay a model out on, which torch refuses; nothing
else of it is changed.
"""

import sys
from typing import Any

import torch

from clipcov_pipeline.training.launch import main

distributed = torch.nn.parallel.DistributedDataParallel


def without_devices(model: torch.nn.Module, device_ids: object = None, **rest: Any) -> torch.nn.Module:
    assert device_ids is not None
    return distributed(model, **rest)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = without_devices
    main(sys.argv[1:])
