"""Synthetic embeddings that look like CLIP's, for measuring and testing the selection.

Long-tailed classes, a modality gap, captions that belong to another class, and similarities of the usual
size: about 0.3 for a pair, 0.25 inside a class, 0.12 between classes.
"""

from collections.abc import Iterator
from math import sqrt

import numpy as np

# shares of the squared norm: common to both modalities, the modality's own cone, the class, the pair
_COMMON, _CONE, _CLASS, _PAIR = 0.12, (0.56, 0.38), 0.12, 0.06


# noise lives in few dimensions, so that similarities spread as they do in practice
_RANK = 48

BLOCK = 65536


def synthetic_classes(n: int, n_classes: int, seed: int = 0) -> np.ndarray:
    """Latent classes of n pairs, int32 [n]: class r has a share in proportion to (r + 2) ** -0.6, in random
    order."""
    share = (np.arange(n_classes) + 2.0) ** -0.6
    return np.random.default_rng(seed).choice(n_classes, n, p=share / share.sum()).astype(np.int32)


def synthetic_blocks(
    latent_class: np.ndarray, d: int = 512, seed: int = 0, mismatched: float = 0.1
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Embeddings of the pairs, ``BLOCK`` at a time, in order.

    Args:
        latent_class: int32 [n], as ``synthetic_classes`` gives them.
        mismatched: share of captions that belong to a random other pair's class.

    Yields:
        (image_embedding, text_embedding, label_similarity): float16 [b, d] twice, float32 [b].
    """
    rng = np.random.default_rng([seed, 1])
    n_classes = int(latent_class.max()) + 1
    rank = min(_RANK, d)
    common, *cones = np.linalg.qr(rng.standard_normal((d, 3)))[0].T.astype(np.float32)
    classes = _unit(rng.standard_normal((n_classes, d)).astype(np.float32))
    basis = np.linalg.qr(rng.standard_normal((d, rank)))[0].T.astype(np.float32)
    prompts = _unit(sqrt(_COMMON) * common + sqrt(_CONE[1]) * cones[1] + sqrt(_CLASS) * classes)
    for number, at in enumerate(range(0, len(latent_class), BLOCK)):
        of_image = latent_class[at : at + BLOCK]
        block = np.random.default_rng([seed, 2, number])
        other = block.random(len(of_image)) < mismatched
        of_text = np.where(other, block.permutation(of_image), of_image)
        shared = _unit(block.standard_normal((len(of_image), rank), np.float32))
        sides = []
        for cone, share, labels in zip(cones, _CONE, (of_image, of_text), strict=True):
            own = _unit(block.standard_normal((len(of_image), rank), np.float32))
            # a mismatched caption shares nothing with its image
            pair = np.where(other[:, None] & (labels is of_text), own, shared)
            noise = sqrt(_PAIR) * pair + sqrt(1 - _COMMON - share - _CLASS - _PAIR) * own
            side = noise @ basis + sqrt(_CLASS) * classes[labels]
            side += sqrt(_COMMON) * common + sqrt(share) * cone
            sides.append(_unit(side).astype(np.float16))
        fit = np.einsum("ij,ij->i", sides[1].astype(np.float32), prompts[of_image])
        yield sides[0], sides[1], fit


def synthetic_arrays(
    n: int, n_classes: int, d: int = 512, seed: int = 0, mismatched: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(image_embedding, text_embedding, latent_class, label_similarity), for ``Pool.from_arrays``."""
    latent_class = synthetic_classes(n, n_classes, seed)
    image, text, similarity = zip(*synthetic_blocks(latent_class, d, seed, mismatched), strict=True)
    return np.concatenate(image), np.concatenate(text), latent_class, np.concatenate(similarity)


def _unit(x: np.ndarray) -> np.ndarray:
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x
