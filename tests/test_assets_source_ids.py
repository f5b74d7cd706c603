"""Samples whose json has an id that is no UUID keep it all the way: manifest, labels, subset, export."""

import io
import json
import tarfile
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import iter_groups
from lab import SELECTION, Lab

pytestmark = pytest.mark.slow


def number_samples(lab: Lab, index: int) -> None:
    """Give the samples of a shard numbers for uids."""
    groups = list(iter_groups(Shard("x", str(lab.shard(index)), ""), None))
    with tarfile.open(lab.shard(index), "w") as tar:
        for number, group in enumerate(groups):
            meta = json.dumps({**(group.meta() or {}), "uid": 1000 * index + number}).encode()
            for suffix, data in [*((s, d) for s, d in group.members if s != "json"), ("json", meta)]:
                info = tarfile.TarInfo(f"{group.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_ids_of_the_source_go_all_the_way(lab: Lab) -> None:
    number_samples(lab, 1)
    (lab.folder / "list.csv").write_text("\n".join(["uid", *map(str, range(1000, 1080))]) + "\n")

    def change(settings: dict[str, Any]) -> None:
        settings["select"]["methods"]["mine"] = {"method": "external", "uids": "list.csv"}
        settings["select"]["fractions"] = [0.25, 0.5]

    lab.edit(change)
    with pytest.raises(AssertionError, match="rankings"):  # 80 of 240 are no half of them
        lab.run(only=SELECTION)
    lab.edit(lambda settings: settings["select"].update(fractions=[0.25]))
    lab.run(only=SELECTION)
    project = lab.project()
    steps = project.plan().by_name

    def read(name: str, file: str) -> pl.DataFrame:
        return pl.read_parquet(project.store.folder(steps[name].record) / file)

    manifest = read("raw_shards/00001", "manifest.parquet")
    assert manifest["source_id"].to_list() == [str(1000 + row) for row in range(80)]
    assert steps["raw_shards/00001"].record.stats["source_ids"] == 80
    own = dict(manifest.select("uid", "source_id").iter_rows())
    labels = read("pseudo_labels", "labels.parquet")
    assert [own.get(uid) for uid in labels["uid"]] == labels["source_id"].to_list()
    assert read("rankings/mine", "ranking.parquet")["uid"].to_list() == [
        uid for uid in manifest["uid"] if uid in set(labels["uid"])
    ]
    subset = read("subsets/clipcov-f0.25", "subset.parquet")
    assert [own.get(uid) for uid in subset["uid"]] == subset["source_id"].to_list()

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, [*arguments, "--config", str(lab.yaml)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    name, uid = next((source, uid) for uid, source in own.items() if uid in set(labels["uid"]))
    assert f"{uid} (source id {name}) is " in run("explain", name, "--subset", "clipcov-f0.25")
    assert f"({name})" in run("diff", "mine-f0.25", "clipcov-f0.25")
    run("export", "mine-f0.25", "--out", str(lab.folder / "out"))
    (tar,) = (lab.folder / "out").glob("*.tar")
    for group in iter_groups(Shard("x", str(tar), ""), None):
        meta = group.meta()
        assert meta is not None
        assert own[meta["uid"]] == meta["source_id"]
