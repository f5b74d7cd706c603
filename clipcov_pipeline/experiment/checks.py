"""Failure signatures: figures that a stage has recorded, held against the bounds of the YAML.

A check is a pure function of an entry's recorded statistics and of its bound (`diagnostics.checks`), so that
a changed bound re-evaluates the check and builds nothing. A failed check of severity ``error`` keeps what
reads the entry, and all that follows from it, from being built (:func:`stands_against`; the plan says so).
Dagster and the terminal show the same outcomes.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from clipcov_pipeline.experiment.config.diagnostics import Bound
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.records import Record, node_name
from clipcov_pipeline.experiment.stages import (
    CHECKPOINTS,
    EMBEDDINGS,
    PSEUDO_LABELS,
    RAW_SHARDS,
    SCORES,
    SUBSET_DIAGNOSTICS,
)

Stats = Mapping[str, Any]


class Figure(NamedTuple):
    """What a check looks at: a number, or None where it is not defined, and what it says in words."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Check:
    """One failure signature of a stage; ``name`` is its key in ``diagnostics.checks``."""

    asset: str
    name: str
    good: Literal["at most", "at least"]
    figure: Callable[[Stats], Figure]
    description: str


@dataclass(frozen=True)
class CheckOutcome:
    """A check's verdict on one entry.

    Attributes:
        asset, partition: the stage and the entry's partition (``_`` where the stage has none).
        severity: ``warn``, or ``error``: nothing is built from it.
        passed: whether the figure is within its bound; True as well where it is not defined.
        value: the figure, None where it is not defined; NaN (a loss that diverged) never passes.
        threshold: the bound; good: on which side of it the figure has to be.
        text: one line with figure and bound, or "not defined, because ...".
    """

    asset: str
    partition: str
    name: str
    severity: Literal["warn", "error"]
    passed: bool
    value: float | None
    threshold: float
    good: Literal["at most", "at least"]
    text: str

    @property
    def entry(self) -> str:
        """``STAGE/PARTITION``."""
        return node_name(self.asset, self.partition)

    @property
    def blocks(self) -> bool:
        """Whether it keeps what follows from being built."""
        return not self.passed and self.severity == "error"


def evaluate_checks(
    config: Config, records: Iterable[Record], stages: Collection[str] = ()
) -> list[CheckOutcome]:
    """Return the outcome of every check on these entries, in their order.

    Args:
        stages: look at these stages only; all when empty.
    """
    return [
        _outcome(check, getattr(config.diagnostics.checks, check.name), record)
        for record in records
        if not stages or record.stage in stages
        for check in _checks_on(record)
    ]


def stands_against(config: Config, record: Record) -> tuple[str, ...]:
    """Return why nothing may be built from an entry: its failed checks of severity ``error``, in words."""
    bounds = ((check, getattr(config.diagnostics.checks, check.name)) for check in _checks_on(record))
    outcomes = (_outcome(check, limit, record) for check, limit in bounds if limit.severity == "error")
    return tuple(
        f"blocked by check {outcome.name} of {outcome.entry}: {outcome.text}; mend the cause, or change"
        f" diagnostics.checks.{outcome.name}"
        for outcome in outcomes
        if outcome.blocks
    )


def _checks_on(record: Record) -> tuple[Check, ...]:
    """The checks of an entry's stage; a subset's overlap has none."""
    overlap = "@" in record.partition and record.stage != SCORES
    return () if overlap else checks_of(record.stage)


@cache
def checks_of(asset: str) -> tuple[Check, ...]:
    """Return a stage's checks."""
    return tuple(check for check in CHECKS if check.asset == asset)


def _outcome(check: Check, limit: Bound, record: Record) -> CheckOutcome:
    value, text = _figure(check, record)
    if value is None:
        passed, text = True, f"not defined, because {text}"
    else:
        passed = value <= limit.bound if check.good == "at most" else value >= limit.bound  # never for NaN
        text = f"{text}: {value:.4g}, expected {check.good} {limit.bound:g}"
    return CheckOutcome(
        asset=check.asset,
        partition=record.partition,
        name=check.name,
        severity=limit.severity,
        passed=passed,
        value=value,
        threshold=limit.bound,
        good=check.good,
        text=text,
    )


def _figure(check: Check, record: Record) -> Figure:
    try:
        return check.figure(record.stats)
    except KeyError as missing:
        return Figure(None, _before(str(missing.args[0])))


def _recorded(name: str, text: str) -> Callable[[Stats], Figure]:
    """A figure that the stage has put among its statistics; ``NAME_undefined`` says why there is none."""

    def figure(stats: Stats) -> Figure:
        if (value := stats.get(name)) is not None:
            return Figure(float(value), text.format_map(stats))
        return Figure(None, str(stats.get(f"{name}_undefined") or _before(name)))

    return figure


def _before(name: str) -> str:
    return f"the entry was built before {name} was recorded: materialize it again"


def _ratio(part: float, whole: float, text: str, without: str) -> Figure:
    """A figure over another, both of which ``text`` may name; ``without`` says why there is none over 0."""
    return Figure(part / whole, text.format(part=part, whole=whole)) if whole else Figure(None, without)


