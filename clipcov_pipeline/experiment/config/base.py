"""What the sections of the YAML have in common: strict fields, checked values, knobs."""

import re
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

KNOB = "knob"  # marks a field that changes speed or place, never a result

FULL = "full"  # the arm that trains on the whole pool

HOLDOUT = "holdout"  # the evaluation set of the pool's pairs that no arm trains on

LABEL = re.compile(r"[a-z0-9][a-z0-9_]*(-[a-z0-9_]+)*\Z")

Device = Literal["auto", "cpu", "cuda"]

# strict: otherwise `true` counts as 1 and "128" as 128
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]

Count = Annotated[int, Field(ge=0, strict=True)]

PositiveInt = Annotated[int, Field(gt=0, strict=True)]

NonNegativeFloat = Annotated[float, Field(ge=0, strict=True)]

PositiveFloat = Annotated[float, Field(gt=0, strict=True)]

Share = Annotated[float, Field(ge=0, le=1, strict=True)]

Momentum = Annotated[float, Field(ge=0, lt=1, strict=True)]

Port = Annotated[int, Field(gt=0, lt=65_536, strict=True)]


def _architecture(name: str) -> str:
    if ":" in name:
        raise ValueError(
            f"found {name!r}, expected the name of an architecture: weights are named by pretrained, a tag or"
            " the path of a checkpoint"
        )
    return name


Architecture = Annotated[str, AfterValidator(_architecture)]


def check_label(label: str, reserved: str) -> None:
    """Raise ValueError where a name that the user gives is not fit for a partition's, or is ``reserved``."""
    if not LABEL.match(label) or label == reserved:
        raise ValueError(
            f"found the label {label!r}, expected lower-case words with - or _, not {reserved!r}"
        )


def check_each_once(value: tuple[Any, ...], expected: str) -> None:
    """Raise ValueError where a list is empty or something comes twice in it."""
    if not value or len(set(value)) != len(value):
        raise ValueError(f"found {list(value)}, expected {expected}, each once")


def checked_templates(value: Any, otherwise: str = "") -> tuple[str, ...]:
    """Return prompt templates as a tuple; raise ValueError where one has no place for the class name."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"found {value!r}, expected {otherwise}a list of prompt templates with {{}}")
    for template in value:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"found {template!r}, expected exactly one {{}} in each prompt template")
    return tuple(value)


def quoted(found: Any) -> str:
    """Say what YAML makes of a word such as ``no``, ``1e3`` or ``2024-01-01``."""
    kinds = {bool: "yes or no", int: "a number", float: "a number", date: "a date", datetime: "a time"}
    if type(found) not in kinds:
        return ""
    return f": YAML reads it as {kinds[type(found)]} where it is not quoted; write it in quotes, 'like this'"


class Section(BaseModel):
    """Base of every section: frozen, strict about unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # they are the descriptions of the JSON Schema
    )

    def semantic(self) -> dict[str, Any]:
        """Return the fields that can change a result, nested sections included, as JSON-able values."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if KNOB in field.metadata:
                continue
            value = getattr(self, name)
            if isinstance(value, dict):
                value = {k: v.semantic() if isinstance(v, Section) else v for k, v in value.items()}
            values[name] = value.semantic() if isinstance(value, Section) else value
        return values
