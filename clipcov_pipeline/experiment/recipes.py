"""The experiment's arms and subsets, and the names of their partitions."""

from collections.abc import Container
from typing import NamedTuple

from clipcov_pipeline.experiment.config.base import FULL, HOLDOUT
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Protocol
from clipcov_pipeline.selection import validate_method
from clipcov_pipeline.selection.methods import DEFAULT_WEIGHTS


def subset_key(method: str, fraction: float) -> str:
    """Return the partition of a subset: ``METHOD-fFRACTION``."""
    return f"{method}-f{fraction:g}"


def recipe_key(method: str, fraction: float, seed: int) -> str:
    """Return the partition of a trained arm: ``METHOD-fFRACTION-sSEED``."""
    return f"{subset_key(method, fraction)}-s{seed}"


class Recipe(NamedTuple):
    """One arm: a method, the fraction of the pool that it keeps, the seed and length of its training."""

    method: str
    fraction: float
    seed: int
    protocol: Protocol = "samples_seen"
    suffix: str = ""
    """Ends the partition's name where the experiment has arms of both protocols."""

    @property
    def key(self) -> str:
        """The arm's partition."""
        return recipe_key(self.method, self.fraction, self.seed) + self.suffix

    @property
    def subset(self) -> str:
        """The partition of the subset that it trains on."""
        return subset_key(self.method, self.fraction)


def recipes(config: Config) -> list[Recipe]:
    """Return every arm of the experiment, the full pool first.

    The first protocol's arms are named as they are where it is the only one, so that giving the other one
    as well trains nothing again.
    """
    arms = [(FULL, 1.0), *((m, f) for m in config.select.methods for f in config.select.fractions)]
    first = config.train.protocols[0]
    return [
        Recipe(method, fraction, seed, protocol, "" if protocol == first else f"-{protocol}")
        for protocol in config.train.protocols
        for method, fraction in arms
        for seed in config.train.seeds
    ]


def method_names(config: Config) -> dict[str, str]:
    """Return the method behind each label of ``select.methods``."""
    return {label: config.select.method_of(label)[0] for label in config.select.methods}


def evaluation_sets(config: Config, absent: Container[str] = ()) -> list[str]:
    """Return the names of the sets that every arm is scored on: all but those that are absent."""
    return [name for name in config.evaluate.tasks if name not in absent]


def gallery_set(config: Config) -> str | None:
    """Return the set of pairs that checkpoint galleries look at: the primary metric's, else the first one."""
    pairs = [name for name, one in config.evaluate.sets.items() if one.shards is not None]
    pairs += [HOLDOUT] if config.evaluate.holdout_fraction else []
    primary = config.evaluate.primary_metric.partition("/")[0]
    return primary if primary in pairs else next(iter(pairs), None)


def objective_weights(config: Config, label: str) -> dict[str, float]:
    """Return the weights of F's terms that a method works with; the default ones where it has no F."""
    settings = validate_method(*config.select.method_of(label))
    return dict(settings.get("weights", DEFAULT_WEIGHTS))
