"""The section `diagnostics`, with the bounds of the checks."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clipcov_pipeline.experiment.config.base import KNOB, Count, Section


class Bound(Section):
    """Where a check draws the line, and how bad it is to be beyond it."""

    bound: Annotated[float, Field(strict=True)]
    severity: Literal["warn", "error"] = "warn"
    """``error`` keeps everything that follows from the entry from being built."""


class Checks(Section):
    """The bounds of the checks (``clipcov_pipeline.experiment.checks`` says what each one measures);
    ``severity`` or ``bound`` may be given alone."""

    bad_samples: Bound = Bound(bound=0.1)
    """raw_shards: largest share of a shard's samples that is kept aside."""
    refused_embeddings: Bound = Bound(bound=0.01)
    """embeddings: largest share of a shard's samples whose embedding is not finite or has no norm."""
    unit_norm: Bound = Bound(bound=0.01, severity="error")
    """embeddings: largest distance of a stored embedding's norm from 1."""
    matched_pairs: Bound = Bound(bound=3.0, severity="error")
    """embeddings: smallest lead of the cosine of matched pairs over shuffled ones, in standard errors."""
    largest_class: Bound = Bound(bound=0.25)
    """pseudo_labels: largest share of the pool in one latent class."""
    mean_margin: Bound = Bound(bound=0.002)
    """pseudo_labels: smallest mean lead of the chosen class over the next best, in cosine."""
    alignment: Bound = Bound(bound=0.2, severity="error")
    """subset_diagnostics: smallest cosine of the subset's and the pool's centred cross-covariance."""
    dominant_term: Bound = Bound(bound=0.9)
    """subset_diagnostics: largest share of one term in the sum of the terms' absolute values."""
    empty_class: Bound = Bound(bound=9.0)
    """subset_diagnostics: most members that a latent class left empty may have in the pool."""
    duplicates: Bound = Bound(bound=0.5)
    """subset_diagnostics: largest share of the subset that repeats an image of it, exactly or nearly."""
    loss: Bound = Bound(bound=1.0)
    """checkpoints: largest ratio of the last loss to the first."""
    unseen: Bound = Bound(bound=0.01, severity="error")
    """checkpoints: largest share of the samples due in the training's draws that it was not given."""
    above_chance: Bound = Bound(bound=-3.0)
    """scores: smallest distance of a metric above chance, in standard errors."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Fill in what a check's entry leaves out by that check's own default."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name], **value} if name in defaults and isinstance(value, dict) else value
            for name, value in values.items()
        }


class Diagnostics(Section):
    """What is worked out for every subset beside the pool, and when a check fails."""

    random_draws: Annotated[int, Field(ge=1, strict=True)] = 10
    """Random subsets of the same size that a subset's cross-covariance is compared with."""
    tsne_samples: Annotated[int, Field(ge=10, le=20_000, strict=True)] = 5000
    """Most samples of the pool that are drawn as a map."""
    seed: Count = 0
    checks: Annotated[Checks, KNOB] = Checks()
    """A bound changes no result: the checks are evaluated again, nothing else."""
