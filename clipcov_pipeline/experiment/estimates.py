"""What an experiment will take: disk, and time at rates that are measured here."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.proxy.models import register_model_configs, resolve_device

ASSUMED_SAMPLE_BYTES = 25_000  # an image of img2dataset's 256 to 384 pixels with its caption and json


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


def time_finding(config: Config, seconds: Mapping[str, float], rates: Mapping[str, float]) -> list[Finding]:
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
