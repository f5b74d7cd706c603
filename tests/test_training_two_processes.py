"""Two processes under a real torchrun share each step, also after a kill in the middle."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import polars as pl
import psutil
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.training import command
from clipcov_pipeline.training.spec import TrainSpec, to_json
from index_of import index_of_noise, index_spec

SAMPLES, PASSES = 64, 6


def begin(spec: TrainSpec, folder: Path) -> subprocess.Popen[str]:
    (folder / "spec.json").write_text(to_json(spec))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("train_on_cpus.py")
    argv = [sys.executable, *torchrun, str(script), str(folder / "spec.json"), str(folder / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)


def kill_all(run: subprocess.Popen[str]) -> None:
    """Torchrun's processes have sessions of their own."""
    first = psutil.Process(run.pid)
    for process in [first, *first.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.communicate()


@pytest.mark.slow
def test_every_sample_is_given_once_a_pass_to_one_of_two_processes_also_after_a_kill(tmp_path):
    index = index_of_noise(tmp_path, [40, 24])
    spec = index_spec(
        tmp_path, index, n_samples=SAMPLES, samples_seen=SAMPLES * PASSES, batch_size=16, accum_freq=2,
        workers=1, num_checkpoints=4,
    )  # fmt: skip
    run, newest = begin(spec, tmp_path), spec.folder / "checkpoints" / "epoch_latest.pt"
    while not newest.exists():
        assert run.poll() is None, run.stderr
        time.sleep(0.05)
    kill_all(run)
    assert not (tmp_path / "out").exists()

    run = begin(spec, tmp_path)
    _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    seen = pl.read_parquet(tmp_path / "out" / "seen.parquet")
    assert seen.height == SAMPLES
    assert seen["times"].to_list() == [PASSES] * SAMPLES
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["samples_seen"] == SAMPLES * PASSES


def test_several_gpus_of_a_cpu_are_refused_before_a_process_is_started(tmp_path):
    spec = index_spec(tmp_path, "index.parquet", device="cpu")
    with pytest.raises(InputError, match=r"train\.gpus: found 2, expected 1 on a CPU"):
        command.command(spec, 2, "clipcov_pipeline.training.launch")
