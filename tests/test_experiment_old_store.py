"""A work folder that earlier code built is taken on: `make_old_store.py` says how it was made."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES
from lab import Lab

COMMIT = "ecba9eb496414a5cc49761a8decc08fba3084ca4"


def test_the_archive_is_of_that_commit_and_has_an_entry_of_every_stage_of_then(old_experiment: str) -> None:
    records = list(Project.open(old_experiment).store.records())
    assert {record.commit for record in records} == {COMMIT}
    assert {record.stage for record in records} == set(STAGES) - {"sample_index"}


def test_nothing_is_wrong(old_experiment: str) -> None:
    result = CliRunner().invoke(cli, ["verify", "--deep", "--config", old_experiment], catch_exceptions=False)
    assert result.output.startswith("0 problems; checked 34 entries, ")
    assert result.exit_code == 0


@pytest.mark.slow
def test_shards_are_read_again_and_what_comes_out_the_same_is_kept(
    old_experiment: str, tmp_path: Path
) -> None:
    lab = Lab(Path(old_experiment).parent).copy(tmp_path / "old")
    store, kept = lab.project().store, {}
    for stage in ("proxy_model", "pseudo_labels"):
        kept[stage] = store.current(stage, "_")
        assert kept[stage] is not None
    assert lab.plan().by_name["raw_shards/00000"].status is Status.BUILD
    assert lab.run(only=("raw_shards", "sample_index", "embeddings", "early_similarities")) == {
        "raw_shards": 2, "sample_index": 1, "embeddings": 2, "early_similarities": 2,
    }  # fmt: skip
    after = lab.plan().by_name
    for stage, record in kept.items():  # its images have the same pixels: cut off
        assert (after[stage].status, after[stage].record) == (Status.CURRENT, record)
    assert after["subsets/full-f1"].why[0] == "code version of subsets 1 -> 2"
