"""How long an experiment will take, stage by stage: recorded where the store knows, measured, or assumed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from clipcov_pipeline.experiment.batches import ArmSteps
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.experiment.graph import Node
from clipcov_pipeline.experiment.plan import Plan, Status
from clipcov_pipeline.experiment.rates import arms_side_by_side, image_side
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import (
    CHECKPOINT_GALLERIES,
    CHECKPOINTS,
    EARLY_SIMILARITIES,
    EMBEDDINGS,
    LEADERBOARD,
    POOL_MAP,
    PROXY_MODEL,
    PSEUDO_LABELS,
    RANKINGS,
    RAW_SHARDS,
    REPORT,
    SAMPLE_INDEX,
    SCORES,
    SIDE_BY_SIDE,
    STAGES,
    SUBSET_DIAGNOSTICS,
    SUBSET_GALLERIES,
    SUBSETS,
)
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.world import World
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.proxy.models import resolve_device
from clipcov_pipeline.training.samples import KEPT_BYTES
from clipcov_pipeline.training.spec import EVALUATIONS

Basis = Literal["recorded", "measured", "assumed"]

# seconds of an entry, and of it for each 1,000 samples of the pool: a run of the bundled sample on two cores
ASSUMED: Mapping[str, tuple[float, float]] = {
    PSEUDO_LABELS: (1.0, 0.12),
    SAMPLE_INDEX: (0.1, 0.005),
    RANKINGS: (2.0, 0.05),
    SUBSETS: (0.1, 0.002),
    SUBSET_DIAGNOSTICS: (1.5, 0.05),
    SUBSET_GALLERIES: (0.5, 0.0),
    SCORES: (2.3, 0.0),
    LEADERBOARD: (2.0, 0.0),
    CHECKPOINT_GALLERIES: (0.4, 0.0),
    REPORT: (2.0, 0.0),
}
MAP_SECONDS = (1.0, 4.0)  # of the t-SNE, and for each 1,000 samples in it
PART_SECONDS = 0.1  # of a part of an entry that only compares others, as `subset_diagnostics/X@overlap`
TRAINING_SECONDS = 5.0  # of a training beside its steps: its process, checkpoints, MLflow
STAGE_SECONDS = 0.7  # of a stage beside its entries
START_SECONDS = 8.0  # of a process that imports torch and open_clip, where it was not measured
STAND_IN_SHARD = 10_000  # samples, of a pool that is not there yet


@dataclass(frozen=True)
class Part:
    """The seconds of a stage's entries that are to be built; ``starts`` is no stage: processes, and runs."""

    stage: str
    entries: int
    seconds: float
    basis: Basis


@dataclass(frozen=True)
class Known:
    """What the seconds are told from: samples and shards of the pool, `rates.measure_rates`, arms' steps."""

    config: Config
    samples: int
    shards: int
    rates: Mapping[str, float]
    arms: Sequence[ArmSteps]
    recorded: Mapping[tuple[str, str], Sequence[Record]]

    @property
    def pixel_bytes(self) -> int:
        """Of a decoded sample as the model takes it."""
        side = image_side(self.config.train.model)
        return 3 * side * side