def _bad_samples(stats: Stats) -> Figure:
    if stats["quarantined"]:
        return Figure(1.0, f"the shard is quarantined ({stats['quarantined']}), share of bad samples")
    text = "share of bad samples ({part:,} of {whole:,})"
    return _ratio(stats["kept_aside"], stats["samples"], text, "the shard holds no sample")


def _refused(stats: Stats) -> Figure:
    total, text = stats["rows"] + stats["refused"], "share of embeddings refused ({part:,} of {whole:,})"
    return _ratio(stats["refused"], total, text, "the shard has no good sample")


def _largest_class(stats: Stats) -> Figure:
    text = "share of the pool in the largest latent class"
    return _ratio(stats["largest_class"], stats["pool"], text, "the pool is empty")


def _alignment(stats: Stats) -> Figure:
    figure = _recorded("alignment", "alignment of the cross-covariance with the pool's")(stats)
    if figure.value is None or stats.get("alignment_of_random") is None:
        return figure
    return Figure(figure.value, f"{figure.text} (random subsets {stats['alignment_of_random']:.4g})")


def _duplicates(stats: Stats) -> Figure:
    kinds = {"duplicate_images": "exactly", "near_duplicate_images": "nearly"}
    found = {words: stats[name] for name, words in kinds.items() if name in stats}
    if not found:
        return Figure(None, _before("near_duplicate_images"))
    words = max(found, key=lambda kind: found[kind])
    return Figure(found[words], f"share of samples that repeat an image of the subset {words}")


def _loss(stats: Stats) -> Figure:
    first, last = (math.nan if stats[name] is None else stats[name] for name in ("first_loss", "last_loss"))
    text = "ratio of the last loss ({part:.4g}) to the first ({whole:.4g})"
    return _ratio(last, first, text, "the first loss is 0")


def _unseen(stats: Stats) -> Figure:
    """Distinct samples against those due: all of the subset, or as many as there were draws."""
    if (due := stats.get("due")) is None:
        return Figure(None, str(stats.get("due_undefined") or _before("due")))
    text = "share of the samples due that the training was not given ({part:,} of {whole:,})"
    return _ratio(due - stats["seen_distinct"], due, text, "none was due")


def _above_chance(stats: Stats) -> Figure:
    """The metric that is furthest below chance; the noise is a binomial's at chance level."""
    chance, n = stats.get("chance"), stats.get("n_scored")
    if chance is None or n is None:
        return Figure(None, _before("chance"))
    scores = {
        metric: (stats[metric] - level) / math.sqrt(level * (1 - level) / n[metric])
        for metric, level in chance.items()
        if 0 < level < 1 and n[metric]
    }
    if not scores:
        return Figure(None, "chance level is 0 or 1 for every metric")
    worst = min(scores, key=lambda metric: scores[metric])
    return Figure(
        scores[worst],
        f"standard errors above chance of {worst} ({stats[worst]:.4g}, chance {chance[worst]:.4g})",
    )


CHECKS = (
    Check(
        RAW_SHARDS, "bad_samples", "at most", _bad_samples, "Share of a shard's samples that is kept aside."
    ),
    Check(
        EMBEDDINGS,
        "refused_embeddings",
        "at most",
        _refused,
        "Share of a shard's samples whose embedding has no norm or is not finite.",
    ),
    Check(
        EMBEDDINGS,
        "unit_norm",
        "at most",
        _recorded("norm_error", "largest distance of an embedding's norm from 1"),
        "Stored embeddings have unit norm, as every similarity assumes.",
    ),
    Check(
        EMBEDDINGS,
        "matched_pairs",
        "at least",
        _recorded(
            "matched_lead",
            "lead of matched pairs (cosine {matched_cosine:.3f}) over shuffled ones"
            " ({shuffled_cosine:.3f}) in standard errors",
        ),
        "An image is nearer to its own caption than to another: else the proxy is broken.",
    ),
    Check(
        PSEUDO_LABELS,
        "largest_class",
        "at most",
        _largest_class,
        "No latent class takes most of the pool.",
    ),
    Check(
        PSEUDO_LABELS,
        "mean_margin",
        "at least",
        _recorded("mean_margin", "mean lead of a sample's class over the next best"),
        "Samples have a class of their own: near 0 the classes tell nothing apart.",
    ),
    Check(
        SUBSET_DIAGNOSTICS,
        "alignment",
        "at least",
        _alignment,
        "The subset's cross-covariance of images and captions points where the pool's does.",
    ),
    Check(
        SUBSET_DIAGNOSTICS,
        "dominant_term",
        "at most",
        _recorded("dominant_share", "share of the term {dominant_term} in the sum of the terms"),
        "No term of the objective outweighs all others.",
    ),
    Check(
        SUBSET_DIAGNOSTICS,
        "empty_class",
        "at most",
        _recorded("largest_empty_class", "pool members of the largest latent class left empty"),
        "No latent class of some size is lost.",
    ),
    Check(
        SUBSET_DIAGNOSTICS,
        "duplicates",
        "at most",
        _duplicates,
        "Few samples repeat an image that the subset has already.",
    ),
    Check(
        CHECKPOINTS, "loss", "at most", _loss, "The loss is finite and lower at the end than at the start."
    ),
    Check(
        CHECKPOINTS, "unseen", "at most", _unseen, "The training was given every sample that it should have."
    ),
    Check(SCORES, "above_chance", "at least", _above_chance, "No metric is below chance by more than noise."),
)
