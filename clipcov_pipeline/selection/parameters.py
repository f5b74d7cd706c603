"""Checks of parameters as a YAML or a command line gives them: `(name, value) -> value`, or InputError."""

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from clipcov_pipeline.errors import InputError

Check = Callable[[str, Any], Any]


def choice(alias: Any) -> Check:
    options = get_args(alias)

    def check(name: str, value: Any) -> str:
        if value not in options:
            raise InputError(f"{name}: found {value!r}, expected one of {', '.join(options)}")
        return value

    return check


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name}: found {value!r}, expected true or false")
    return value


def integer(minimum: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name}: found {value!r}, expected an integer of at least {minimum}")
        return value

    return check


def number(minimum: float = -math.inf, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not finite or value < minimum or (above and value == minimum):
            bound = "" if minimum == -math.inf else f" {'above' if above else 'of at least'} {minimum:g}"
            raise InputError(f"{name}: found {value!r}, expected a finite number{bound}")
        return float(value)

    return check


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def mapping(fields: Mapping[str, tuple[Check, Any]]) -> Check:
    def check(name: str, value: Any) -> dict[str, Any]:
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: found {value!r}, expected a mapping with any of {', '.join(fields)}")
        return fill(name, value, fields)

    return check


def length_range(name: str, value: Any) -> list[int]:
    pair = list(value) if isinstance(value, list | tuple) else []
    if (
        len(pair) != 2
        or any(isinstance(x, bool) or not isinstance(x, int) for x in pair)
        or pair[0] > pair[1]
    ):
        raise InputError(f"{name}: found {value!r}, expected [shortest, longest] in characters")
    return pair


def file_name(expected: str) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise InputError(f"{name}: found {value!r}, expected {expected}")
        return value

    return check


def texts(expected: str) -> Check:
    def check(name: str, value: Any) -> list[str]:
        found = list(value) if isinstance(value, list | tuple) else []
        if not found or not all(isinstance(text, str) for text in found):
            raise InputError(f"{name}: found {value!r}, expected {expected}")
        return found

    return check


def fill(owner: str, given: Mapping[str, Any], fields: Mapping[str, tuple[Check, Any]]) -> dict[str, Any]:
    for name in given:
        if name not in fields:
            raise InputError(f"{owner}: unknown parameter {name!r}, expected any of {', '.join(fields)}")
    return {
        name: check(f"{owner}.{name}", given.get(name, default)) for name, (check, default) in fields.items()
    }
