"""The selection methods and their parameters: names, defaults and checks, in plain Python.

A configuration is checked against this table when it is loaded, so nothing here imports numpy or numba.

What the parameters mean, by method. For all: ``seed`` (int, 0),
``filters`` (``min_similarity``, ``drop_duplicate_images``, ``drop_duplicate_captions``,
``caption_length``; ``rejected``: "drop" what does not pass, or rank it "last"). clipcov:

- ``mode``: "greedy" (exact and lazy, for any signs: a bound on how much a gain can have risen
  comes from the geometry of the class), "strict" (the same choice from no more than that
  embeddings are of unit norm; slower, for checking), "notebook" (the authors' batch rule; its
  gains are scores, not differences of F).
- ``clip_negative``: count similarities below 0 as 0, as the authors do (the default of the
  notebook mode, which is the published notebook only so; false in the other modes).
- ``weights``: {class, self, label, inter, redundancy}; a term left out keeps the authors'
  weight, 0 switches it off.
- ``redundancy``: "class_size" (as in the paper) or "budget_share", what r_k is in F.
- ``class_balance``: shares of the budget by Webster's rule, "proportional" to class size (the
  default), to its square root ("sqrt") or equal ("uniform"); by "quota", where every class has its
  proportion rounded up or down, never more or less; or "global", no shares: one merge by gain, as F
  says (the default of the notebook mode); ``class_floor``, the least a class gets by shares.
- ``repeat_penalty``: what each better pair with the same caption, and each with the same image
  bytes, takes from a base score, in standard deviations of the base scores inside a class.
- ``batch_size``: of the notebook mode, 200.

clip_score_per_class: ``class_balance``, ``class_floor``. semdedup: ``n_clusters``, ``keep``.
dedup: ``by``. s_cliploss: ``temperature``, ``batch_size``, ``n_batches``.
external: ``uids`` (the path of a file, see ``external.FORMATS``), ``shuffle``, ``fill`` ("random": the
others follow in random order; without it a budget beyond the list is refused).
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from clipcov_pipeline.errors import InputError

Mode = Literal["greedy", "strict", "notebook"]
Redundancy = Literal["class_size", "budget_share"]
ClassBalance = Literal["global", "proportional", "quota", "sqrt", "uniform"]
# shares of a budget go with class size to this power; "global" has no shares: as F says, and as the notebook
# does, but with shares the subsets train better and vary less (docs/evidence.md)
BALANCE_POWER = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
Shares = Literal["proportional", "quota", "sqrt", "uniform"]
Keep = Literal["hard", "easy", "random"]
Rejected = Literal["drop", "last"]
Fill = Literal["random"]
DuplicateKey = Literal["image_or_caption", "image", "caption", "pair"]

# the coefficients in the authors' notebook: m + 2 e + l / 2 - c, and the redundancy as it is
DEFAULT_WEIGHTS = {"class": 1.0, "self": 2.0, "label": 0.5, "inter": 1.0, "redundancy": 1.0}

Check = Callable[[str, Any], Any]


def _choice(alias: Any) -> Check:
    options = get_args(alias)

    def check(name: str, value: Any) -> str:
        if value not in options:
            raise InputError(f"{name}: found {value!r}, expected one of {', '.join(options)}")
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name}: found {value!r}, expected true or false")
    return value


def _integer(minimum: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name}: found {value!r}, expected an integer of at least {minimum}")
        return value

    return check


def _number(minimum: float = -math.inf, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < minimum or (above and value == minimum):
            bound = "" if minimum == -math.inf else f" {'above' if above else 'of at least'} {minimum:g}"
            raise InputError(f"{name}: found {value!r}, expected a finite number{bound}")
        return float(value)

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _mapping(fields: Mapping[str, tuple[Check, Any]]) -> Check:
    def check(name: str, value: Any) -> dict[str, Any]:
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: found {value!r}, expected a mapping with any of {', '.join(fields)}")
        return _fill(name, value, fields)

    return check


def _length_range(name: str, value: Any) -> list[int]:
    pair = list(value) if isinstance(value, list | tuple) else []
    if (
        len(pair) != 2
        or any(isinstance(x, bool) or not isinstance(x, int) for x in pair)
        or pair[0] > pair[1]
    ):
        raise InputError(f"{name}: found {value!r}, expected [shortest, longest] in characters")
    return pair


def _file_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{name}: found {value!r}, expected a file of uids (.parquet, .csv or .npy)")
    return value


def _fill(owner: str, given: Mapping[str, Any], fields: Mapping[str, tuple[Check, Any]]) -> dict[str, Any]:
    for name in given:
        if name not in fields:
            raise InputError(f"{owner}: unknown parameter {name!r}, expected any of {', '.join(fields)}")
    return {
        name: check(f"{owner}.{name}", given.get(name, default)) for name, (check, default) in fields.items()
    }


WEIGHTS = _mapping({term: (_number(0.0), default) for term, default in DEFAULT_WEIGHTS.items()})
FILTERS = _mapping(
    {
        "min_similarity": (_optional(_number()), None),
        "drop_duplicate_images": (_boolean, False),
        "drop_duplicate_captions": (_boolean, False),
        "caption_length": (_optional(_length_range), None),
        "rejected": (_choice(Rejected), "drop"),
    }
)

_COMMON: dict[str, tuple[Check, Any]] = {"seed": (_integer(0), 0), "filters": (FILTERS, None)}
_BY_CLASS: dict[str, tuple[Check, Any]] = {"class_floor": (_integer(0), 0)}
_CLUSTERS: dict[str, tuple[Check, Any]] = {
    "n_clusters": (_optional(_integer(1)), None),
    "keep": (_choice(Keep), "hard"),
}

_METHODS: dict[str, dict[str, tuple[Check, Any]]] = {
    "clipcov": {
        "mode": (_choice(Mode), "greedy"),
        "clip_negative": (_optional(_boolean), None),
        "weights": (WEIGHTS, None),
        "redundancy": (_choice(Redundancy), "class_size"),
        "class_balance": (_optional(_choice(ClassBalance)), None),
        **_BY_CLASS,
        "repeat_penalty": (_number(0.0), 0.0),
        "batch_size": (_integer(2), 200),
    },
    "random": {},
    "clip_score": {},
    "clip_score_per_class": {"class_balance": (_choice(Shares), "proportional"), **_BY_CLASS},
    "semdedup": _CLUSTERS,
    "dedup": {"by": (_choice(DuplicateKey), "image_or_caption")},
    "c_rho": {},
    "s_cliploss": {
        "temperature": (_number(0.0, above=True), 0.01),
        "batch_size": (_integer(2), 4096),
        "n_batches": (_integer(1), 5),
    },
    "external": {
        "uids": (_file_name, None),
        "shuffle": (_boolean, False),
        "fill": (_optional(_choice(Fill)), None),
    },
}

METHODS: tuple[str, ...] = tuple(_METHODS)

# what a method reads from the pool besides embeddings, latent classes and label similarities
NEEDS: dict[str, tuple[str, ...]] = {
    "dedup": ("image_hash", "caption_hash"),
    "c_rho": ("early_similarity",),
}


def validate_method(name: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check a method and its parameters, as a YAML entry gives them.

    Args:
        name: one of ``METHODS``.
        params: JSON-able keyword arguments of ``rank``; those left out take their default.

    Returns:
        Every parameter of the method with its value, defaults included (fit for a fingerprint).

    Raises:
        InputError: unknown method, unknown parameter, or a value of the wrong type or range.
    """
    if name not in _METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(METHODS)}")
    filled = _fill(name, params or {}, {**_METHODS[name], **_COMMON})
    if name == "clipcov":  # what the published notebook does is its mode's default
        notebook = filled["mode"] == "notebook"
        if filled["class_balance"] is None:
            filled["class_balance"] = "global" if notebook else "proportional"
        if filled["clip_negative"] is None:
            filled["clip_negative"] = notebook
    return filled


