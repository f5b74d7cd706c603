"""Finds and reads the YAML; a user's mistake is one line that names the key."""

import difflib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import yaml

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import Section, quoted
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.yaml_loader import Loader
from clipcov_pipeline.redaction import public_yaml

PRESETS = Path(__file__).parent / "presets"

DEFAULT_PRESET = "sample"

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def preset_path(name: str) -> Path:
    """Return the path of a preset shipped in the package; raise InputError when there is none."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in PRESETS.glob("*.yaml"))
        raise InputError(f"preset {name!r} not found, expected one of {known} or the path of a YAML file")
    return path


def find_config(given: str | None = None) -> Path:
    """Return the YAML to use: ``given`` (path or preset name), else $CLIPCOV_CONFIG, else the sample."""
    given = given or os.environ.get("CLIPCOV_CONFIG") or DEFAULT_PRESET
    if given.endswith((".yaml", ".yml")):
        path = Path(given)
        if not path.is_file():
            raise InputError(f"config {given!r} not found, expected a YAML file: check the path")
        return path.resolve()
    return preset_path(given)


def load_config(given: str | None = None) -> Config:
    """Read and check the experiment's YAML.

    Args:
        given: path of a YAML file or name of a preset; None means $CLIPCOV_CONFIG or the sample.

    Raises:
        InputError: one line with the key's path, the value found and the value expected.
    """
    return read_config(given)[0]


def read_config(given: str | None = None) -> tuple[Config, str]:
    """As `load_config`; also return the YAML's text to keep: the file may be edited for the next experiment.

    References to the environment stay in it, secrets are hidden (`redaction.py`).
    """
    path = find_config(given)
    try:
        text = path.read_bytes().decode()
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise InputError(f"{path}: found {found}, expected a mapping of sections")
    try:
        config = Config.model_validate(expanded(values))
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    config._base = Path.cwd() if path.parent == PRESETS else path.parent
    config._path = path
    return config, public_yaml(text, values)


def expanded(value: Any, key: str = "") -> Any:
    """Return a YAML's values with every ``${NAME}`` replaced by what the environment variable holds.

    Raises:
        InputError: it is not set; one line with the key and the variable.
    """
    if isinstance(value, dict):
        return {name: expanded(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [expanded(item, f"{key}.{number}") for number, item in enumerate(value)]
    return _REFERENCE.sub(partial(_variable, key), value) if isinstance(value, str) else value


def _variable(key: str, reference: re.Match[str]) -> str:
    name = reference[1]
    if name not in os.environ:
        raise InputError(
            f"{key}: found ${{{name}}}, but the environment variable {name} is not set: set it and run again"
        )
    return os.environ[name]


def _one_line(error: pydantic.ValidationError) -> str:
    return " ".join("; ".join(_describe(item) for item in error.errors()).split())


def _describe(item: Any) -> str:
    parts = [str(part) for part in item["loc"] if part != "[key]"]
    path, found = ".".join(parts), item.get("input")
    match item["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{_suggestion(item['loc'])}"
        case "missing":
            return f"{path}: missing, expected a value"
        case "value_error":
            # a check of several keys names the one that is wrong, as `.KEY: ...`
            text = str(item["ctx"]["error"])
            if not path:  # a check of several sections names its key itself
                return text
            return f"{path}{text}" if text.startswith(".") else f"{path}: {text}"
        case "model_type" | "dict_type":
            return f"{path}: found {found!r}, expected a mapping (KEY: VALUE)"
        case "tuple_type":
            return f"{path}: found {found!r}, expected a list ([A, B])"
        case "string_type":
            return f"{path}: found {found!r}, expected text{quoted(found)}"
        case _:
            expected = item["msg"][0].lower() + item["msg"][1:]
            share = _percent(item)
            return f"{path}: found {found!r}, expected: {expected.removeprefix('input should be ')}{share}"


def _percent(item: Any) -> str:
    """Say how a share is written, to whom gave it in percent."""
    bound, found = (item.get("ctx") or {}).get("lt", (item.get("ctx") or {}).get("le")), item.get("input")
    if bound is None or bound > 1 or not isinstance(found, int | float) or not 1 < found <= 100:
        return ""
    return f" ({found:g} % is {found / 100:g})"


def _suggestion(loc: tuple[Any, ...]) -> str:
    """Name the known key that is nearest to a misspelt one."""
    section = Config
    for part in loc[:-1]:
        if part in section.model_fields:  # else a set's own name: its section was found at `sets`
            annotation = section.model_fields[part].annotation
            kinds = [annotation, *getattr(annotation, "__args__", ())]
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f", did you mean {near[0]!r}?" if near else (f", expected one of {known}" if known else "")
