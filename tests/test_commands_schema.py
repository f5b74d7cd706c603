"""`clipcov schema`: what it takes and what it refuses, by another library's reading."""

import json
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.experiment.config.load import PRESETS
from clipcov_pipeline.experiment.config.schema import FILE
from lab import SETTINGS

MODELINE = f"# yaml-language-server: $schema={FILE}"


def schema() -> dict[str, Any]:
    return json.loads(CliRunner().invoke(cli, ["schema"], catch_exceptions=False).output)


def changed(path: str, value: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(SETTINGS))
    *sections, key = path.split(".")
    section = settings
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return settings


def test_the_file_beside_the_presets_is_up_to_date() -> None:
    assert (PRESETS / FILE).read_text() == CliRunner().invoke(cli, ["schema"]).output, (
        f"run: clipcov schema > {PRESETS / FILE}"
    )


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_keeps_to_it_and_names_it_first(preset: Any) -> None:
    text = preset.read_text()
    assert text.splitlines()[0] == MODELINE
    jsonschema.Draft202012Validator(schema()).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("select.methods", ["clipcov", "random"]),
        ("select.methods", {"clipcov": None, "anew": {"method": "random", "draw_from": 0.5}}),
        ("diagnostics.checks.loss", {"bound": 2.0}),
        ("train.aug_cfg", {"scale": [0.5, 1.0]}),
    ],
)
def test_what_is_right_is_taken(path: str, value: Any) -> None:
    jsonschema.Draft202012Validator(schema()).validate(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.epohcs", 3),
        ("train.lr", -1.0),
        ("select.fractions", [25, 50]),
        ("shards.high_bit_depth", "no"),
        ("train.precision", "fp33"),
    ],
)
def test_what_is_wrong_is_refused(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(changed(path, value))
