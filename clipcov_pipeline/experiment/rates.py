"""How fast this machine trains, embeds and reads, measured in a few seconds.

On a CPU one thread is timed by what it has worked, so that what else runs on the machine changes little:
several would wait for the slowest of them. What more threads bring is assumed (`SPEED_UP`).
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.experiment.findings import Finding
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.proxy.models import register_model_configs, resolve_device

JOB_SECONDS = 3.0  # for each of at most three models

READ_FIRST, READ_SAMPLES = 20, 200  # not counted, as they set things up; and counted

MOST_WAITING = 4  # times as long as what is worked, at most, do the measurements take

SPEED_UP = 0.7  # threads ** this: two are 1.6 times as fast as one, as a small model's are

LARGEST_BATCH = {"cpu": 256}  # a larger one is no faster a sample there, and may not fit
LARGEST_BATCH_ELSEWHERE = 1024

Clock = Callable[[], tuple[float, float]]  # wall seconds, seconds that this process's threads have worked


@dataclass(frozen=True)
class Job:
    """One model to be timed: so many threads on a CPU, in batches of so many samples."""

    name: str
    model: str
    device: str
    batch: int
    threads: int
    precision: str
    training: bool


def arms_side_by_side(config: Config) -> int:
    """How many arms are trained or scored at a time."""
    return config.automation.pools.get("gpu", 1)


def jobs(config: Config) -> list[Job]:
    """What is timed: the proxy's embedding, the training of an arm, and that of a proxy that differs."""
    cores, train, proxy = os.cpu_count() or 1, config.train, config.proxy
    share = max(1, cores // arms_side_by_side(config))
    found = [
        Job("embed", proxy.model, config.embed.device, config.embed.batch_size, cores, "fp32", False),
        Job("train", train.model, train.device, _of_one_gpu(train), share, train.precision, True),
    ]
    if (own := proxy.train) is not None:
        found.append(Job("proxy", proxy.model, own.device, _of_one_gpu(own), cores, own.precision, True))
    return found


def _of_one_gpu(settings: Training) -> int:
    return settings.batch_size // (settings.gpus * settings.accum_freq)


def measure_rates(
    config: Config, shards: Sequence[Shard] = (), seconds: float = JOB_SECONDS
) -> tuple[dict[str, float], list[Finding]]:
    """Time steps of each of the `jobs` on random pixels and tokens, and the reading of a local shard.

    Args:
        config: the experiment.
        shards: of its pool; where the first is local its first samples are read and decoded.
        seconds: for each model.

    Returns:
        ({"embed", "train", "proxy": samples a second, "read": samples a second of one core; those that could
        be measured}, a note for what could not).
    """
    rates, notes, known = {}, [], {}
    for job in jobs(config):
        step = replace(job, name="", threads=1)  # of a proxy like the arms' model it is timed once
        try:
            if step not in known:
                known[step] = _rate(step, seconds)
            rates[job.name] = known[step] * _speed_up(job)
        except Exception as error:  # any model, any driver: an estimate less, not a failure
            text = " ".join(str(error).split())[:200]
            notes.append(Finding("note", "time", f"{job.name}: {job.model} was not measured: {text}"))
    if shards and Path(shards[0].url).is_file() and (rate := _reading_rate(shards[0], config.train.model)):
        rates["read"] = rate
    return rates, notes


def _speed_up(job: Job) -> float:
    return job.threads**SPEED_UP if resolve_device(job.device) == "cpu" else 1.0


def _rate(job: Job, seconds: float) -> float:
    """Samples a second, of one thread on a CPU, in batches of the configured size or the largest that gives
    three steps in time."""
    import torch

    from clipcov_pipeline.training.launch import cpu_kernels

    place, before = resolve_device(job.device), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with cpu_kernels() if place == "cpu" and job.training else nullcontext():
            step = _step_of(job.model, place, job.precision, job.training)
            most = min(job.batch, LARGEST_BATCH.get(place, LARGEST_BATCH_ELSEWHERE))
            batch, took = steps_in_time(step, most, seconds, _clock if place == "cpu" else _wall_clock)
    finally:
        torch.set_num_threads(before)
    return batch / median(min(pair) for pair in took)


def steps_in_time(
    step: Callable[[int], None], most: int, seconds: float, clock: Clock
) -> tuple[int, list[tuple[float, float]]]:
    """Let the batch grow fourfold to ``most`` while three steps more are in time, then time steps of it.

    The first step of a size sets things up and is not counted, unless no other is in time.

    Returns:
        (the batch, what each counted step took by the clock: at least one).
    """
    started = clock()

    def timed(batch: int) -> tuple[float, float]:
        before = clock()
        step(batch)
        after = clock()
        return after[0] - before[0], after[1] - before[1]

    def cost(took: tuple[float, float]) -> float:
        # what was worked: on a busy machine the configured batch would not be reached in time by the wall
        return max(took[1], took[0] / MOST_WAITING)

    def left() -> float:
        wall, worked = clock()
        return seconds - cost((wall - started[0], worked - started[1]))

    batch = min(2, most)
    first = timed(batch)
    took = [timed(batch)] if left() > cost(first) else [first]
    while batch < most and left() > 3 * 4 * cost(took[-1]):
        batch = min(4 * batch, most)
        timed(batch)
        took = [timed(batch)]
    while left() > cost(took[-1]):
        took.append(timed(batch))
    return batch, took


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _wall_clock() -> tuple[float, float]:
    return time.perf_counter(), time.perf_counter()


def _step_of(model: str, place: str, precision: str, training: bool) -> Callable[[int], None]:
    """Build a model; return what takes one step of so many samples."""
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

    def step(batch: int) -> None:
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

    return step


def _reading_rate(shard: Shard, model: str) -> float | None:
    """Samples a second that one core reads, decodes and prepares; None where the shard holds no good ones."""
    import open_clip

    from clipcov_pipeline.pool.pixels import to_rgb
    from clipcov_pipeline.pool.samples import iter_samples

    prepare: Any = open_clip.image_transform(image_side(model), is_train=False)
    took, before = [], time.process_time()
    try:
        for sample in islice(iter_samples(shard, None), READ_FIRST + READ_SAMPLES):
            prepare(to_rgb(sample.image))
            now = time.process_time()
            took.append(now - before)
            before = now
    except Exception:  # the run will say which sample is damaged and how
        pass
    took = took[READ_FIRST:] or took
    return len(took) / sum(took) if took else None


def image_side(model: str) -> int:
    """Pixels of the longer side of what a model takes."""
    import open_clip

    register_model_configs()
    size = (open_clip.get_model_config(model) or {})["vision_cfg"]["image_size"]
    return max(size) if isinstance(size, list | tuple) else size


def start_seconds(module: str = "open_clip_train.main") -> float | None:
    """Processor seconds that a process takes to import what a training needs; None where it cannot."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [sys.executable, "-c", f"import {module}"]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        return None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
