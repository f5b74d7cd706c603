"""The report: one file, all its sections, what it says is what the store has, hostile text is text."""

import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from clipcov_pipeline.experiment.checks import CheckOutcome
from clipcov_pipeline.experiment.stages import STAGES
from clipcov_pipeline.report.drawing import write_page
from clipcov_pipeline.report.gallery import Gallery, Group, Row, Section, Tile, read_gallery, write_gallery
from clipcov_pipeline.report.page import (
    checks_table,
    costs,
    diagnostics_table,
    entries_table,
    html_report,
    shown_config,
    stages_table,
)
from lab import Lab

HOSTILE = '<script>document.title="owned"</script>'


class Outline(HTMLParser):
    """Tags, and addresses that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]


def outcome(severity: str, passed: bool, name: str) -> CheckOutcome:
    return CheckOutcome(
        "subsets", "random-f0.5", name, severity, passed, 0.5, 0.1, "at most", f"{name}: 0.5, expected 0.1"
    )  # type: ignore[arg-type]


def test_failed_checks_come_with_the_blocking_ones_first():
    outcomes = [outcome("warn", False, "a"), outcome("error", True, "b"), outcome("error", False, "c")]
    table = checks_table(outcomes)
    assert [row[:3] for row in table.rows] == [
        ["error", "subsets/random-f0.5", "c"],
        ["warn", "subsets/random-f0.5", "a"],
    ]


@pytest.mark.slow
def test_the_report_of_the_lab(built_lab: Lab) -> None:
    project = built_lab.project()
    record = project.plan().by_name["report"].record
    assert record is not None
    path = project.store.folder(record) / "report.html"
    html = path.read_text()
    assert path.stat().st_size < 8 << 20
    assert record.seconds < 60
    outline = Outline(html)
    assert "script" not in outline.tags
    assert all(address.startswith(("#", "data:image/webp;base64,")) for address in outline.fetched)
    assert not re.search(r"url\((?!data:)", html)
    for title in ("Leaderboard", "Failed checks", "Learning curves", "Diagnostics", "Lineage"):
        assert f">{title}</h2>" in html
    for arm in ("full-f1-s0", "clipcov-f0.5-s0", "random-f0.5-s0"):
        assert f"<summary>{arm}</summary>" in html
    # every score that stands in the leaderboard stands in the report
    folder = project.store.folder(project.plan().by_name["leaderboard"].record)
    board = pl.read_parquet(folder / "leaderboard.parquet")
    for value in board.filter(pl.col("metric") == "vendor/text_retrieval_recall@5")["mean"]:
        assert f"<td>{100 * value:.1f}</td>" in html
    for step in project.plan().steps:
        if step.node.stage not in ("raw_shards", "embeddings", "report"):
            assert step.fingerprint is not None
            assert step.fingerprint[:12] in html
    assert "work_dir: work" in html


@pytest.mark.slow
def test_the_report_is_in_mlflow_and_on_dagsters_page(built_lab: Lab) -> None:
    import dagster as dg

    from assets.mlflow_runs.tracking import Tracking

    project = built_lab.project()
    tracking = Tracking(project.config)
    names = {artifact.path for artifact in tracking.client().list_artifacts(tracking.parent())}
    assert "report.html" in names
    with built_lab.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("report"))
    assert event is not None
    assert event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    assert Path(str(shown["report"].value)).is_file()
    assert tracking.parent() in str(shown["mlflow_run"].value)


@pytest.mark.slow
def test_what_is_not_there_is_said_to_be_not_made(lab: Lab) -> None:
    project = lab.project()
    for stage in ("leaderboard", "subset_galleries", "checkpoint_galleries", "checkpoints"):
        shutil.rmtree(project.store.root / stage)
    plan = lab.plan()
    html = html_report(project, plan)
    assert html.count("not made") >= 4
    assert costs(project.config, plan).rows == []
    assert [row[1] for row in stages_table(plan).rows if row[0] == "checkpoints"] == ["0 of 3"]


@pytest.mark.slow
def test_costs_are_those_of_the_records(built_lab: Lab) -> None:
    project = built_lab.project()
    plan = project.plan()
    rows = {row[0]: row[1:] for row in costs(project.config, plan).rows}
    assert set(rows) == {"clipcov-f0.5-s0", "random-f0.5-s0"}
    own, full = (
        plan.by_name[f"checkpoints/{arm}"].record.stats["training_seconds"]
        for arm in ("clipcov-f0.5-s0", "full-f1-s0")
    )
    ranking = plan.by_name["rankings/clipcov"].record.seconds
    expected = [ranking, own, full, full - own, own / 0.5 - own]
    assert rows["clipcov-f0.5-s0"] == [f"{value:,.1f}" for value in expected]
    assert {row[0].partition("/")[0] for row in entries_table(plan).rows} <= set(STAGES)


@pytest.mark.slow
def test_hostile_captions_are_text_in_the_report_and_in_a_browser(lab: Lab, tmp_path: Path) -> None:
    project = lab.project()
    record = lab.plan().by_name["subset_galleries/random-f0.5"].record
    assert record is not None
    path = project.store.folder(record) / "gallery.json"
    gallery = read_gallery(path)
    tile = Tile("0" * 32, HOSTILE, HOSTILE, HOSTILE)
    hostile = Gallery(HOSTILE, (Section("t", "", (Row(HOSTILE, (Group("", (tile,)),)),)), *gallery.sections))
    write_gallery(hostile, path)
    digests = {**record.files, "gallery.json": _sha256(path)}
    object.__setattr__(record, "files", digests)
    plan = lab.plan()
    html = html_report(project, _with_record(plan, "subset_galleries/random-f0.5", record))
    assert "<script" not in html
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;") in html
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    write_page(hostile, page)
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"]
        done = subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert "<title>owned" not in done.stdout
    assert "<script" not in done.stdout


def _sha256(path: Path) -> str:
    from clipcov_pipeline.experiment.digests import digest_of_file

    return digest_of_file(path)


def _with_record(plan, name, record):
    from dataclasses import replace

    from clipcov_pipeline.experiment.plan import Plan

    steps = tuple(replace(s, record=record) if s.node.name == name else s for s in plan.steps)
    return Plan(steps)


@pytest.mark.slow
def test_credentials_are_not_in_the_report(lab: Lab) -> None:
    lab.edit(lambda s: s["shards"].update(storage_options={"key": "AKIA-SECRET"}))
    text = shown_config(lab.project().config)
    assert "AKIA-SECRET" not in text
    assert "key: (hidden)" in text


@pytest.mark.slow
def test_diagnostics_are_shown_where_they_are_made(lab: Lab) -> None:
    project, plan = lab.project(), lab.plan()
    table = diagnostics_table(project, plan)
    if "subset_diagnostics" in STAGES:
        assert tuple(table.headings[1:]) == ("clipcov-f0.5", "random-f0.5")
        assert table.rows
    else:
        assert table.note == "not made"
    json.dumps([list(row) for row in table.rows])
