"""A work folder that earlier code built is found complete: `make_old_store.py` says how it was made."""

import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES

ARCHIVE = Path(__file__).with_name("store_of_0_1.tar.xz")
COMMIT = "ecba9eb496414a5cc49761a8decc08fba3084ca4"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The YAML of the unpacked experiment; times of change are as they were, the place is another."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return str(folder / "experiment.yaml")


def test_the_archive_is_of_that_commit_and_has_an_entry_of_every_stage(config: str) -> None:
    records = list(Project.open(config).store.records())
    assert {record.commit for record in records} == {COMMIT}
    assert {record.stage for record in records} == set(STAGES)


def test_nothing_is_to_do(config: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "--config", config], catch_exceptions=False)
    assert result.output == "Nothing to do: all 34 entries are up to date.\n"


def test_nothing_is_wrong(config: str) -> None:
    result = CliRunner().invoke(cli, ["verify", "--deep", "--config", config], catch_exceptions=False)
    assert result.output.startswith("0 problems; checked 34 entries, ")
    assert result.exit_code == 0
