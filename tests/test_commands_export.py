"""`clipcov export` of a built experiment's subsets."""

import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from lab import Lab


def export(lab: Lab, subset: str, form: str, out: Path):
    command = ["export", subset, "--format", form, "--out", str(out), "--config", str(lab.yaml)]
    return CliRunner().invoke(cli, command)


@pytest.mark.slow
def test_every_form_holds_the_subset_that_is_stored(lab: Lab, tmp_path: Path) -> None:
    project = lab.project()
    record = project.plan().by_name["subsets/clipcov-f0.5"].record
    assert record is not None
    stored = project.store.folder(record)
    uids = set(pl.read_parquet(stored / "subset.parquet")["uid"])
    for form in ("tars", "npy", "parquet", "csv", "hf"):
        done = export(lab, "clipcov-f0.5", form, tmp_path / form)
        assert done.exit_code == 0, done.output
        assert done.output.startswith(f"{len(uids)} samples written to {tmp_path / form}: ")
    assert (np.load(tmp_path / "npy" / "subset.npy") == np.load(stored / "subset.npy")).all()
    assert set(pl.read_parquet(tmp_path / "parquet" / "subset.parquet")["uid"]) == uids
    csv = pl.read_csv(tmp_path / "csv" / "subset.csv", schema_overrides={"key": pl.String})
    assert set(csv["uid"]) == uids
    assert csv.columns == pl.read_parquet(stored / "subset.parquet").columns
    assert set(pl.read_parquet(tmp_path / "hf" / "*.parquet")["uid"]) == uids
    found = []
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            found += [json.loads(tar.extractfile(m).read())["uid"] for m in members]  # type: ignore[union-attr]
    assert sorted(found) == sorted(uids)


@pytest.mark.slow
def test_what_is_not_there_or_not_up_to_date_is_one_line(lab: Lab, tmp_path: Path) -> None:
    unknown = export(lab, "clipcov-f0.9", "npy", tmp_path / "out")
    assert isinstance(unknown.exception, InputError)
    assert "found 'clipcov-f0.9', expected one of the experiment's: full-f1" in str(unknown.exception)
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    stale = export(lab, "clipcov-f0.5", "npy", tmp_path / "out")
    assert "subsets/clipcov-f0.5: out of date" in str(stale.exception)
    assert not (tmp_path / "out").exists()
