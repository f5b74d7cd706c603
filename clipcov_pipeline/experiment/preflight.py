"""What can be told before anything long runs: whether batches can be filled, and all of ``clipcov check``."""

import math
import shutil
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.estimates import (
    ASSUMED_SAMPLE_BYTES,
    ArmSteps,
    Finding,
    disk_needed,
    measure_rates,
    time_finding,
    time_needed,
)
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.sizes import size_of
from clipcov_pipeline.experiment.world import (
    absent_sets,
    checkpoint_path,
    class_names,
    evaluation_source,
    is_path,
    pool_source,
    primary_sets,
)
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import key_and_suffix
from clipcov_pipeline.proxy.models import ModelSpec, check_model
from clipcov_pipeline.training.spec import TrainSpec, steps


def check_batches(project: Project, plan: Plan) -> None:
    """Compare batch sizes with the pool, as soon as all manifests are there.

    The held-out share is taken at its expectation; the training itself checks the exact number.

    Raises:
        InputError: the pool, or the smallest fraction of it, has fewer samples than one batch.
    """
    records = [step.record for step in plan.of("raw_shards")]
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
        _check("proxy.train.batch_size", config.proxy.train.batch_size, pool, "the pool")
    fraction = min(config.select.fractions)
    _check("train.batch_size", config.train.batch_size, int(pool * fraction), f"{fraction:g} of the pool")


def _check(key: str, batch_size: int, samples: int, what: str) -> None:
    if batch_size > samples:
        raise InputError(
            f"{key}: found {batch_size}, expected at most about {samples}, the samples in {what}: lower it,"
            " or give more data or larger fractions"
        )