def stand_in(config: Config, samples: int) -> World:
    """A world for a pool or evaluation sets that are not there yet."""
    count = -(-samples // STAND_IN_SHARD)
    shards = tuple(Shard(f"{number:05d}", f"{number:05d}.tar", "") for number in range(count))
    return World(shards, dict.fromkeys(config.evaluate.sets, ()), {})


def time_needed(
    config: Config,
    plan: Plan,
    store: Store,
    samples: int,
    arms: Sequence[ArmSteps],
    rates: Mapping[str, float],
    start: float | None = None,
) -> list[Part]:
    """Seconds of every stage with something to build; what is built already, or only put back, takes none.

    Args:
        config: the experiment.
        plan: what is to be built; what only may have to be is taken to be.
        store: its records say how long entries have taken here.
        samples: of the pool.
        arms: as `batches.step_findings`.
        rates: as `rates.measure_rates`.
        start: seconds of a process's start.
    """
    known = Known(config, samples, len(plan.of(RAW_SHARDS)), rates, arms, _recorded(plan, store))
    parts = []
    for stage in STAGES:
        nodes = [s.node for s in plan.of(stage) if s.status not in (Status.CURRENT, Status.RESTORE)]
        found = [told for node in nodes if (told := _entry(known, node)) is not None]
        if found:
            seconds = _side_by_side(config, stage, [value for value, _ in found])
            parts.append(Part(stage, len(found), seconds, _weakest([basis for _, basis in found])))
    if not parts:
        return []
    count = _starts(config, {part.stage for part in parts})
    took = count * (start or START_SECONDS) + STAGE_SECONDS * len(parts)
    return [*parts, Part("starts", count, took, "measured" if start else "assumed")]


def _recorded(plan: Plan, store: Store) -> dict[tuple[str, str], list[Record]]:
    """Records that stand in the store, out of date or not, by stage and kind of entry."""
    found: dict[tuple[str, str], list[Record]] = {}
    for step in plan.steps:
        if (record := store.current(step.node.stage, step.node.partition)) is not None and record.seconds:
            found.setdefault(_kind(step.node), []).append(record)
    return found


def _kind(node: Node) -> tuple[str, str]:
    """A stage, and which part of an arm's or subset's entry: an evaluation set, the overlap."""
    return node.stage, node.partition.partition("@")[2]


def _entry(known: Known, node: Node) -> tuple[float, Basis] | None:
    """Seconds of one entry, and what they are told from; None where nothing tells."""
    records = [record for record in known.recorded.get(_kind(node), ()) if _is_alike(node, record)]
    if node.stage == CHECKPOINTS:
        return _training_of_an_arm(known, node, records)
    if node.stage == PROXY_MODEL:
        return _training_of_the_proxy(known, records)
    if records:
        return median(record.seconds for record in records), "recorded"
    if node.stage in (RAW_SHARDS, EMBEDDINGS, EARLY_SIMILARITIES):
        seconds = _of_samples(known, node.stage)
        return None if seconds is None else (seconds / known.shards, "measured")
    return _assumed(known, node), "assumed"


def _is_alike(node: Node, record: Record) -> bool:
    """Whether a record tells of such an entry: a training of another model or batch does not."""
    same = ("model", "batch_size", "precision", "workers", "accum_freq")
    for section in ("train", "proxy"):
        now, then = node.params.get(section, {}), record.params.get(section, {})
        now, then = {**now, **(now.get("train") or {})}, {**then, **(then.get("train") or {})}
        if any(now.get(key) != then.get(key) for key in same):
            return False
    return True


def _assumed(known: Known, node: Node) -> float:
    if node.stage == SUBSET_DIAGNOSTICS and _kind(node)[1]:
        return PART_SECONDS
    if node.stage == POOL_MAP:
        drawn = min(known.samples, known.config.diagnostics.tsne_samples)
        return MAP_SECONDS[0] + MAP_SECONDS[1] * drawn / 1000
    fixed, growing = ASSUMED[node.stage]
    return fixed + growing * known.samples / 1000


def _of_samples(known: Known, stage: str) -> float | None:
    """Seconds of a stage that goes once through the whole pool."""
    reading = known.samples / known.rates["read"] if "read" in known.rates else 0.0
    if stage == RAW_SHARDS:
        return reading or None
    if "embed" not in known.rates:
        return None
    return _together(known.config.embed.device, known.samples / known.rates["embed"], reading, 1)


def _together(device: str, computing: float, reading: float, workers: int) -> float:
    """Reading beside a GPU hides behind it; on a CPU both need the cores."""
    if resolve_device(device) == "cpu":
        return computing + reading
    return max(computing, reading / max(1, workers))


def _training_of_an_arm(known: Known, node: Node, records: Sequence[Record]) -> tuple[float, Basis] | None:
    config = known.config
    recipe = next(recipe for recipe in recipes(config) if recipe.key == node.partition)
    settings = config.train.under(recipe.protocol)
    label = "full pool" if recipe.fraction == 1 else f"{100 * recipe.fraction:g} %"
    arm = next((a for a in known.arms if (a.subset, a.protocol) == (label, recipe.protocol)), None)
    if arm is None:
        return None
    seen = arm.steps * settings.batch_size
    timed = [record for record in records if record.stats.get("training_seconds")]
    if timed:
        each = median(r.stats["training_seconds"] / r.stats["samples_seen"] for r in timed)
        return seen * each + median(r.seconds - r.stats["training_seconds"] for r in timed), "recorded"
    if "train" not in known.rates:
        return None
    beside = _held_out(known, settings) + TRAINING_SECONDS
    return _training(known, settings, "train", seen, arm.samples) * _crowded(config) + beside, "measured"


def _training_of_the_proxy(known: Known, records: Sequence[Record]) -> tuple[float, Basis] | None:
    settings = known.config.proxy.train
    if settings is None:
        return 1.0, "assumed"
    pool = known.samples * (1 - known.config.evaluate.holdout_fraction)
    seen = settings.samples_seen or (settings.epochs or 0) * pool
    timed = [record for record in records if record.stats.get("samples_seen")]
    if timed:
        return seen * median(r.seconds / r.stats["samples_seen"] for r in timed), "recorded"
    if "proxy" not in known.rates:
        return None
    return _training(known, settings, "proxy", seen, pool) + TRAINING_SECONDS, "measured"


def _training(known: Known, settings: Training, rate: str, seen: float, samples: float) -> float:
    """Seconds of a training's steps; the loader keeps the decoded samples of a small subset."""
    computing = seen * _work(settings) / (known.rates[rate] * settings.gpus)
    read = min(seen, samples) if samples * known.pixel_bytes <= KEPT_BYTES else seen
    reading = read / known.rates["read"] if "read" in known.rates else 0.0
    return _together(settings.device, computing, reading, settings.workers * settings.gpus)


def _work(settings: Training) -> float:
    """Work of a step beside one that does nothing twice: a further forward pass is about a third of it."""
    return 1 + ((settings.accum_freq > 1) + settings.grad_checkpointing) / 3


def _held_out(known: Known, settings: Training) -> float:
    """Seconds of a training's evaluations on the held-out pairs."""
    pairs = known.samples * known.config.evaluate.holdout_fraction
    return min(settings.parts, EVALUATIONS) * pairs / known.rates["embed"] if "embed" in known.rates else 0.0


def _crowded(config: Config) -> float:
    """How many arms side by side share what one was measured on: a core, or a GPU."""
    if resolve_device(config.train.device) == "cpu":
        there = os.cpu_count() or 1
    else:
        import torch

        there = max(1, torch.cuda.device_count())
    return max(1.0, arms_side_by_side(config) * config.train.gpus / there)


def _side_by_side(config: Config, stage: str, seconds: Sequence[float]) -> float:
    """Of the shares that arms are dealt out to, in turns, the longest."""
    places = arms_side_by_side(config) if stage in SIDE_BY_SIDE else 1
    return max(sum(seconds[place::places]) for place in range(places))


def _starts(config: Config, stages: set[str]) -> int:
    """Processes that are waited for: the run's own, imports of torch, trainings, and arms side by side."""
    several = arms_side_by_side(config) > 1
    trained = PROXY_MODEL in stages and config.proxy.train is not None
    waits = [EMBEDDINGS in stages, trained, CHECKPOINTS in stages]
    waits += [several and stage in stages for stage in SIDE_BY_SIDE]
    return 1 + sum(waits)


def _weakest(found: Sequence[Basis]) -> Basis:
    order: tuple[Basis, ...] = ("assumed", "measured", "recorded")
    return next(basis for basis in order if basis in found)


def time_finding(config: Config, parts: Sequence[Part], rates: Mapping[str, float]) -> list[Finding]:
    """Return the sum as one finding and each part as one, the longest first, with what it is told from."""
    if not parts:
        return [Finding("ok", "time", "nothing is to be built")]
    total = sum(part.seconds for part in parts)
    measured = ", ".join(f"{name} {_number(rate)}" for name, rate in rates.items())
    places = arms_side_by_side(config)
    beside = f", {places} arms side by side" if places > 1 else ""
    read = "" if "read" in rates else " without reading and decoding,"
    text = (
        f"about {in_words(total)}{beside}, where nothing else runs on this machine;{read} samples/s measured"
        f" here: {measured or 'nothing'}"
    )
    longest = sorted(parts, key=lambda part: -part.seconds)
    shown = [part for part in longest if part.seconds >= total / 100]
    rest = sum(part.seconds for part in longest[len(shown) :])
    lines = [Finding("note", "time", text)]
    said = [f"  {part.stage} x {part.entries}: {in_words(part.seconds)}, {part.basis}" for part in shown]
    lines += [Finding("note", "time", one) for one in said]
    return [*lines, *([Finding("note", "time", f"  the others: {in_words(rest)}")] if rest else [])]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def in_words(seconds: float) -> str:
    """A duration in the unit that gives at least two of it."""
    units: tuple[tuple[str, int], ...] = (("days", 86_400), ("h", 3600), ("min", 60))
    for unit, length in units:
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
