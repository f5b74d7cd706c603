"""A work folder that earlier code built is taken on: `make_old_store.py` says how it was made."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES
from lab import Lab

COMMIT = "626505bccd422a570518ab994f50c8c3dc2fc0b5"


def test_the_archive_is_of_that_commit_and_has_an_entry_of_every_stage(old_experiment: str) -> None:
    records = list(Project.open(old_experiment).store.records())
    assert {record.commit for record in records} == {COMMIT}
    assert {record.stage for record in records} == set(STAGES)


def test_nothing_is_to_do(old_experiment: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "--config", old_experiment], catch_exceptions=False)
    assert result.output == "Nothing to do: all 35 entries are up to date.\n"


@pytest.mark.parametrize(("which", "entries"), [("oldest_experiment", 34), ("old_experiment", 35)])
def test_nothing_is_wrong(which: str, entries: int, request: pytest.FixtureRequest) -> None:
    argv = ["verify", "--deep", "--config", request.getfixturevalue(which)]
    result = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert result.output.startswith(f"0 problems; checked {entries} entries, ")
    assert result.exit_code == 0


@pytest.mark.slow
def test_of_the_first_store_shards_are_read_and_embedded_again_and_the_proxy_is_kept(
    oldest_experiment: str, tmp_path: Path
) -> None:
    lab = Lab(Path(oldest_experiment).parent).copy(tmp_path / "old")
    store = lab.project().store
    proxy, rows = store.current("proxy_model", "_"), store.current("embeddings", "00000")
    assert lab.run(only=("raw_shards", "sample_index", "proxy_model", "embeddings")) == {
        "raw_shards": 2, "sample_index": 1, "embeddings": 2,
    }  # fmt: skip
    assert lab.plan().by_name["proxy_model"].record == proxy  # cut off: it is not trained again
    again = store.current("embeddings", "00000")
    assert rows is not None
    assert again is not None
    assert again.digests == rows.digests
