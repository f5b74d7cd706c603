"""Subsets whose samples are drawn unequally, or anew in every pass, through the real graph."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.subsets.files import write_datacomp_npy
from lab import Lab

pytestmark = pytest.mark.slow


def record_of(lab: Lab, name: str) -> Record:
    record = lab.plan().by_name[name].record
    assert record is not None
    return record


def files_of(lab: Lab, name: str) -> Path:
    return lab.project().store.folder(record_of(lab, name))


def test_a_list_with_repeated_uids_is_trained_on_by_its_numbers_and_written_as_such(lab: Lab) -> None:
    labels = pl.read_parquet(files_of(lab, "pseudo_labels") / "labels.parquet")
    half = round(labels.height / 2)
    uids = labels["uid"].head(half).to_list()
    write_datacomp_npy(lab.folder / "list.npy", uids, np.array([3, *[1] * (half - 1)]))

    def change(settings: dict[str, Any]) -> None:
        settings["select"]["methods"] = {"mine": {"method": "external", "uids": "list.npy"}}
        settings["train"].update(samples_seen=2 * (half + 2), num_checkpoints=1)

    lab.edit(change)
    lab.run()
    folder = files_of(lab, "subsets/mine-f0.5")
    assert np.array_equal(np.load(folder / "subset.npy"), np.load(lab.folder / "list.npy"))
    index = pl.read_parquet(folder / "subset.parquet")
    assert dict(index.select("uid", "weight").iter_rows()) == dict.fromkeys(uids, 1.0) | {uids[0]: 3.0}
    arm = record_of(lab, "checkpoints/mine-f0.5-s0")
    assert arm.stats["passes"] == pytest.approx(arm.stats["samples_seen"] / (half + 2))
    times = dict(pl.read_parquet(files_of(lab, arm.name) / "seen.parquet").iter_rows())
    assert 6 <= times[uids[0]] <= 9  # two passes, and a part of one
    assert max(count for uid, count in times.items() if uid != uids[0]) <= 3


def test_every_pass_draws_a_fraction_anew(lab: Lab) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["select"]["methods"] = {"anew": {"method": "random", "draw_from": 1.0}}
        settings["train"].update(samples_seen=400, num_checkpoints=1)

    lab.edit(change)
    lab.run()
    labels = pl.read_parquet(files_of(lab, "pseudo_labels") / "labels.parquet")
    subset = record_of(lab, "subsets/anew-f0.5")
    assert subset.stats["samples"] == labels.height
    assert sum(subset.stats["quota"]) == subset.stats["draws"] == round(labels.height / 2)
    arm = record_of(lab, "checkpoints/anew-f0.5-s0")
    seen = pl.read_parquet(files_of(lab, arm.name) / "seen.parquet")
    assert seen.height > subset.stats["draws"]  # more than one draw holds
    assert seen["times"].max() <= np.ceil(arm.stats["passes"])  # once in a pass at most
    text = CliRunner().invoke(cli, ["lineage", arm.name, "--config", str(lab.yaml)]).output
    assert f"given {arm.stats['seen_samples']:,} samples, {seen.height:,} distinct ones" in text
    verified = CliRunner().invoke(cli, ["verify", "--deep", "--config", str(lab.yaml)])
    assert verified.exit_code == 0, verified.output
