"""Small trainings for the tests: specifications, and shards of noise."""

import io

import numpy as np
from PIL import Image

from clipcov_pipeline.training import command
from clipcov_pipeline.training.spec import TrainSpec
from make_shards import write_tar

MODEL = "clipcov-tiny-RN"


def spec_for(tmp_path="/nowhere", **changes):
    settings = {
        "model": MODEL,
        "index": f"{tmp_path}/index.parquet",
        "n_samples": 1000,
        "batch_size": 100,
        "lr": 1e-3,
        "warmup": 2,
        "log_dir": str(tmp_path),
        "name": "run",
        "device": "cpu",
    }
    if "epochs" not in changes:
        settings["samples_seen"] = 4000
    return TrainSpec(**{**settings, **changes})


def write_shards(folder, sizes, side=32):
    """WebDataset shards of noise images; captions are the keys. Returns their brace pattern."""
    rng = np.random.default_rng(0)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            image = io.BytesIO()
            pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(image, "webp", quality=50)
            members += [
                (f"{number:06d}.webp", image.getvalue()),
                (f"{number:06d}.txt", f"drawing {number}".encode()),
            ]
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


def parsed(spec, n_gpus=1):
    """The arguments as open_clip_train's own parser takes them."""
    from open_clip_train.params import parse_args

    args = parse_args(command.arguments(spec, n_gpus))
    args.world_size = n_gpus
    return args
