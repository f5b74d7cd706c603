"""The filters and their parameters: names, defaults and checks, in plain Python.

A pair has to pass all that are given. The bounds of DataComp's baselines (arXiv 2304.14108; github
mlfoundations/datacomp, baselines/apply_filter.py) are the defaults. A bound of null is none.

- ``min_similarity``: least <v_i, t_i>. ``caption_length``: [shortest, longest] in characters.
- ``clip_score``: ``threshold``, the least score, or ``share``, of the pool, by score; of <v_i, t_i>, or with
  ``arch`` of the column that DataComp's metadata has of that model.
- ``basic``: ``min_words`` and ``min_characters`` of a caption, ``min_side`` and ``max_aspect`` of an image in
  pixels; ``true`` is all defaults, ``false`` none of it.
- ``language``: captions whose most likely language by a fastText ``model`` is one of ``keep``.
- ``text_based``: captions that name one of ``class_names``.
- ``image_based``: images in the clusters that are nearest to any image of ``target`` (embeddings); by
  ``centroids``, or by k-means of the pool into ``n_clusters`` (one a hundred pairs, at most 100,000), which
  ``seed`` fixes.
- ``drop_duplicate_images``, ``drop_duplicate_captions``: of those that pass all others, the best copy.
- ``rejected``: "drop" what does not pass, or rank it "last".
"""

from collections.abc import Mapping
from typing import Any, Literal

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.parameters import (
    Check,
    boolean,
    choice,
    file_name,
    fill,
    integer,
    length_range,
    number,
    optional,
    texts,
)

Rejected = Literal["drop", "last"]
Arch = Literal["l14", "b32"]

_ALWAYS: dict[str, tuple[Check, Any]] = {
    "min_similarity": (optional(number()), None),
    "drop_duplicate_images": (boolean, False),
    "drop_duplicate_captions": (boolean, False),
    "caption_length": (optional(length_range), None),
    "rejected": (choice(Rejected), "drop"),
}
_ROWS = "an .npy of {}, float [n, d]"

# they came later: one that is not given is in no fingerprint
FILTERS: dict[str, dict[str, tuple[Check, Any]]] = {
    "clip_score": {
        "threshold": (optional(number()), None),
        "share": (optional(number(0.0, above=True)), None),
        "arch": (optional(choice(Arch)), None),
    },
    "basic": {
        "min_words": (optional(integer(0)), 3),
        "min_characters": (optional(integer(0)), 6),
        "min_side": (optional(integer(0)), 200),
        "max_aspect": (optional(number(1.0)), 3.0),
    },
    "language": {
        "model": (file_name("a fastText model file, such as lid.176.bin"), None),
        "keep": (texts("a list of languages as the model names them, such as [en]; 'no' in quotes"), ["en"]),
    },
    "text_based": {"class_names": (file_name("a text file, one class name a line"), None)},
    "image_based": {
        "target": (file_name(_ROWS.format("the target images' embeddings")), None),
        "centroids": (optional(file_name(_ROWS.format("cluster centres"))), None),
        "n_clusters": (optional(integer(1)), None),
        "seed": (integer(0), 0),
    },
}

_FILES = {"language": ("model",), "text_based": ("class_names",), "image_based": ("target", "centroids")}

_COLUMNS = {
    "drop_duplicate_images": "image_hash",
    "drop_duplicate_captions": "caption_hash",
    "caption_length": "caption_length",
    "language": "caption",
    "text_based": "caption",
}
_BASIC_COLUMNS = {
    "min_words": ("caption_words",),
    "min_characters": ("caption_length",),
    "min_side": ("width", "height"),
    "max_aspect": ("width", "height"),
}


def filters(name: str, value: Any) -> dict[str, Any]:
    """Check ``filters`` of a method; return the first five with defaults, and of the others those given.

    Raises:
        InputError: an unknown filter or parameter, or a value of the wrong type or range.
    """
    given = {} if value is None else value
    if not isinstance(given, Mapping):
        raise InputError(
            f"{name}: found {given!r}, expected a mapping with any of {', '.join((*_ALWAYS, *FILTERS))}"
        )
    if unknown := [key for key in given if key not in _ALWAYS and key not in FILTERS]:
        raise InputError(
            f"{name}: unknown parameter {unknown[0]!r}, expected any of {', '.join((*_ALWAYS, *FILTERS))}"
        )
    filled = fill(name, {key: given[key] for key in given if key in _ALWAYS}, _ALWAYS)
    for key in FILTERS:
        if key in given and given[key] is not False:
            filled[key] = _filter(f"{name}.{key}", key, given[key])
    return filled


def _filter(path: str, name: str, value: Any) -> dict[str, Any]:
    value = {} if value is True else value
    if not isinstance(value, Mapping):
        raise InputError(
            f"{path}: found {value!r}, expected a mapping with any of {', '.join(FILTERS[name])}, or true or"
            " false"
        )
    filled = fill(path, value, FILTERS[name])
    check_filter(path, name, filled)
    return filled


def check_filter(path: str, name: str, filled: Mapping[str, Any]) -> None:
    """Look at parameters of a filter that have to do with each other.

    Raises:
        InputError: two that exclude each other, none of two, or a share above 1.
    """
    if name == "clip_score":
        threshold, share = filled["threshold"], filled["share"]
        if (threshold is None) == (share is None):
            raise InputError(
                f"{path}: found threshold {threshold} and share {share}, expected exactly one of them"
            )
        if share is not None and share > 1:
            raise InputError(f"{path}.share: found {share:g}, expected a share of the pool, at most 1")
    if name == "image_based" and filled["centroids"] is not None and filled["n_clusters"] is not None:
        raise InputError(
            f"{path}.n_clusters: has no effect with centroids, which are the clusters: remove it"
        )


def filters_anything(filled: Mapping[str, Any]) -> bool:
    """Whether any filter is set; ``filled`` as `filters` returns them."""
    return any(
        value is not None and value is not False for name, value in filled.items() if name != "rejected"
    )


def columns_of_filters(filled: Mapping[str, Any]) -> set[str]:
    """Return the optional columns of the pool that filters read; ``filled`` as `filters` returns them."""
    found = {column for name, column in _COLUMNS.items() if filled.get(name)}
    for bound, columns in _BASIC_COLUMNS.items():
        if filled.get("basic", {}).get(bound) is not None:
            found |= set(columns)
    if arch := filled.get("clip_score", {}).get("arch"):
        found.add(score_column(arch))
    return found


def score_column(arch: str) -> str:
    """Return the column that DataComp's metadata has of a CLIP model's scores."""
    return f"clip_{arch}_similarity_score"


def files_of_filters(filled: Mapping[str, Any]) -> dict[str, str]:
    """Return the files that filters read, by ``FILTER.KEY``; ``filled`` as `filters` returns them."""
    return {
        f"{name}.{key}": filled[name][key]
        for name, keys in _FILES.items()
        if name in filled
        for key in keys
        if filled[name][key] is not None
    }
