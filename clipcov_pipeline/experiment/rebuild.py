"""Builds an entry again, aside, and compares: what comes out the same twice is what was asked for.

The same digests are promised on one machine with one number of threads, on the CPU: kernels of a GPU add in
no fixed order.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.plan import Status, Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import WHOLE, Record, node_name
from clipcov_pipeline.experiment.store import Store, require

Digests = Mapping[str, str]


def rebuild(project: Project, config: str | None, name: str) -> tuple[Record, Digests]:
    """Build an entry of the experiment in a work folder of its own, from the inputs that the store has.

    Args:
        project: the experiment; nothing of it is changed.
        config: the YAML that it was opened with.
        name: ``STAGE/PARTITION``, or a stage without partitions.

    Returns:
        The entry's record, and the output digests that it has when it is built again.

    Raises:
        InputError: no such entry, one that is out of date, or one that could not be built.
    """
    step = _current(project, name)
    record = require(step.record, name)
    aside = project.scratch / f"rebuild-{record.fingerprint[:16]}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _copy_work(project, aside)
        Store(aside / "store").discard(record)
        _run(config, node_name(record.stage, step.key), aside)
        built = Store(aside / "store").find(record.stage, record.partition, record.fingerprint)
        if built is None:
            raise InputError(f"--rebuild: {record.name} was not built again; see the lines above")
        return record, built.digests
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def differences(record: Record, again: Digests) -> list[str]:
    """Return a line for each output that came out otherwise."""
    return [
        f"{record.name}: {output} has digest {again.get(output, 'none')[:12]} when built again, expected"
        f" {digest[:12]}"
        for output, digest in record.digests.items()
        if again.get(output) != digest
    ]


def _current(project: Project, name: str) -> Step:
    steps = {step.node.name: step for step in project.plan().steps}
    if (step := steps.get(name)) is None:
        raise InputError(f"--rebuild: found {name!r}, expected an entry as `clipcov plan --all` names it")
    if step.record is None or step.status is not Status.CURRENT:
        raise InputError(f"--rebuild: {name} is out of date ({'; '.join(step.why)}); first: clipcov run")
    return step


def _copy_work(project: Project, aside: Path) -> None:
    """Link what is stored, which no stage ever writes to in place."""
    work = project.config.work
    for part in ("store", "lancedb"):
        if (work / part).exists():
            shutil.copytree(work / part, aside / part, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _run(config: str | None, name: str, aside: Path) -> None:
    given = [] if config is None else ["--config", config]
    argv = [
        sys.executable,
        "-m",
        "clipcov_pipeline.cli",
        "run",
        "--only",
        name.removesuffix(f"/{WHOLE}"),
        *given,
    ]
    subprocess.run(argv, env={**os.environ, "CLIPCOV_WORK_DIR": str(aside.resolve())}, check=False)
