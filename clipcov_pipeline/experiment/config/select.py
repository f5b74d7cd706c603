"""The section `select`: methods and fractions."""

from typing import Annotated, Any

from pydantic import field_validator, model_validator

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

DRAW_FROM = "draw_from"


class Select(Section):
    """The methods that rank the pool and the fractions that are cut from each ranking."""

    fractions: tuple[Fraction, ...] = (0.1, 0.25, 0.5)
    methods: dict[str, dict[str, Any]]
    """Label -> parameters of ``selection.rank``; ``method`` defaults to the label.

    With ``draw_from: SHARE`` its subsets hold that first share of the ranking, of which every pass of a
    training draws a fraction anew: as many samples of each class as the ranking's first fraction has.
    """
    write_tars: bool = False
    """Also copy every subset into tars of its own; a training reads the pool's."""
    samples_per_shard: PositiveInt = 1000
    """Most samples in such a tar, and in those that ``clipcov export`` writes."""
    threads: Annotated[PositiveInt | None, KNOB] = None

    def method_of(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return the method behind a label, and the parameters that it is given."""
        params = dict(self.methods[label])
        params.pop(DRAW_FROM, None)
        return params.pop("method", label), params

    def draw_from(self, label: str) -> float | None:
        """Return the share of the ranking that every pass draws from anew; None: nothing is drawn."""
        return self.methods[label].get(DRAW_FROM)

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

    @model_validator(mode="after")
    def _draws_fit(self) -> "Select":
        for label in self.methods:
            share = self.draw_from(label)
            if share is not None and share < max(self.fractions):
                raise ValueError(
                    f".methods.{label}.{DRAW_FROM}: found {share:g}, expected at least the largest fraction,"
                    f" {max(self.fractions):g}"
                )
        return self

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
            _check_draw_from(label, params.get(DRAW_FROM))
            method = params.get("method", label)
            if not isinstance(method, str):
                raise ValueError(f".{label}.method: found {method!r}, expected a method's name")
            try:
                own = {key: item for key, item in params.items() if key not in ("method", DRAW_FROM)}
                validate_method(method, own)
            except InputError as error:
                raise ValueError(f".{label}{_below(str(error), method)}") from error
            _check_fits_experiment(label, params)
        return value


def _check_fits_experiment(label: str, params: dict[str, Any]) -> None:
    """Refuse what `clipcov select` alone takes."""
    if params.get("redundancy") == "budget_share":
        raise ValueError(
            f".{label}.redundancy: found 'budget_share', expected 'class_size': one ranking serves all"
            " fractions here, and that one is for a single budget (clipcov select takes it)"
        )
    score = (params.get("filters") or {}).get("clip_score") or {}
    if score.get("arch") is not None:
        raise ValueError(
            f".{label}.filters.clip_score.arch: found {score['arch']!r}, expected none: the proxy scores"
            " pairs here; those scores are in DataComp's metadata (clipcov select takes it)"
        )


def _check_draw_from(label: str, share: object) -> None:
    if share is None or (isinstance(share, int | float) and share is not True and 0 < share <= 1):
        return
    raise ValueError(f".{label}.{DRAW_FROM}: found {share!r}, expected a share above 0 and up to 1")


def _below(text: str, method: str) -> str:
    """Return a message about a method's parameter with its path below the method's label."""
    return text.removeprefix(method) if text.startswith((f"{method}.", f"{method}:")) else f".{text}"
