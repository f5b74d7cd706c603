"""The documents: the picture is that of today's code, and what they name is there."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from clipcov_pipeline.experiment.stages import STAGES

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/selection.md", "docs/evidence.md")
PACKAGES = ("clipcov_pipeline", "assets")
PLACES = (ROOT, ROOT / "clipcov_pipeline", ROOT / "tests")


@pytest.fixture(scope="module")
def drawing() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))


def rooms() -> set[str]:
    """The folders with code that stand at the top of the library."""
    return {path.parent.name for path in (ROOT / "clipcov_pipeline").glob("*/__init__.py")}


def test_the_picture_is_up_to_date(drawing: dict) -> None:
    assert drawing["PICTURE"].read_text() == drawing["draw"](), "run: python docs/draw_architecture.py"


def test_the_picture_names_every_stage_and_every_room(drawing: dict) -> None:
    named = re.findall(r">([a-z_]+)</text>", drawing["PICTURE"].read_text())
    assert {*STAGES, *rooms(), "assets"} <= set(named)


def test_the_floors_are_those_that_the_linter_checks(drawing: dict) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == ["clipcov_pipeline"])
    rooms = [name for layer in layers for name in re.findall(r"\w+", layer) if name not in drawing["BESIDE"]]
    assert ["assets", *rooms] == list(drawing["FLOORS"])


def test_a_stage_that_no_longer_reaches_its_room_is_found(drawing: dict) -> None:
    drawing["ROOM_OF"]["raw_shards"] = "selection"  # the table of the functions that were just run
    try:
        with pytest.raises(ValueError, match=r"raw_shards.py: found no import of selection"):
            drawing["check_rooms"]()
    finally:
        drawing["ROOM_OF"]["raw_shards"] = "pool"
    drawing["check_rooms"]()


def test_the_tree_has_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = set(re.findall(r"^[│├└─ ]*([a-z_]+)/ ", text, re.MULTILINE))
    inside = {path.name for top in PACKAGES for path in (ROOT / top).rglob("*") if path.is_dir()}
    expected = {*PACKAGES, *inside, "docs", "examples", "tests"} - {"__pycache__"}
    assert tree == expected


def test_the_architecture_names_every_stage_and_every_room() -> None:
    words = set(re.findall(r"[a-z_]+", (ROOT / "docs" / "architecture.md").read_text()))
    assert {*STAGES, *rooms()} <= words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS[1:4])
def test_files_that_are_named_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?!work/)[a-z_/]+(?:\.py|/))`", text)
    assert named or document == "docs/selection.md"
    assert [name for name in named if not any((place / name).exists() for place in PLACES)] == []


@pytest.mark.parametrize("document", ["README.md", "docs/selection.md"])
def test_modules_that_are_named_are_there(document: str) -> None:
    for name in re.findall(r"clipcov_pipeline(?:\.[a-z_]+)+", (ROOT / document).read_text()):
        parts = name.split(".")
        module = ROOT.joinpath(*parts)
        file, attribute_of = module.with_suffix(".py"), module.parent.with_suffix(".py")
        assert module.is_dir() or file.is_file() or f"def {parts[-1]}" in attribute_of.read_text(), name
