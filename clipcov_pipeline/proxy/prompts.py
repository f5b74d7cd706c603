"""Class names and prompt templates, and the zero-shot classifier that they make.

A template is a string with ``{}`` where the class name goes.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from clipcov_pipeline.errors import InputError, near_file


class TextEncoder(Protocol):
    """What is needed of an `Encoder` to embed texts: float32 [n, d] rows, of unit norm or NaN."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...


def imagenet_class_names() -> list[str]:
    """Return the 1,000 ImageNet-1k class names of open_clip, in ImageNet's order (two names occur twice)."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def imagenet_templates() -> list[str]:
    """Return the 80 prompt templates of the CLIP paper, from open_clip (which holds them as functions)."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def load_class_names(path: str | Path) -> list[str]:
    """Read class names from a UTF-8 text file, one a line, white space around them and blank lines dropped.

    Raises:
        InputError: no such file, not UTF-8, no name in it, or a name that occurs twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"class_names: cannot read {path} ({error.strerror}){near_file(path)}; give a text file with one"
            " class name a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"class_names: {path} is not UTF-8 (byte {error.start}); convert it") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"class_names: {path} names no class; give one class name a line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"class_names: {path} names {', '.join(map(repr, repeated[:5]))} more than once"
            f"{f' (and {len(repeated) - 5} others)' if len(repeated) > 5 else ''}; keep one line of each"
        )
    return names


def name_of(names: Sequence[str] | None, number: int) -> str | None:
    """Return the name of a latent class; None where classes have no names (clusters)."""
    return names[number] if names is not None and number < len(names) else None


def check_templates(templates: Sequence[str]) -> None:
    """Raise InputError where there is no template, or one without ``{}``."""
    if not templates:
        raise InputError("templates: the list is empty; give at least '{}'")
    if bad := [template for template in templates if "{}" not in template]:
        raise InputError(
            f"templates: {bad[0]!r} has no {{}} for the class name; write e.g. 'a photo of {{}}'"
        )


def class_embeddings(encoder: TextEncoder, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Return the zero-shot classifier: the mean of a class's unit prompt embeddings, scaled to unit norm.

    As open_clip's ``build_zero_shot_classifier`` and the CLIP paper (arXiv 2103.00020, section 3.1.4).

    Returns:
        float32 [len(names), d], unit norm; a row of NaN where the encoder gives NaN or the templates cancel.

    Raises:
        InputError: no template, or one without ``{}``.
    """
    check_templates(templates)
    total = np.zeros((), np.float64)
    for template in templates:
        # replace, not format: a class name or template may hold other braces
        total = total + encoder.encode_texts([template.replace("{}", name) for name in names])
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (total / norm).astype(np.float32)
