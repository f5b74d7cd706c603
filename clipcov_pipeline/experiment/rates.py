"""How fast this machine trains and embeds, and how long an experiment takes at that."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipcov_pipeline.experiment.batches import ArmSteps
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.proxy.models import register_model_configs, resolve_device


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
    step = _step_of(model, resolve_device(device), precision, training)
    deadline, batch = time.perf_counter() + seconds, 2
    best = batch / step(batch)  # the first step also sets things up: too low, unless no other is in time
    while time.perf_counter() < deadline:
        took = step(batch)
        best = max(best, batch / took)
        if took < 0.5 and batch < 256:
            batch *= 2
    return best


def _step_of(model: str, place: str, precision: str, training: bool) -> Callable[[int], float]:
    """Build a model; return what takes one step of so many samples and says its seconds."""
    import open_clip
    import torch

    register_model_configs()
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

    return step


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
    """Return one finding: the seconds of the parts, and the rates that they are told from."""
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
