"""The selection methods and their parameters: names, defaults and checks, in plain Python.

A configuration is checked against this table when it is loaded, so nothing here imports numpy or numba.

What the parameters mean, by method. For all: ``seed`` (int, 0), ``filters`` (see `filter_parameters`).
clipcov:

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
others follow in random order; without it a budget beyond the list is refused). basic, language, text_based,
image_based: the filter's own.
"""

import copy
import math
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.filter_parameters import (
    FILTERS,
    check_filter,
    columns_of_filters,
    files_of_filters,
    filters,
)
from clipcov_pipeline.selection.parameters import (
    Check,
    boolean,
    choice,
    file_name,
    fill,
    integer,
    mapping,
    number,
    optional,
)

Mode = Literal["greedy", "strict", "notebook"]
Redundancy = Literal["class_size", "budget_share"]
ClassBalance = Literal["global", "proportional", "quota", "sqrt", "uniform"]
# shares of a budget go with class size to this power; "global" has no shares: as F says, and as the notebook
# does, but with shares the subsets train better and vary less (docs/evidence.md)
BALANCE_POWER = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
Shares = Literal["proportional", "quota", "sqrt", "uniform"]
Keep = Literal["hard", "easy", "random"]
Fill = Literal["random"]
DuplicateKey = Literal["image_or_caption", "image", "caption", "pair"]
Captions = bool | Literal["text"]

# the coefficients in the authors' notebook: m + 2 e + l / 2 - c, and the redundancy as it is
DEFAULT_WEIGHTS = {"class": 1.0, "self": 2.0, "label": 0.5, "inter": 1.0, "redundancy": 1.0}

# columns that come from the shards' manifests
SIZE = {"width", "height"}

# a filter as a method: what passes it, in random order
FILTER_METHODS = ("basic", "language", "text_based", "image_based")

WEIGHTS = mapping({term: (number(0.0), default) for term, default in DEFAULT_WEIGHTS.items()})
_COMMON: dict[str, tuple[Check, Any]] = {"seed": (integer(0), 0), "filters": (filters, None)}
_BY_CLASS: dict[str, tuple[Check, Any]] = {"class_floor": (integer(0), 0)}
_CLUSTERS: dict[str, tuple[Check, Any]] = {
    "n_clusters": (optional(integer(1)), None),
    "keep": (choice(Keep), "hard"),
}

_METHODS: dict[str, dict[str, tuple[Check, Any]]] = {
    "clipcov": {
        "mode": (choice(Mode), "greedy"),
        "clip_negative": (optional(boolean), None),
        "weights": (WEIGHTS, None),
        "redundancy": (choice(Redundancy), "class_size"),
        "class_balance": (optional(choice(ClassBalance)), None),
        **_BY_CLASS,
        "repeat_penalty": (number(0.0), 0.0),
        "batch_size": (integer(2), 200),
    },
    "random": {},
    "clip_score": {},
    "clip_score_per_class": {"class_balance": (choice(Shares), "proportional"), **_BY_CLASS},
    "semdedup": _CLUSTERS,
    "dedup": {"by": (choice(DuplicateKey), "image_or_caption")},
    "c_rho": {},
    "s_cliploss": {
        "temperature": (number(0.0, above=True), 0.01),
        "batch_size": (integer(2), 4096),
        "n_batches": (integer(1), 5),
    },
    "external": {
        "uids": (file_name("a file of uids (.parquet, .csv or .npy)"), None),
        "shuffle": (boolean, False),
        "fill": (optional(choice(Fill)), None),
    },
    **{name: {key: FILTERS[name][key] for key in FILTERS[name] if key != "seed"} for name in FILTER_METHODS},
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
    filled = fill(name, params or {}, {**_METHODS[name], **_COMMON})
    if name == "clipcov":  # what the published notebook does is its mode's default
        notebook = filled["mode"] == "notebook"
        if filled["class_balance"] is None:
            filled["class_balance"] = "global" if notebook else "proportional"
        if filled["clip_negative"] is None:
            filled["clip_negative"] = notebook
    if name in FILTER_METHODS:
        if name in filled["filters"]:
            raise InputError(f"{name}.filters.{name}: found beside the method {name}, expected it once")
        check_filter(name, name, filled)
    return filled


def as_random(method: str, filled: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a method with its parameters; a filter is `random` behind itself, beside its other filters.

    ``filled``: as `validate_method` returns them.
    """
    if method not in FILTER_METHODS:
        return method, dict(filled)
    own = {name: filled[name] for name in FILTERS[method]}
    return "random", {"seed": filled["seed"], "filters": {**filled["filters"], method: own}}


def files_of(method: str, params: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the files that a method and its filters read, by their key, such as "filters.language.model".

    Raises:
        InputError: as `validate_method`.
    """
    filled = validate_method(method, params)
    found = {f"filters.{key}": file for key, file in files_of_filters(filled["filters"]).items()}
    if method in FILTER_METHODS:
        own = files_of_filters({method: filled})
        found |= {key.removeprefix(f"{method}."): file for key, file in own.items()}
    return found | ({"uids": filled["uids"]} if method == "external" else {})


def with_files_at(
    method: str, params: Mapping[str, Any], where: Callable[[str], str | Path]
) -> dict[str, Any]:
    """Return parameters with each file where it lies.

    Raises:
        InputError: as `validate_method`.
    """
    placed = copy.deepcopy(dict(params))
    for key, file in files_of(method, params).items():
        *parents, last = key.split(".")
        inner = placed
        for parent in parents:
            inner = inner[parent]
        inner[last] = str(where(file))
    return placed


def columns_read(method: str, params: Mapping[str, Any] | None = None) -> set[str]:
    """Return the optional columns of the pool that a method and its filters read with these parameters.

    Raises:
        InputError: as ``validate_method``.
    """
    method, filled = as_random(method, validate_method(method, params))
    found = set(NEEDS.get(method, ()))
    if method == "dedup" and filled["by"] in ("image", "caption"):
        found = {f"{filled['by']}_hash"}
    if method == "clipcov" and filled["repeat_penalty"]:
        found = {"image_hash", "caption_hash"}
    return found | columns_of_filters(filled["filters"])


def reads_captions(method: str, params: Mapping[str, Any] | None = None) -> Captions:
    """Return whether a method or its filters look at captions: ``"text"`` where at their words, True where
    their hashes, lengths and numbers of words do.

    Raises:
        InputError: as ``validate_method``.
    """
    read = columns_read(method, params)
    return "text" if "caption" in read else bool(read & {"caption_hash", "caption_length", "caption_words"})


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
