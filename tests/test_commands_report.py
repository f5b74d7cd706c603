"""``clipcov report``: what it prints is what the store has."""

import json
import os
import pty
import shutil
import subprocess
import sys
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from lab import SELECTION, Lab

pytestmark = pytest.mark.slow


def run(lab: Lab, *arguments: str) -> str:
    done = CliRunner().invoke(cli, ["report", "--config", str(lab.yaml), *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_text_and_json_say_the_same_as_the_leaderboard(built_lab: Lab) -> None:
    project = built_lab.project()
    plan = project.plan()
    folder = project.store.folder(plan.by_name["leaderboard"].record)
    text, found = run(built_lab), json.loads(run(built_lab, "--json"))
    assert (folder / "leaderboard.txt").read_text() in text
    board = pl.read_parquet(folder / "leaderboard.parquet").to_dicts()
    assert [row["mean"] for row in found["leaderboard"]] == [row["mean"] for row in board]
    assert found["missing"] == []
    assert found["report"] == str(project.store.folder(plan.by_name["report"].record) / "report.html")
    assert found["report"] in text
    alignment = {row["subset"]: row for row in found["diagnostics"] if row["quantity"] == "alignment"}
    lines = {line.split()[0]: line.split() for line in text.partition("Diagnostics")[2].splitlines() if line}
    assert set(alignment) == {"clipcov-f0.5", "random-f0.5"}
    for subset, row in alignment.items():
        assert lines[subset][1] == f"{row['value']:.3g}"
    assert "\x1b" not in text


ONE_CLASS = {"latent_classes": "prompts", "class_names": "./names.txt", "templates": ["a drawing of {}"]}


# 200 pairs: one class is not rare, and of 60 some have under 10 members, whatever the proxy makes of them
@pytest.mark.parametrize(("labels", "defined"), [(ONE_CLASS, False), ({"n_clusters": 60}, True)])
def test_a_quantity_without_a_value_is_explained_below_the_table(
    lab: Lab, labels: dict[str, Any], defined: bool
) -> None:
    (lab.folder / "names.txt").write_text("star\n")
    lab.edit(lambda s: s["labels"].update(labels))
    lab.run((*SELECTION, "pool_map", "subset_diagnostics"))
    rows = json.loads(run(lab, "--json"))["diagnostics"]
    coverage = [row["value"] for row in rows if row["quantity"] == "rare_class_coverage"]
    assert [value is not None for value in coverage] == [defined, defined]
    explained = "rare class coverage (all subsets): not defined, because no class of the pool has under 10"
    assert (explained in run(lab)) is not defined


def test_a_failed_check_is_named_with_its_figure_and_bound(lab: Lab) -> None:
    lab.edit(lambda s: s.update(diagnostics={"checks": {"mean_margin": {"bound": 5.0, "severity": "error"}}}))
    [failed] = [
        one for one in json.loads(run(lab, "--json"))["checks"]["failed"] if one["name"] == "mean_margin"
    ]
    assert (failed["asset"], failed["severity"], failed["threshold"]) == ("pseudo_labels", "error", 5.0)
    line = next(line for line in run(lab).splitlines() if "mean_margin" in line)
    assert line.startswith("error")
    assert "expected at least 5" in line


def test_nothing_built_is_said(lab: Lab) -> None:
    shutil.rmtree(lab.project().store.root)
    text = run(lab)
    assert text.count("not made") == 4
    found = json.loads(run(lab, "--json"))
    assert (found["leaderboard"], found["checks"]["made"], found["report"]) == ([], 0, None)


def on_a_terminal(lab: Lab, **environment: str) -> bytes:
    """What the command sends to a real terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "clipcov_pipeline.cli", "report", "--config", str(lab.yaml)]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    output = b""
    try:
        while data := os.read(ours, 65_536):
            output += data
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert child.wait(60) == 0, output
    return output


def test_colours_are_for_terminals_that_want_them(built_lab: Lab) -> None:
    assert b"\x1b[1m" in on_a_terminal(built_lab)
    assert b"\x1b" not in on_a_terminal(built_lab, NO_COLOR="1")
