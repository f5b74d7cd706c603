"""Fixtures shared by several test files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab

# a Dagster instance that is opened sets them for its children, and they outrank what a YAML says
SETTINGS = ("CLIPCOV_CONFIG", "CLIPCOV_WORK_DIR", "DAGSTER_HOME")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Each test begins and ends without the settings that another one left in the environment."""
    clear_environment()
    yield
    clear_environment()


def clear_environment() -> None:
    for name in SETTINGS:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The small experiment, run once from nothing. Copy it before changing anything."""
    clear_environment()
    lab = Lab.create(tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("sample"))
    lab.first_run = lab.run()
    return lab


@pytest.fixture
def lab(built_lab: Lab, tmp_path: Path) -> Lab:
    """An independent copy of the experiment after its first run."""
    return built_lab.copy(tmp_path / "lab")
