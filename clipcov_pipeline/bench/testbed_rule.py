"""The rule by which a testbed is planted."""

from dataclasses import dataclass

SHIFTS = ("grayscale", "edges", "colour_jitter", "low_resolution", "rotated")


@dataclass(frozen=True)
class Rule:
    """How a pool is planted.

    Attributes:
        draw: seed of everything: class order, images, captions, near-duplicates.
        largest: images of the largest class; imbalance: how many times larger it is than the smallest.
        noise: share of captions that are not faithful; 3 in 5 of these are another image's caption, the rest
            say nothing.
        duplicates: near-duplicates added, as a share of the images; half of them get a fresh caption.
        test_per_class, train_per_class, shifted_per_class: evaluation photos of each class: for zero-shot and
            k-NN, for the probe to learn from, and for each shifted version.
        retrieval_pairs: captioned test photos.
    """

    draw: int = 0
    largest: int = 5000
    imbalance: float = 10.0
    noise: float = 0.5
    duplicates: float = 0.25
    test_per_class: int = 500
    train_per_class: int = 300
    shifted_per_class: int = 100
    retrieval_pairs: int = 500
