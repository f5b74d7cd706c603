"""Every number leads back to the shards' sha256, the proxy, the settings and the commit."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.report.lineage import as_text, key_of, trace
from lab import Lab, record_of

pytestmark = pytest.mark.slow


def test_the_leaderboard_leads_back_to_everything(built_lab: Lab) -> None:
    project = built_lab.project()
    lineage = trace(project, "leaderboard")
    assert len(lineage.entries) == 24
    assert lineage.missing == {}
    text = as_text(project, lineage)
    for index in range(3):
        sha256 = hashlib.sha256(built_lab.shard(index).read_bytes()).hexdigest()
        assert f"sha256 {sha256}  {built_lab.shard(index)}" in text
    proxy, labels = record_of(built_lab, "proxy_model"), record_of(built_lab, "pseudo_labels")
    assert f"weights sha256 {proxy.digests['weights']}" in text
    assert f"version {labels.stats['version']} tag pseudo_labels-{labels.fingerprint[:16]}" in text
    assert proxy.commit
    assert f"git commit {proxy.commit}: 24 entries" in text
    config = hashlib.sha256(built_lab.yaml.read_bytes()).hexdigest()
    assert f"config sha256 {config[:12]}: 24 entries" in text
    kept = project.store.config(labels)
    assert kept is not None
    assert kept.read_bytes() == built_lab.yaml.read_bytes()
    assert f"in {project.store.folder(lineage.root)}" in text
    assert text.count("train.lr=0.001") == 3 + 1  # each arm and the proxy, once


def test_machines_get_every_entry(built_lab: Lab) -> None:
    arguments = ["lineage", "scores/clipcov-f0.5-s0@vendor", "--json", "--config", str(built_lab.yaml)]
    found = json.loads(CliRunner().invoke(cli, arguments).output)
    assert found["root"].startswith("scores/clipcov-f0.5-s0@vendor@")
    names = {key.rpartition("@")[0] for key in found["entries"]}
    shards = {f"{stage}/0000{i}" for stage in ("raw_shards", "embeddings") for i in range(3)}
    assert names == shards | {
        "proxy_model",
        "pseudo_labels",
        "sample_index",
        "rankings/clipcov",
        "subsets/clipcov-f0.5",
        "checkpoints/clipcov-f0.5-s0",
        "scores/clipcov-f0.5-s0@vendor",
    }
    for entry in found["entries"].values():
        assert set(entry["reads"]) <= set(found["entries"])
        folder = Path(entry["folder"])
        assert folder.is_dir()
        assert all((folder / name).is_file() for name in entry["files"])


def test_names_of_arms_and_mlflow_runs(built_lab: Lab) -> None:
    project, record = built_lab.project(), record_of(built_lab, "checkpoints/clipcov-f0.5-s0")
    for name in ("clipcov-f0.5-s0", record.stats["mlflow_run_id"], record.fingerprint[:10]):
        assert trace(project, name).root == record
    with pytest.raises(InputError, match="'nothing': found no entry, expected one"):
        trace(project, "nothing")


def test_many_shards_are_one_line(built_lab: Lab) -> None:
    project = built_lab.project()
    lineage = trace(project, "pseudo_labels")
    entries, sources = dict(lineage.entries), dict(lineage.sources)
    shard, embedded = record_of(built_lab, "raw_shards/00000"), record_of(built_lab, "embeddings/00000")
    rows = []
    for index in range(3, 2000):
        other = {"partition": f"{index:05d}", "fingerprint": digest_of(index)}
        one, two = replace(shard, **other), replace(embedded, **other)
        entries |= {key_of(one): one, key_of(two): two}
        sources |= {key_of(one): [], key_of(two): [key_of(one)]}
        rows.append(key_of(two))
    sources[key_of(lineage.root)] = [*sources[key_of(lineage.root)], *rows]
    text = as_text(project, replace(lineage, entries=entries, sources=sources))
    assert "embeddings: 2,000 entries  combined " in text
    assert "raw_shards: 2,000 entries  combined " in text
    assert len(text.splitlines()) < 25


def test_many_early_similarities_are_one_line(built_lab: Lab) -> None:
    """They have no LanceDB table."""
    project = built_lab.project()
    lineage, shard = trace(project, "rankings/clipcov"), record_of(built_lab, "raw_shards/00000")
    early = [
        replace(shard, stage="early_similarities", partition=f"{i:05d}", fingerprint=digest_of(i), stats={})
        for i in range(5)
    ]
    entries = lineage.entries | {key_of(record): record for record in early}
    sources = lineage.sources | {key_of(record): [] for record in early}
    sources[key_of(lineage.root)] = [*sources[key_of(lineage.root)], *map(key_of, early)]
    text = as_text(project, replace(lineage, entries=entries, sources=sources))
    assert "early_similarities: 5 entries  combined " in text
