"""Dagster's settings below the work folder: whole, and compared at each start."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from assets.running.instance import SETTINGS, set_dagster_home
from clipcov_pipeline.experiment.config.load import load_config

FULL_DISK = """
import resource
from assets.running.instance import set_dagster_home
from clipcov_pipeline.experiment.config.load import load_config
config = load_config("sample")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
set_dagster_home(config)
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPCOV_WORK_DIR", str(tmp_path))
    for name in ("DAGSTER_HOME", "CLIPCOV_CONFIG"):
        monkeypatch.setenv(name, "")  # given back after the test
    return tmp_path / "dagster_home" / "dagster.yaml"


def test_a_full_disk_leaves_no_settings_and_the_next_start_writes_them(settings: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, check=False)
    assert "File too large" in run.stderr
    assert not list(settings.parent.iterdir())
    set_dagster_home(load_config("sample"))
    assert yaml.safe_load(settings.read_text()) == SETTINGS
    assert os.environ["DAGSTER_HOME"] == str(settings.parent)


@pytest.mark.parametrize("left", ["", "telemetry:\n  enabled: [", "- no settings\n"])
def test_settings_that_are_none_are_written_again(
    settings: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings.parent.mkdir()
    settings.write_text(left)
    set_dagster_home(load_config("sample"))
    assert yaml.safe_load(settings.read_text()) == SETTINGS
    assert "written again" in caplog.text


def test_settings_that_differ_are_kept_and_named(settings: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings.parent.mkdir()
    text = yaml.safe_dump({**SETTINGS, "nux": {"enabled": True}})
    settings.write_text(text)
    with caplog.at_level(logging.WARNING):
        set_dagster_home(load_config("sample"))
    assert settings.read_text() == text
    assert "nux are not as this version writes them" in caplog.text