def columns_read(method: str, params: Mapping[str, Any] | None = None) -> set[str]:
    """Return the optional columns of the pool that a method and its filters read with these parameters.

    Raises:
        InputError: as ``validate_method``.
    """
    filled = validate_method(method, params)
    found = set(NEEDS.get(method, ()))
    if method == "dedup" and filled["by"] in ("image", "caption"):
        found = {f"{filled['by']}_hash"}
    if method == "clipcov" and filled["repeat_penalty"]:
        found = {"image_hash", "caption_hash"}
    filters = filled["filters"]
    return found | {
        column
        for name, column in (
            ("drop_duplicate_images", "image_hash"),
            ("drop_duplicate_captions", "caption_hash"),
            ("caption_length", "caption_length"),
        )
        if filters[name]
    }


def reads_captions(method: str, params: Mapping[str, Any] | None = None) -> bool:
    """Return whether a method or its filters look at captions.

    Raises:
        InputError: as ``validate_method``.
    """
    return bool(columns_read(method, params) & {"caption_hash", "caption_length"})


def budget_count(budget: float | int | None, n: int) -> int:
    """The number of samples a budget stands for.

    Args:
        budget: an int is a count in [1, n]; a float is a fraction in (0, 1], rounded half up to a count
            of at least 1 (``floor(budget * n + 0.5)``); None is the whole pool.
        n: pool size.

    Raises:
        InputError: a count outside [1, n], or a fraction outside (0, 1].
    """
    if budget is None:
        return n
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise InputError(f"budget: found {budget!r}, expected an int count or a float fraction")
    if not isinstance(budget, numbers.Integral):
        if not 0.0 < budget <= 1.0:
            share = f" ({budget:g} % is {float(budget) / 100:g})" if 1 < budget <= 100 else ""
            raise InputError(f"fraction: found {budget!r}, expected a number above 0 and at most 1{share}")
        return max(1, math.floor(float(budget) * n + 0.5))
    if not 1 <= budget <= n:
        raise InputError(f"count: found {budget}, expected 1 to {n}, the size of the pool")
    return int(budget)
