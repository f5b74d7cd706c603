"""The section `select`: methods and fractions."""

from typing import Annotated, Any

from pydantic import field_validator

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import (
    FULL,
    KNOB,
    Fraction,
    PositiveInt,
    Section,
    check_label,
    quoted,
)


class Select(Section):
    """The methods that rank the pool and the fractions that are cut from each ranking."""

    fractions: tuple[Fraction, ...] = (0.1, 0.25, 0.5)
    methods: dict[str, dict[str, Any]]
    """Label -> parameters of ``selection.rank``; ``method`` defaults to the label."""
    samples_per_shard: PositiveInt = 1000
    threads: Annotated[PositiveInt | None, KNOB] = None

    def method_of(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return the method behind a label, and the parameters that it is given."""
        params = dict(self.methods[label])
        return params.pop("method", label), params

    def labels_of(self, method: str) -> list[str]:
        """Return the labels under which a method is configured."""
        return [label for label in self.methods if self.method_of(label)[0] == method]

    @field_validator("fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("found an empty list, expected at least one fraction between 0 and 1")
        names = [f"{fraction:g}" for fraction in value]  # as in the names of subsets
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"found {', '.join(repeated)} more than once, expected each fraction once")
        return tuple(sorted(value))

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if isinstance(value, list):
            for label in value:
                if not isinstance(label, str):
                    raise ValueError(f"found {label!r} in a list, expected a method's name{quoted(label)}")
                if value.count(label) > 1:
                    raise ValueError(
                        f"found {label!r} in a list, expected each method's name once: to give parameters,"
                        " write a mapping of names to parameters"
                    )
            value = dict.fromkeys(value)
        if isinstance(value, dict):
            return {label: {} if params is None else params for label, params in value.items()}
        return value

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from clipcov_pipeline.selection import validate_method

        if not value:
            raise ValueError("found no method, expected at least one")
        for label, params in value.items():
            check_label(label, FULL)
            method = params.get("method", label)
            if not isinstance(method, str):
                raise ValueError(f".{label}.method: found {method!r}, expected a method's name")
            try:
                validate_method(method, {key: item for key, item in params.items() if key != "method"})
            except InputError as error:
                raise ValueError(f".{label}{_below(str(error), method)}") from error
            if params.get("redundancy") == "budget_share":
                raise ValueError(
                    f".{label}.redundancy: found 'budget_share', expected 'class_size': one ranking serves"
                    " all fractions here, and that one is for a single budget (clipcov select takes it)"
                )
        return value


def _below(text: str, method: str) -> str:
    """Return a message about a method's parameter with its path below the method's label."""
    return text.removeprefix(method) if text.startswith((f"{method}.", f"{method}:")) else f".{text}"
