"""Classifies images by a trained checkpoint: the loader module of the model that is registered in MLflow.

MLflow imports this module and calls `_load_pyfunc` with the folder of the checkpoint; nothing is unpickled
but the weights, which torch reads with ``weights_only``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import (
    IMAGE_FORMATS,
    ImageRules,
    UnusableImageError,
    check_rules,
    open_image,
)
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.proxy.prompts import class_embeddings

if TYPE_CHECKING:
    import pandas as pd

IMAGE, CLASS_NAMES, TEMPLATES = "image", "class_names", "templates"
RULES = ImageRules(high_bit_depth="scale")  # the model may have been trained on such images


class Classifier:
    """Zero-shot classification over class names that are given with each call."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Return a frame of `image`, `class` (the most probable name) and its `probability`.

        Args:
            model_input: column ``image``: paths of image files.
            params: ``class_names``, the candidates (two or more, or one: then its probability is 1), and
                ``templates``, prompt templates with ``{}``; their embeddings are averaged.

        Raises:
            InputError: no class names, or an image that cannot be read.
        """
        import pandas as pd

        given = params or {}
        names, templates = list(given.get(CLASS_NAMES, ())), list(given.get(TEMPLATES, ("{}",)))
        paths = [str(path) for path in model_input[IMAGE]]
        if not names:
            raise InputError(
                f"{CLASS_NAMES}: found none, expected the candidates: params={{'{CLASS_NAMES}': [...]}}"
            )
        probability = self.probabilities(paths, names, templates)
        best = probability.argmax(axis=1)
        return pd.DataFrame(
            {
                IMAGE: paths,
                "class": [names[index] for index in best],
                "probability": probability[np.arange(len(best)), best],
            }
        )

    def probabilities(
        self, paths: Sequence[str], names: Sequence[str], templates: Sequence[str] = ("{}",)
    ) -> np.ndarray:
        """Return the softmax over the names of the scaled similarities, float64 [images, names].

        Raises:
            InputError: an image that cannot be read.
        """
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            raise InputError(f"{IMAGE}: no file at {missing[0]!r}, expected the path of an image")
        images = self.encoder.encode_images(map(_usable, paths))
        bad = np.flatnonzero(np.isnan(images).any(axis=1))
        if len(bad):
            raise InputError(
                f"{IMAGE}: {paths[bad[0]]!r} cannot be read as an image, expected a whole file of the formats"
                f" {', '.join(IMAGE_FORMATS)}"
            )
        scale = float(self.encoder.model.logit_scale.detach().exp())  # type: ignore[operator, union-attr]
        logits = scale * (images @ class_embeddings(self.encoder, names, templates).T).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def _usable(path: str) -> bytes:
    data = Path(path).read_bytes()
    try:
        check_rules(open_image(data), RULES)
    except UnusableImageError as error:
        raise InputError(f"{IMAGE}: {path!r} cannot be read as an image: {error}") from error
    return data


def _load_pyfunc(path: str) -> Classifier:
    """Load the classifier of a checkpoint's folder; MLflow calls this."""
    return Classifier(load_encoder(ModelSpec(f"local-dir:{path}"), device="auto"))
