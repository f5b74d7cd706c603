"""The examples run as their first lines say, and what they print and write is right."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.selection.external import read_uids

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_rank_arrays() -> None:
    first, second = run("rank_arrays.py").splitlines()
    assert first.startswith("200 of 2000 pairs, ")
    chosen, by_chance = (float(part.split()[-1]) for part in second.split(", "))
    assert chosen > by_chance


def test_lance_to_datacomp(old_experiment: str, tmp_path: Path) -> None:
    out = tmp_path / "subset.npy"
    text = run("lance_to_datacomp.py", old_experiment, out)
    project = Project.open(old_experiment)
    record = project.plan().by_name["pseudo_labels"].record
    assert record is not None
    pool = pl.read_parquet(project.store.folder(record) / "labels.parquet")["uid"].to_list()
    assert text.startswith(f"3 of {len(pool)} samples")
    assert np.load(out).dtype == np.dtype("u8,u8")
    uids = [uid.decode() for uid in read_uids(out)]
    assert len(set(uids)) == 3
    assert set(uids) <= set(pool)
    assert text.split()[-1] in uids


def test_add_method(tmp_path: Path) -> None:
    lines = run("add_method.py", tmp_path / "mine.csv").splitlines()
    assert [line.split()[0] for line in lines] == ["clipcov", "external", "random"]
    assert len(read_uids(tmp_path / "mine.csv")) == 1000


def test_read_leaderboard(old_experiment: str) -> None:
    primary, *arms = run("read_leaderboard.py", old_experiment).splitlines()
    assert primary == "vendor/text_retrieval_recall@5"
    assert {tuple(arm.split()[:2]) for arm in arms} == {
        ("full", "100%"),
        ("clipcov", "50%"),
        ("c_rho", "50%"),
    }
    project = Project.open(old_experiment)
    record = project.plan().by_name["leaderboard"].record
    assert record is not None
    scores = pl.read_parquet(project.store.folder(record) / "scores.parquet").filter(metric=primary)
    means = scores.group_by("method").agg(pl.col("value").mean())
    assert {arm.split()[0]: arm.split()[2] for arm in arms} == {
        method: f"{value:.1%}" for method, value in means.iter_rows()
    }
