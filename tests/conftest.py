"""Fixtures shared by several test files."""

from pathlib import Path

import pytest

from lab import Lab


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The small experiment, run once from nothing. Copy it before changing anything."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CLIPCOV_CONFIG", "CLIPCOV_WORK_DIR", "DAGSTER_HOME"):
            patch.delenv(name, raising=False)
        lab = Lab.create(tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("sample"))
        lab.first_run = lab.run()
    return lab


@pytest.fixture
def lab(built_lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """An independent copy of the experiment after its first run."""
    for name in ("CLIPCOV_CONFIG", "CLIPCOV_WORK_DIR", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    return built_lab.copy(tmp_path / "lab")
