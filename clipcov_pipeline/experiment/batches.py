"""Whether batches can be filled, and in how many steps every arm is trained."""

import math
from dataclasses import dataclass

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.stages import RAW_SHARDS, SUBSETS
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.training.spec import steps_of


def check_batches(project: Project, plan: Plan) -> None:
    """Compare batch sizes with the pool, as soon as all manifests are there.

    The held-out share is taken at its expectation; the training itself checks the exact number.

    Raises:
        InputError: the pool, or the smallest fraction of it, has fewer samples than one batch.
    """
    records = [step.record for step in plan.of(RAW_SHARDS)]
    if not records or any(record is None for record in records):
        return
    usable = sum(record.stats["ok"] for record in records if record is not None)
    config = project.config
    pool = int(usable * (1 - config.evaluate.holdout_fraction))
    if pool == 0:
        raise InputError(
            f"shards.source: found {usable} usable samples in {len(records)} shards, expected some to choose"
            " from: look at the manifests' reasons (raw_shards)"
        )
    if config.proxy.train is not None:
        _check_fits("proxy.train.batch_size", config.proxy.train.batch_size, pool, "the pool")
    fraction = min(config.select.fractions)
    _check_fits(
        "train.batch_size", config.train.batch_size, int(pool * fraction), f"{fraction:g} of the pool"
    )


def _check_fits(key: str, batch_size: int, samples: int, what: str) -> None:
    if batch_size > samples:
        raise InputError(
            f"{key}: found {batch_size}, expected at most about {samples}, the samples in {what}: lower it,"
            " or give more data or larger fractions"
        )


def repeats_in_batches(most_alike: int, draws: int, batch_size: int) -> str:
    """Say where batches of a pass cannot all be free of repeated images and captions; "" where they can.

    most_alike: draws of a pass that have one image or caption in common; draws: of a pass.
    """
    batches = draws / batch_size
    if most_alike <= batches:
        return ""
    return (
        f"one image or caption comes {most_alike:,} times in a pass of {batches:.3g} batches, so some batches"
        " hold it twice, a false negative (counted as seen_repeated): lower train.batch_size"
    )


def repeats_findings(config: Config, store: Store) -> list[Finding]:
    """Return a warning for each subset in the store whose batches will hold repeats."""
    found = {}
    for arm in recipes(config):
        record, settings = store.current(SUBSETS, arm.subset), config.train.under(arm.protocol)
        if record is None or "most_alike" not in record.stats:
            continue
        stats = record.stats
        if text := repeats_in_batches(stats["most_alike"], stats["draws"], settings.batch_size):
            found[arm.subset, settings.batch_size] = Finding("warning", "batches", f"{arm.subset}: {text}")
    return list(found.values())


@dataclass(frozen=True)
class ArmSteps:
    """The training of one subset: how often it is trained, on how many samples, in how many steps.

    batches: without the rounding of epochs that lets several workers share the steps of each.
    """

    subset: str
    protocol: str
    trainings: int
    samples: int
    batches: int
    steps: int
    warmup: int


def step_findings(config: Config, samples: int) -> tuple[list[ArmSteps], list[Finding]]:
    """Return the steps of every arm on a pool of so many samples, and what is to be said of them.

    The arms of one fraction and length are one: methods and seeds do not change the steps. The proxy, where
    it is trained, is among the findings only.
    """
    pool = round(samples * (1 - config.evaluate.holdout_fraction))
    arms: list[ArmSteps] = []
    findings: list[Finding] = []
    if config.proxy.train is not None:
        findings += _steps(config.proxy.train, "proxy", "", pool, 1)[1]
    seeds, methods = len(config.train.seeds), len(config.select.methods)
    for protocol in config.train.protocols:
        settings = config.train.under(protocol)
        for fraction, subsets in ((1.0, 1), *((f, methods) for f in config.select.fractions)):
            label = "full pool" if fraction == 1 else f"{100 * fraction:g} %"
            found, said = _steps(settings, label, protocol, int(pool * fraction + 0.5), subsets * seeds)
            arms += found
            findings += said
    return arms, findings


def _steps(
    settings: Training, label: str, protocol: str, samples: int, trainings: int
) -> tuple[list[ArmSteps], list[Finding]]:
    try:
        steps = steps_of(settings, samples).total_steps
    except InputError as error:
        return [], [Finding("missing", "steps", f"{label}: {error}")]
    if settings.epochs is not None:
        batches = settings.epochs * math.ceil(samples / settings.batch_size)
    else:
        batches = math.ceil((settings.samples_seen or 0) / settings.batch_size)
    arm = ArmSteps(label, protocol, trainings, samples, batches, steps, settings.warmup)
    return [arm], _describe(arm, settings.batch_size)


def _describe(arm: ArmSteps, batch_size: int) -> list[Finding]:
    times = f", {arm.trainings} trainings" if arm.trainings > 1 else ""
    rounded = f" ({arm.batches:,} batches, rounded up by epoch)" if arm.steps != arm.batches else ""
    passes = arm.steps * batch_size / arm.samples
    text = f"{arm.samples:,} samples, {arm.steps:,} steps{rounded} of {batch_size:,}, {passes:.3g} passes"
    found = [Finding("ok", "steps", f"{arm.subset}: {text}{times}")]
    if arm.warmup >= arm.steps:
        text = (
            f"{arm.subset}: {arm.steps:,} steps{rounded} are fewer than the warm-up of {arm.warmup:,}: the"
            f" learning rate only reaches {100 * arm.steps / arm.warmup:.0f} % of train.lr and never falls"
        )
        found.append(Finding("warning", "warm-up", text))
    elif arm.warmup > arm.steps / 2:
        text = f"{arm.subset}: the warm-up of {arm.warmup:,} takes {100 * arm.warmup / arm.steps:.0f} % of"
        found.append(Finding("note", "warm-up", f"{text} its {arm.steps:,} steps"))
    return found
