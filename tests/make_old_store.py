"""Makes `store_of_0_2.tar.xz`: a small experiment, built by the code of an earlier commit.

    git worktree add /tmp/old COMMIT
    python tests/make_old_store.py /tmp/old tests/store_of_0_2.tar.xz

`test_experiment_old_store.py` holds that today's code finds all of it complete. When a stage's code version
is raised on purpose, make the archive again, of the commit that raised it, and name that commit in the test.
`store_of_0_1.tar.xz` was made so of ecba9eb, the last commit whose subsets were tars.

Checkpoints compress to little because the model they start from has few different weights, and the learning
rate is too small to change one. Dagster's and MLflow's own files are left out: the plan reads neither.
"""

import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from make_shards import write_pool

MODEL = "clipcov-tiny-RN"
SETTINGS: dict[str, Any] = {
    "name": "old",
    "work_dir": "work",
    "shards": {"source": "pool"},
    "proxy": {"model": MODEL, "pretrained": "./start.pt", "early": "./early.pt"},
    "labels": {"class_names": "names.txt", "templates": ["a {}"]},
    "select": {"fractions": [0.5], "methods": {"clipcov": {}, "c_rho": {}}},
    "train": {
        "model": MODEL,
        "pretrained": "./start.pt",
        "samples_seen": 16,
        "batch_size": 8,
        "lr": 1e-30,
        "warmup": 0,
        "num_checkpoints": 1,
        "workers": 0,
    },
    "evaluate": {
        "holdout_fraction": 0.2,
        "sets": {"vendor": {"shards": "vendor", "tasks": ["retrieval", "zeroshot_names"]}},
        "primary_metric": "vendor/text_retrieval_recall@5",
    },
    "diagnostics": {
        "tsne_samples": 32,
        "checks": {name: {"severity": "warn"} for name in ("matched_pairs", "alignment")},
    },
}
PACKED = (
    "experiment.yaml",
    "names.txt",
    "start.pt",
    "early.pt",
    "pool",
    "vendor",
    "work/store",
    "work/lancedb",
)
MTIME = 1_700_000_000  # whole seconds: an archive keeps no more, and the plan looks at them


def write_weights(path: Path, seed: int) -> None:
    """Write a checkpoint whose layers repeat one row of noise, at the scale that a fresh model has."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.create_model(MODEL)
    noise = np.random.default_rng(seed).standard_normal(1021).astype(np.float32)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                tiled = np.resize(noise, weights.numel()).reshape(tuple(weights.shape))
                weights.copy_(torch.from_numpy(tiled) * weights.std())
            assert bool((weights == 0).all() or weights.abs().max() > 1e-6), name
    torch.save(model.state_dict(), path)


def build(code: Path, folder: Path) -> None:
    """Write the inputs, and run the whole graph with the code of a checkout."""
    import open_clip

    open_clip.add_model_config(next(code.glob("clipcov_pipeline/**/model_configs")))
    write_pool(folder / "pool", n_shards=2, samples_per_shard=20)
    write_pool(folder / "vendor", n_shards=1, samples_per_shard=12)
    for name, seed in (("start.pt", 0), ("early.pt", 1)):
        write_weights(folder / name, seed)
    (folder / "names.txt").write_text("caption\nshard\n")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    for path in folder.rglob("*"):
        os.utime(path, (MTIME, MTIME))
    run = [sys.executable, "-m", "clipcov_pipeline.cli", "run", "--config", str(folder / "experiment.yaml")]
    subprocess.run(run, check=True, cwd=code, env={**os.environ, "PYTHONPATH": str(code)})


def pack(folder: Path, archive: Path) -> None:
    """Pack what the plan reads, files of one name side by side: checkpoints are much alike."""
    paths = [
        path for name in PACKED for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(paths, key=lambda path: (path.suffix, path.name, path)):
            tar.add(path, path.relative_to(folder), filter=_nobodys)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20}]
    archive.write_bytes(lzma.compress(file.getvalue(), filters=filters))


def _nobodys(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = int(info.mtime)
    return info


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(sys.argv[1]).resolve(), Path(scratch))
        pack(Path(scratch), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {Path(sys.argv[2]).stat().st_size:,} bytes")
