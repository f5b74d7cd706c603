"""`clipcov verify --rebuild`: a real entry is built again aside, and nothing of the experiment changes."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.rebuild import differences
from lab import Lab


def verify(lab: Lab, entry: str) -> tuple[int, str]:
    argv = ["verify", "--rebuild", entry, "--config", str(lab.yaml)]
    result = CliRunner().invoke(cli, argv, catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["checkpoints/random-f0.5-s0"])
def test_an_entry_comes_out_the_same_again(lab: Lab, entry: str) -> None:
    before = {record.name: record for record in lab.project().store.records()}
    code, text = verify(lab, entry)
    assert (code, text.startswith(f"{entry}: built again, the same: ")) == (0, True), text
    assert {record.name: record for record in lab.project().store.records()} == before
    assert not list(lab.project().scratch.glob("rebuild-*"))
    assert not lab.plan().todo


@pytest.mark.slow
def test_what_comes_out_otherwise_is_named(built_lab: Lab) -> None:
    record = built_lab.plan().by_name["rankings/clipcov"].record
    assert record is not None
    other = replace(record, digests={"ranking": "0" * 64})
    (line,) = differences(other, record.digests)
    assert line.startswith(
        f"rankings/clipcov: ranking has digest {record.digests['ranking'][:12]} when built"
    )


@pytest.mark.slow
def test_what_is_no_entry_is_refused(built_lab: Lab) -> None:
    argv = ["verify", "--rebuild", "rankings/none", "--config", str(built_lab.yaml)]
    result = CliRunner().invoke(cli, argv)
    assert result.exit_code
    assert "found 'rankings/none', expected an entry" in str(result.exception or result.output)
