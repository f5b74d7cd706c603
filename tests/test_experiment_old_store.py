"""A work folder that earlier code built is found complete: `make_old_store.py` says how it was made."""

from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES

COMMIT = "ecba9eb496414a5cc49761a8decc08fba3084ca4"


def test_the_archive_is_of_that_commit_and_has_an_entry_of_every_stage(old_experiment: str) -> None:
    records = list(Project.open(old_experiment).store.records())
    assert {record.commit for record in records} == {COMMIT}
    assert {record.stage for record in records} == set(STAGES)


def test_nothing_is_to_do(old_experiment: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "--config", old_experiment], catch_exceptions=False)
    assert result.output == "Nothing to do: all 34 entries are up to date.\n"


def test_nothing_is_wrong(old_experiment: str) -> None:
    result = CliRunner().invoke(cli, ["verify", "--deep", "--config", old_experiment], catch_exceptions=False)
    assert result.output.startswith("0 problems; checked 34 entries, ")
    assert result.exit_code == 0
