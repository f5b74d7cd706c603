"""What filters read from files: class names, embeddings, a language model."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.errors import InputError, near_file
from clipcov_pipeline.selection.columns import captions_of
from clipcov_pipeline.selection.readers import read_array


def check_filter_file(key: str, path: Path) -> None:
    """Look whether a file can serve as a filter's ``key``, such as "filters.language.model".

    Raises:
        InputError: no such file, one of another kind, or a package that reads it is missing.
    """
    name = key.rpartition(".")[2]
    if not path.is_file():
        raise InputError(f"{key}: found no file {path}{near_file(path)}, expected one")
    try:
        if name == "class_names":
            read_names(path)
        elif name == "model":
            _require_fasttext()
        else:
            _rows(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def read_names(path: str | Path) -> list[str]:
    """Return the class names of a UTF-8 text file, one a line, as `names_in` looks for them.

    Raises:
        InputError: no such file, not UTF-8, or a line without any letter or digit.
    """
    import polars as pl

    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names: cannot read {path} ({error}), expected UTF-8 text") from error
    names = [line for line in lines if line.strip()]
    words = _words(pl.Series(names, dtype=pl.String))
    if empty := [name for name, found in zip(names, words, strict=True) if not found.strip()]:
        raise InputError(f"class names: found {empty[0]!r} in {path}, expected a name of letters or digits")
    if not names:
        raise InputError(f"class names: found none in {path}, expected one a line")
    return words.unique(maintain_order=True).to_list()


def names_in(captions: Sequence[str] | np.ndarray, class_names: str | Path) -> np.ndarray:
    """Return whether each caption names a class: bool [n].

    A name is one or more words that follow each other; case, and what stands between words, do not count.

    Raises:
        InputError: as `read_names`.
    """
    texts = _words(captions_of(captions))
    return texts.str.contains_any(read_names(class_names)).to_numpy()


def _words(texts: Any) -> Any:
    """Lower case, with one space before, between and after words."""
    return (" " + texts.str.to_lowercase() + " ").str.replace_all(r"[\W_]+", " ")


def read_rows(path: str | Path, dim: int) -> np.ndarray:
    """Return the embeddings of an ``.npy``: float [n, dim], memory-mapped.

    Raises:
        InputError: no such file, not of this width, or a value that is not finite.
    """
    rows = _rows(Path(path))
    if rows.shape[1] != dim:
        raise InputError(
            f"{path}: found embeddings of width {rows.shape[1]}, expected the pool's {dim}: embed with"
            " the same model"
        )
    if bad := len(rows) - int(np.isfinite(rows).all(axis=1).sum()):
        raise InputError(
            f"{path}: found {bad} of {len(rows)} rows with values that are not finite: drop them"
        )
    return rows


def _rows(path: Path) -> np.ndarray:
    rows = read_array(path)
    if rows.ndim != 2 or len(rows) == 0 or rows.dtype.kind != "f":
        raise InputError(f"{path}: found {rows.dtype} of shape {rows.shape}, expected floats [n, d]")
    return rows


def language_model(path: str | Path) -> Callable[[str], str]:
    """Return what tells a text's most likely language, as a fastText model names it ("" where it knows none).

    Raises:
        InputError: fastText is not installed, or cannot read the file.
    """
    _require_fasttext()
    import fasttext  # pyright: ignore[reportMissingImports]  # an extra

    try:
        model = fasttext.load_model(str(path))
    except ValueError as error:
        raise InputError(f"{path}: not readable as a fastText model ({error})") from error

    def language_of(text: str) -> str:
        labels, _ = model.predict(text.replace("\n", " "))
        return labels[0].removeprefix("__label__") if labels else ""

    return language_of


def _require_fasttext() -> None:
    if find_spec("fasttext") is None:
        raise InputError(
            "language: found no package fasttext, expected it: pip install 'clipcov-pipeline[language]'"
        )
