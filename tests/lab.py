"""A small real experiment for tests: real shards, a real Dagster instance, real training."""

import io
import shutil
import socket
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import yaml

from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.pool.bundled import unpack_sample
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import iter_groups

SAMPLES_PER_SHARD = 80
TRAINING = {"samples_seen": 192, "batch_size": 32, "warmup": 2, "num_checkpoints": 2, "workers": 0}
SETTINGS: dict[str, Any] = {
    "name": "lab",
    "work_dir": "work",
    "shards": {"source": "pool"},
    "proxy": {"model": "clipcov-tiny-RN", "train": TRAINING},
    "embed": {"batch_size": 64},
    "labels": {"latent_classes": "clusters", "n_clusters": 5},
    "select": {"fractions": [0.5], "methods": {"clipcov": {}, "random": {}}},
    "train": {"model": "clipcov-tiny-RN", **TRAINING},
    "evaluate": {
        "holdout_fraction": 0.2,
        "sets": {"vendor": {"shards": "vendor", "tasks": ["retrieval", "zeroshot_names"]}},
        "primary_metric": "vendor/text_retrieval_recall@5",
    },
    # six steps make no proxy: the checks are right, but here the graph is to go on
    "diagnostics": {"checks": {name: {"severity": "warn"} for name in ("matched_pairs", "alignment")}},
}
SELECTION = (
    "raw_shards",
    "proxy_model",
    "embeddings",
    "early_similarities",
    "pseudo_labels",
    "sample_index",
    "rankings",
    "subsets",
)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [some.getsockname()[1] for some in sockets]
    for some in sockets:
        some.close()
    return ports


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has collected yet, a zombie, has too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def still_there(processes: Iterable[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Give processes some time to end; return those that have not."""
    left, deadline = list(processes), time.monotonic() + seconds
    while (left := [process for process in left if not gone(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def copy_samples(source: Path, target: Path, start: int, count: int) -> None:
    """Copy some samples of a shard, bytes unchanged, into a new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as tar:
        for index, group in enumerate(iter_groups(Shard("x", str(source), ""), None)):
            if start <= index < start + count:
                for suffix, data in group.members:
                    info = tarfile.TarInfo(f"{group.key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Lab:
    """An experiment in a folder: its YAML can be edited, its shards changed, and it can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first_run: Counter[str] = Counter()

    @classmethod
    def create(cls, folder: Path, sample: Path) -> "Lab":
        """Write three shards of 80 real samples, an evaluation shard of 60, and the YAML."""
        lab = cls(folder)
        train, heldout = unpack_sample(sample)
        for index in range(3):
            copy_samples(train / f"{index:05d}.tar", lab.shard(index), 0, SAMPLES_PER_SHARD)
        copy_samples(heldout / "00000.tar", folder / "vendor" / "00000.tar", 0, 60)
        lab.yaml.write_text(yaml.safe_dump(SETTINGS))
        return lab

    def copy(self, folder: Path) -> "Lab":
        """Return an independent copy, everything that was built included."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        # MLflow remembers a run's folder for the life of a process: the copy's runs are those of the original
        if mlflow := sys.modules.get("mlflow.tracking._tracking_service.utils"):
            mlflow._artifact_repos_cache.clear()
        return Lab(folder)

    @property
    def yaml(self) -> Path:
        return self.folder / "experiment.yaml"

    def shard(self, index: int) -> Path:
        return self.folder / "pool" / f"{index:05d}.tar"

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the YAML."""
        settings = yaml.safe_load(self.yaml.read_text())
        change(settings)
        self.yaml.write_text(yaml.safe_dump(settings))

    def project(self) -> Project:
        return Project.open(str(self.yaml))

    def plan(self) -> Plan:
        return self.project().plan()

    def instance(self) -> dg.DagsterInstance:
        from assets.running.instance import project_instance

        return project_instance(self.project().config)

    def run(self, only: tuple[str, ...] = ()) -> Counter[str]:
        """Run what is out of date; return what was executed by stage. Fails the test when a run fails."""
        from assets.running.run import run_plan

        with self.instance() as instance:
            executed, failed = run_plan(instance, str(self.yaml), only)
        assert not failed, failed
        return executed

    def trains(self) -> bool:
        """Whether a training process of this experiment is alive."""
        for process in psutil.process_iter(["cmdline"]):
            if "assets.training.server" in (process.info["cmdline"] or ()):
                with suppress(OSError):  # the server itself writes elsewhere than to a training's log
                    if Path(f"/proc/{process.pid}/fd/1").readlink().is_relative_to(self.folder):
                        return True
        return False


def record_of(lab: Lab, name: str) -> Record:
    record = lab.plan().by_name[name].record
    assert record is not None
    return record