@dataclass(frozen=True)
class Preflight:
    """What was found of an experiment; sizes in bytes, rates in samples a second, None where not known."""

    name: str
    findings: tuple[Finding, ...]
    samples: int | None
    arms: tuple[ArmSteps, ...]
    disk: Mapping[str, int]
    rates: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def can_run(self) -> bool:
        """Whether nothing is missing."""
        return all(finding.level != "missing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {"can_run": self.can_run, **asdict(self)}

    def to_text(self) -> str:
        """A line a finding, and the verdict."""
        wide = max(len(finding.subject) for finding in self.findings)
        lines = [f"{item.level:8} {item.subject:{wide}}  {item.text}" for item in self.findings]
        count = sum(finding.level == "missing" for finding in self.findings)
        verdict = f"cannot run yet, missing: {count}" if count else "can run"
        return "\n".join([*lines, "", f"{self.name}: {verdict}"])


def preflight(config: Config, *, measure: bool = True) -> Preflight:
    """Look at everything that an experiment needs, without running or downloading any of it.

    Args:
        config: a loaded experiment.
        measure: time some steps of the models on this machine (up to about 20 s).

    Raises:
        InputError: an unknown architecture or tag, unusable class names: mistakes in the YAML.
    """
    pool_findings, shards = _pool(config)
    samples, size_finding = _pool_size(config, shards)
    findings = [*pool_findings, *size_finding, *_weights(config), *_evaluation(config)]
    class_names(config)
    arms: list[ArmSteps] = []
    if samples is not None:
        arms, more = _arms(config, samples)
        findings += more
    disk: dict[str, int] = {}
    if samples is not None:
        disk = disk_needed(config, samples, _bytes_of(shards))
        findings.append(_disk(config, disk, assumed=not _bytes_of(shards)))
    rates: dict[str, float] = {}
    seconds: dict[str, float] = {}
    if measure:
        rates, problems = measure_rates(config)
        findings += problems
        if samples is not None:
            seconds = time_needed(config, samples, arms, rates)
            findings += time_finding(config, seconds, rates)
    return Preflight(config.name, tuple(findings), samples, tuple(arms), disk, rates, seconds)


def _pool(config: Config) -> tuple[list[Finding], list[Shard]]:
    from clipcov_pipeline.pool.listing import scan

    try:
        shards = scan(pool_source(config), dict(config.shards.storage_options))
    except InputError as error:
        return [Finding("missing", "pool", f"{error} (shards.source)")], []
    return [Finding("ok", "pool", f"{len(shards):,} shards in {config.shards.source}")], list(shards)


def _pool_size(config: Config, shards: Sequence[Shard]) -> tuple[int | None, list[Finding]]:
    expected, counted = config.shards.expected_samples, count_samples(shards)
    if counted is None:
        if expected is None:
            text = "not known: give shards.expected_samples to be told steps, disk and time"
            return None, [Finding("note", "pool size", text)]
        return expected, [Finding("note", "pool size", f"{expected:,} samples expected, none counted")]
    found, exact = counted
    text = f"{'' if exact else 'about '}{found:,} samples"
    if expected is not None and abs(found - expected) > 0.1 * expected:
        return found, [
            Finding("warning", "pool size", f"{text}, but shards.expected_samples is {expected:,}")
        ]
    return found, [Finding("ok", "pool size", text)]


def count_samples(shards: Sequence[Shard], seconds: float = 2.0) -> tuple[int, bool] | None:
    """Count the samples of local shards by their tars' headers, good or not.

    Returns:
        (samples, whether all shards were counted: after ``seconds`` the rest is taken to be as those by its
        size); None for remote or unreadable shards.
    """
    sizes = [_local_size(shard) for shard in shards]
    if not sizes or None in sizes:
        return None
    counted, read, deadline = 0, 0, time.monotonic() + seconds
    for index, shard in enumerate(shards):
        if index and time.monotonic() > deadline:
            return round(counted * sum(filter(None, sizes)) / max(read, 1)), False
        try:
            with tarfile.open(shard.url) as tar:
                counted += len({key for member in tar if (key := key_and_suffix(member)[0]) is not None})
        except (tarfile.TarError, OSError):
            pass  # quarantined by the run; its samples do not count
        read += sizes[index] or 0
    return counted, True


def _local_size(shard: Shard) -> int | None:
    path = Path(shard.url)
    return path.stat().st_size if path.is_file() else None


def _bytes_of(shards: Sequence[Shard]) -> int:
    return sum(_local_size(shard) or 0 for shard in shards)


def _weights(config: Config) -> list[Finding]:
    wanted = [
        ("proxy.pretrained", config.proxy.model, config.proxy.pretrained),
        ("proxy.early", config.proxy.model, config.proxy.early),
        ("train.pretrained", config.train.model, config.train.pretrained),
    ]
    for model in (config.proxy.model, config.train.model):
        check_model(ModelSpec(model))
    return [_weights_of(config, key, model, tag) for key, model, tag in wanted if tag]


def _weights_of(config: Config, key: str, model: str, pretrained: str) -> Finding:
    path = checkpoint_path(config, pretrained) or ""
    if Path(path).is_file():
        return Finding("ok", "weights", f"{key}: {path}")
    if is_path(pretrained):
        return Finding("missing", "weights", f"{key}: no checkpoint file at {path}: put it there")
    section, _, name = key.partition(".")
    try:
        check_model(ModelSpec(model, pretrained))
    except InputError as error:
        raise InputError(f"{section}.{str(error).replace('pretrained:', f'{name}:', 1)}") from error
    place = cached_weights(model, pretrained)
    if place is not None:
        return Finding("ok", "weights", f"{key}: {model} {pretrained} is in the cache")
    return Finding(
        "missing",
        "weights",
        f"{key}: {model} {pretrained} is not in this machine's cache: the first run downloads it from the"
        f" Hugging Face hub; offline, give {key} the path of a checkpoint",
    )


def _in_cache(repository: str, file: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return found if isinstance(found, str) else None


def cached_weights(model: str, tag: str) -> str | None:
    """Return where open_clip would find a tag's weights without a download; None where they are not."""
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    known = open_clip.get_pretrained_cfg(model, tag)
    if hub := known.get("hf_hub"):
        repository, _, file = hub.rpartition("/")
        names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        names = [str(Path(file).with_suffix(".safetensors")), file] if file else names
        return next((path for name in names if (path := _in_cache(repository, name))), None)
    path = Path("~/.cache/clip").expanduser() / Path(known.get("url", "")).name
    return str(path) if path.is_file() else None


def _evaluation(config: Config) -> list[Finding]:
    from clipcov_pipeline.experiment.evaluation_folders import list_folder
    from clipcov_pipeline.pool.listing import scan

    absent, present, findings = absent_sets(config), [], []
    needed = primary_sets(config)
    lost = all(name in absent for name in needed)
    for name, chosen in config.evaluate.sets.items():
        if name in absent:
            must = lost and name in needed
            rest = "the primary metric needs it" if must else "left out, in no average"
            text = f"{name}: no folder {absent[name]}: {rest}"
            findings.append(Finding("missing" if must else "warning", "evaluation", text))
            continue
        try:
            if chosen.benchmark is not None:
                list_folder(name, config.resolve(chosen.benchmark), chosen)
            else:
                scan(evaluation_source(config, name), dict(chosen.storage_options))
            present.append(name)
        except InputError as error:
            findings.append(Finding("missing", "evaluation", f"{name}: {error}"))
    if present:
        findings.insert(0, Finding("ok", "evaluation", f"present: {', '.join(present)}"))
    for name, suite in config.evaluate.suites.items():
        there = [member for member in suite.sets if member not in absent]
        if len(there) < len(suite.sets):
            text = f"{name}/{suite.metric} would be the mean of {len(there)} of its {len(suite.sets)} sets"
            text = text if there else f"{name}/{suite.metric} is not defined: no folder of its sets is there"
            findings.append(Finding("warning", "suite", text))
    return findings


def _arms(config: Config, samples: int) -> tuple[list[ArmSteps], list[Finding]]:
    pool = round(samples * (1 - config.evaluate.holdout_fraction))
    arms, findings = [], []
    seeds, methods = len(config.train.seeds), len(config.select.methods)
    for protocol in config.train.protocols:
        settings = config.train.under(protocol)
        for fraction, subsets in ((1.0, 1), *((f, methods) for f in config.select.fractions)):
            kept = int(pool * fraction + 0.5)
            label = "full pool" if fraction == 1 else f"{100 * fraction:g} %"
            try:
                arm = _arm(settings, label, protocol, kept, subsets * seeds)
            except InputError as error:
                findings.append(Finding("missing", "steps", f"{label}: {error}"))
                continue
            arms.append(arm)
            findings += _describe_arm(arm, settings)
    if config.proxy.train is not None:
        try:
            arm = _arm(config.proxy.train, "proxy", "", pool, 1)
            findings[:0] = _describe_arm(arm, config.proxy.train)
        except InputError as error:
            findings.insert(0, Finding("missing", "steps", f"proxy: {error}"))
    return arms, findings


def _arm(settings: Training, label: str, protocol: str, samples: int, trainings: int) -> ArmSteps:
    spec = TrainSpec(
        model="", train_data="", n_samples=samples, batch_size=settings.batch_size, lr=settings.lr,
        warmup=settings.warmup, log_dir="", name="", samples_seen=settings.samples_seen,
        epochs=settings.epochs, num_checkpoints=settings.num_checkpoints,
    )  # fmt: skip
    cut = steps(spec)
    if settings.epochs is not None:
        batches = settings.epochs * math.ceil(samples / settings.batch_size)
    else:
        batches = math.ceil((settings.samples_seen or 0) / settings.batch_size)
    return ArmSteps(label, protocol, trainings, samples, batches, cut.total_steps, settings.warmup)


def _describe_arm(arm: ArmSteps, settings: Training) -> list[Finding]:
    times = f", {arm.trainings} trainings" if arm.trainings > 1 else ""
    rounded = f" ({arm.batches:,} batches, rounded up by epoch)" if arm.steps != arm.batches else ""
    passes = arm.steps * settings.batch_size / arm.samples
    lines = [
        Finding(
            "ok",
            "steps",
            f"{arm.subset}: {arm.samples:,} samples, {arm.steps:,} steps{rounded} of {settings.batch_size:,},"
            f" {passes:.3g} passes{times}",
        )
    ]
    if arm.warmup >= arm.steps:
        text = (
            f"{arm.subset}: {arm.steps:,} steps{rounded} are fewer than the warm-up of {arm.warmup:,}: the"
            f" learning rate only reaches {100 * arm.steps / arm.warmup:.0f} % of train.lr and never falls"
        )
        lines.append(Finding("warning", "warm-up", text))
    elif arm.warmup > arm.steps / 2:
        text = f"{arm.subset}: the warm-up of {arm.warmup:,} takes {100 * arm.warmup / arm.steps:.0f} % of"
        lines.append(Finding("note", "warm-up", f"{text} its {arm.steps:,} steps"))
    return lines


def _disk(config: Config, disk: Mapping[str, int], *, assumed: bool) -> Finding:
    place = config.work
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, sum(disk.values())
    parts = ", ".join(f"{name} {_size(value)}" for name, value in disk.items())
    guess = f"; the pool taken as {ASSUMED_SAMPLE_BYTES // 1000} KB a sample" if assumed else ""
    text = f"about {_size(needed)} ({parts}{guess}), {_size(free)} free at {place}"
    if free > needed:
        return Finding("ok", "disk", text)
    there = size_of(config.work)  # some of it may be what is needed
    level = "warning" if free > needed - there else "missing"
    return Finding(level, "disk", f"{text}, {_size(there)} in {config.work} already")


def _size(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
