"""How long a plan takes over a pool of many shards: an experiment of which everything is built, in pretence.

The store is real, its entries hold the files and numbers that real ones have, with digests made up.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import CODE_VERSIONS

FILES: Mapping[str, tuple[str, ...]] = {
    "raw_shards": ("manifest.parquet", "places.parquet"),
    "embeddings": (),  # rows of a table
}
STATS: Mapping[str, Mapping[str, Any]] = {
    "raw_shards": {
        "json_problems": {},
        "kept_aside": 11,
        "ok": 9989,
        "quarantined": "",
        "samples": 10_000,
        "source_ids": 0,
        "statuses": {"ok": 9989, "one_colour": 11},
        "url": "pool/00000.tar",
    },
    "embeddings": {
        "dim": 512,
        "images_per_second": 148.0,
        "matched_cosine": 0.7,
        "matched_lead": 77.0,
        "norm_error": 0.0001,
        "refused": 0,
        "rows": 9989,
        "shuffled_cosine": 0.01,
        "table": "embeddings_0",
        "version": 2,
    },
}


def bench_plan(shards: int, repeat: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Plan an experiment of 50 recipes over so many shards, each time in a fresh process.

    Args:
        shards: of the pool; repeat: processes; folder: scratch, the system's temporary folder when None.

    Returns:
        JSON-able: shards, steps, and lists over the processes: CPU seconds of ``open`` (the YAML read, the
        shards listed), ``first`` and ``next`` (plans of the process, nothing changed); ``anonymous_bytes``.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clipcov-bench-", dir=folder) as room:
        config = write_experiment(Path(room), shards)
        say(f"writing the entries of {shards:,} shards ...")
        steps = pretend(config)
        found = []
        for _ in range(repeat):
            command = [sys.executable, "-m", __name__, str(config)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(run.stdout.splitlines()[-1]))
            say(str(found[-1]))
    return {"shards": shards, "steps": steps, **{name: [one[name] for one in found] for name in found[0]}}


def write_experiment(folder: Path, shards: int) -> Path:
    """Write the YAML and a pool of empty shards; return the YAML's path."""
    pool, path = folder / "pool", folder / "experiment.yaml"
    pool.mkdir()
    for number in range(shards):
        (pool / f"{number:06d}.tar").touch()
    (folder / "names.txt").write_text("cat\ndog\n")
    settings = {
        "name": "plan",
        "work_dir": str(folder / "work"),
        "shards": {"source": str(pool)},
        "proxy": {"model": "clipcov-tiny-RN", "train": {"samples_seen": 1000}},
        "labels": {"class_names": str(folder / "names.txt"), "templates": ["a {}"]},
        "select": {
            "fractions": [0.1, 0.2, 0.3, 0.4, 0.5],
            "methods": {
                "clipcov": {},
                "random": {},
                "clip_score": {},
                "semdedup": {},
                "c": {"method": "random"},
            },
        },
        "train": {"model": "clipcov-tiny-RN", "samples_seen": 1000, "lr": 0.001, "seeds": [0, 1]},
        "evaluate": {"holdout_fraction": 0.05, "primary_metric": "holdout/text_retrieval_recall@5"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def pretend(config: Path) -> int:
    """Write an entry for everything that should exist; return how many there are."""
    while True:
        project = Project.open(str(config))
        plan = project.plan()
        todo = [step for step in plan.steps if step.status is Status.BUILD]
        if not todo:
            assert not plan.todo, plan.todo[0]
            return len(plan.steps)
        outputs = _outputs_read(plan)
        for step in todo:
            _write(project, step, outputs.get(step.node.name, ()))


def _outputs_read(plan: Plan) -> dict[str, tuple[str, ...]]:
    """What is read of each entry, by its name."""
    read: dict[str, dict[str, None]] = {}
    for step in plan.steps:
        read.setdefault(step.node.name, {}).update(dict.fromkeys(step.node.needs))
        for item in (*step.node.inputs, *step.node.after):
            read.setdefault(item.entry, {})[item.output] = None
    return {name: tuple(outputs) for name, outputs in read.items()}


def _write(project: Project, step: Step, outputs: Sequence[str]) -> None:
    node, stage = step.node, step.node.stage
    assert step.fingerprint is not None
    with project.store.write(
        stage,
        node.partition,
        step.fingerprint,
        code_version=CODE_VERSIONS[stage],
        params=node.params,
        sources=node.sources,
        inputs=step.inputs,
    ) as entry:
        entry.digests = {output: digest_of([node.name, output]) for output in outputs}
        entry.stats = dict(STATS.get(stage, {}))
        for name in FILES.get(stage, ("output",)):
            (entry.folder / name).write_text(node.name)


def as_text(found: Mapping[str, Any]) -> str:
    """A line for each part: median and extremes over the processes."""
    lines = [f"{found['shards']:,} shards, {found['steps']:,} entries, nothing to do; CPU seconds"]
    names = {
        "open": "YAML and listing",
        "first": "first plan",
        "next": "next plan",
    }
    for name, text in names.items():
        values = sorted(found[name])
        lines.append(f"{text:20}{median(values):8.2f} ({values[0]:.2f} to {values[-1]:.2f})")
    return "\n".join([*lines, f"{'anonymous memory, MB':20}{max(found['anonymous_bytes']) / 1e6:8.0f}"])


def plan_here(config: str) -> dict[str, Any]:
    """Open the project and plan twice in this process."""
    from clipcov_pipeline.selection.measure import anonymous_bytes

    Project.open(config)  # imports
    seconds = {}
    began = time.process_time()
    project = Project.open(config)
    seconds["open"] = time.process_time() - began
    for name in ("first", "next"):
        began = time.process_time()
        plan = project.plan()
        seconds[name] = time.process_time() - began
        assert not plan.todo
    return {**seconds, "anonymous_bytes": anonymous_bytes()}


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(json.dumps(plan_here(sys.argv[1])))  # noqa: T201
