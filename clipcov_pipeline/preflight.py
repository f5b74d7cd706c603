"""What can be told before anything long runs: whether batches can be filled, and all of ``clipcov check``."""

import math
import shutil
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clipcov_pipeline.config import Config, Training
from clipcov_pipeline.embed import ModelSpec, check_model, register_model_configs, resolve_device
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.gc import size_of
from clipcov_pipeline.plan import (
    Plan,
    absent_sets,
    checkpoint_path,
    class_names,
    evaluation_source,
    is_path,
    pool_source,
    primary_sets,
    recipes,
)
from clipcov_pipeline.project import Project
from clipcov_pipeline.shards import Shard, key_and_suffix
from clipcov_pipeline.train import TrainSpec, steps

ASSUMED_SAMPLE_BYTES = 25_000  # an image of img2dataset's 256 to 384 pixels with its caption and json


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


# ---------------------------------------------------------------- what an experiment takes


@dataclass(frozen=True)
class Finding:
    """One line of the preflight. ``missing`` keeps the experiment from running; the others do not."""

    level: Literal["ok", "note", "warning", "missing"]
    subject: str
    text: str


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
            findings += _time(config, seconds, rates)
    return Preflight(config.name, tuple(findings), samples, tuple(arms), disk, rates, seconds)


def _pool(config: Config) -> tuple[list[Finding], list[Shard]]:
    from clipcov_pipeline.shards import scan

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


# --- weights and evaluation sets


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
    from clipcov_pipeline.benchmark_folders import list_folder
    from clipcov_pipeline.shards import scan

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


# --- steps


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


# --- disk and time


def disk_needed(config: Config, samples: int, pool_bytes: int) -> dict[str, int]:
    """Estimate what the work folder will hold, in bytes: embeddings, subsets' shards, checkpoints.

    Args:
        config: the experiment.
        samples: of the pool.
        pool_bytes: size of its shards; 0 where it is not known: `ASSUMED_SAMPLE_BYTES` a sample.
    """
    pool = pool_bytes or samples * ASSUMED_SAMPLE_BYTES
    kept = (1 - config.evaluate.holdout_fraction) * (
        1 + len(config.select.methods) * sum(config.select.fractions)
    )
    proxy, trained = model_size(config.proxy.model), model_size(config.train.model)
    rows = samples * (2 * 2 * proxy.embed_dim + 200)  # two fp16 vectors, uid, key and caption
    # weights in fp32, of an arm in the store and in MLflow's registry; the one in training also holds the
    # optimiser's two moments
    arms = len(recipes(config))
    return {
        "embeddings": rows,
        "subsets": round(pool * kept),
        "checkpoints": 4 * (2 * arms * trained.parameters + 3 * trained.parameters + proxy.parameters),
    }


class ModelSize(NamedTuple):
    """Parameters and width of the shared space of an architecture."""

    parameters: int
    embed_dim: int


@lru_cache
def model_size(model: str) -> ModelSize:
    """Build an architecture without memory for its weights, and count."""
    import open_clip
    import torch

    register_model_configs()
    with torch.device("meta"):
        built = open_clip.create_model(model, device="meta")
    parameters = sum(weights.numel() for weights in built.parameters())
    return ModelSize(parameters, (open_clip.get_model_config(model) or {})["embed_dim"])


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


def measure_rates(config: Config, seconds: float = 5.0) -> tuple[dict[str, float], list[Finding]]:
    """Time some training steps of the arms' model (and of a proxy that is trained) and the proxy's embedding.

    Random pixels and tokens in memory: reading and decoding are not in it.

    Returns:
        ({"train", "embed", "proxy": samples a second}, a note for what could not be measured).
    """
    rates, notes = {}, []
    jobs: list[tuple[str, str, str, bool]] = [
        ("embed", config.proxy.model, config.embed.device, False),
        ("train", config.train.model, config.train.device, True),
    ]
    if config.proxy.train is not None and config.proxy.model != config.train.model:
        jobs.append(("proxy", config.proxy.model, config.proxy.train.device, True))
    for name, model, device, training in jobs:
        try:
            rates[name] = _rate(model, device, config.train.precision, training, seconds)
        except Exception as error:  # any model, any driver: an estimate less, not a failure
            text = " ".join(str(error).split())[:200]
            notes.append(Finding("note", "time", f"{name}: {model} was not measured: {text}"))
    if "train" in rates and config.proxy.train is not None:
        rates.setdefault("proxy", rates["train"])
    return rates, notes


def _rate(model: str, device: str, precision: str, training: bool, seconds: float) -> float:
    """Samples a second; the batch grows from 2 as long as a step stays under half a second."""
    import open_clip
    import torch

    register_model_configs()
    place = resolve_device(device)
    built: Any = open_clip.create_model(model, device=place)
    built.train(training)
    size, length = built.visual.image_size, built.context_length
    height, width = size if isinstance(size, tuple) else (size, size)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-6) if training else None
    loss_of = open_clip.ClipLoss()
    half = place != "cpu" and (precision != "fp32" or not training)

    def step(batch: int) -> float:
        started = time.perf_counter()
        images = torch.rand(batch, 3, height, width, device=place)
        texts = torch.randint(1, 400, (batch, length), device=place)
        with torch.set_grad_enabled(training), torch.autocast(place, enabled=half):
            images, texts, scale = built(images, texts)[:3]
            loss = loss_of(images, texts, scale)
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        return time.perf_counter() - started

    deadline, batch = time.perf_counter() + seconds, 2
    best = batch / step(batch)  # the first step also sets things up: too low, unless no other is in time
    while time.perf_counter() < deadline:
        took = step(batch)
        best = max(best, batch / took)
        if took < 0.5 and batch < 256:
            batch *= 2
    return best


def time_needed(
    config: Config, samples: int, arms: Sequence[ArmSteps], rates: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of the parts that take longest, at measured rates; parts without a rate are left out."""
    seconds = {}
    if "embed" in rates:
        seconds["embeddings"] = samples / rates["embed"]
    if config.proxy.train is not None and "proxy" in rates:
        seen = config.proxy.train.samples_seen or (config.proxy.train.epochs or 0) * samples
        rate = rates["proxy"] * config.proxy.train.gpus / _work(config.proxy.train)
        seconds["proxy"] = seen / rate
    if "train" in rates:
        rate = rates["train"] * config.train.gpus / _work(config.train)
        seconds["checkpoints"] = sum(
            arm.trainings * arm.steps * config.train.batch_size / rate for arm in arms
        )
    return seconds


def _work(settings: Training) -> float:
    """Work of a step beside one that does nothing twice: a further forward pass is about a third of it."""
    return 1 + ((settings.accum_freq > 1) + settings.grad_checkpointing) / 3


def _time(config: Config, seconds: Mapping[str, float], rates: Mapping[str, float]) -> list[Finding]:
    if not seconds:
        return []
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    measured = ", ".join(f"{name} {_number(rate)}" for name, rate in rates.items())
    gpus = f" x {config.train.gpus} GPUs" if config.train.gpus > 1 else ""
    text = f"about {_duration(sum(seconds.values()))} ({parts}); measured here, samples/s: {measured}{gpus},"
    return [Finding("note", "time", f"{text} without reading and decoding")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
