"""Seconds and memory of the diagnostics of one subset, plots included, on synthetic embeddings."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.bench.synthetic import synthetic_blocks, synthetic_classes
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import Blocks
from clipcov_pipeline.selection.measure import Phases
from clipcov_pipeline.selection.parallel import thread_count
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import rank


def bench_diagnostics(
    pairs: int,
    classes: int,
    dim: int,
    *,
    fraction: float = 0.1,
    draws: int = 10,
    seed: int = 0,
    threads: int | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure the diagnostics of ClipCov's subset of a synthetic pool; removes everything it writes.

    Args:
        pairs, classes, dim: size of the pool.
        fraction: of it that is kept; draws: random subsets beside it.
        folder: where the pool's rows go (``4 * pairs * dim`` bytes); the system's temporary folder when None.

    Returns:
        JSON-able: settings, seconds, cpu_seconds and anonymous_gb of diagnosing and of plotting, load.

    Raises:
        InputError: the disk has not the room.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    need, free = 4 * pairs * dim, shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"scratch folder {folder}: found {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB for"
            f" {pairs:,} pairs; choose another with --scratch-dir, or fewer pairs"
        )
    room = Path(tempfile.mkdtemp(prefix="clipcov-bench-", dir=folder))
    try:
        pool = _pool(pairs, classes, dim, seed, room)
        rows = rank(pool, method="clipcov", budget=fraction, threads=threads).rows
        before, phases = os.getloadavg()[0], Phases()
        _measure(phases, pool, rows, draws, seed, threads, room)
        pool.close()
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return {
        "settings": {"pairs": pairs, "classes": classes, "dim": dim, "fraction": fraction, "draws": draws},
        "threads": thread_count(threads),
        "load": [round(load, 2) for load in (before, os.getloadavg()[0])],
        "seconds": phases.seconds,
        "cpu_seconds": phases.cpu_seconds,
        "anonymous_gb": {name: size / 1e9 for name, size in phases.anonymous_bytes.items()},
    }


def _measure(
    phases: Phases, pool: Pool, rows: np.ndarray, draws: int, seed: int, threads: int | None, room: Path
) -> None:
    from clipcov_pipeline.subsets import plots
    from clipcov_pipeline.subsets.diagnosis import diagnose

    with phases("numbers"):
        found = diagnose(pool, rows, draws=draws, seed=seed, threads=threads)
    with phases("plots"):
        plots.plot_all(found, room)


def _pool(pairs: int, classes: int, dim: int, seed: int, room: Path) -> Pool:
    of_class = synthetic_classes(pairs, classes, seed)
    similarity = np.empty(pairs, np.float32)

    def blocks() -> Blocks:
        return _numbered(synthetic_blocks(of_class, dim, seed), similarity)

    # one image in ten comes twice, and every caption ten times
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray | None] = {
        "image_hash": rng.integers(0, 5 * pairs, pairs),
        "caption_hash": rng.integers(0, max(pairs // 10, 1), pairs),
    }
    return Pool.from_blocks(blocks(), dim, np.float16, of_class, similarity, columns, scratch_dir=room)


def _numbered(
    blocks: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], similarity: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks with their rows' numbers; fill in the label similarities."""
    at = 0
    for image, text, label in blocks:
        rows = np.arange(at, at + len(image))
        similarity[rows] = label
        yield rows, image, text
        at += len(image)


def as_text(found: dict[str, Any]) -> str:
    """Return the measurements as a plain-text table."""
    settings = found["settings"]
    head = (
        f"{settings['pairs']:,} pairs, d={settings['dim']}, {settings['classes']:,} classes,"
        f" {settings['fraction']:.0%} kept, {settings['draws']} random subsets, {found['threads']} threads"
    )
    lines = [head, f"{'':10} {'seconds':>9} {'CPU s':>9} {'anon GB':>8}"]
    for name, seconds in found["seconds"].items():
        cpu, memory = found["cpu_seconds"][name], found["anonymous_gb"][name]
        lines.append(f"{name:10} {seconds:>9.1f} {cpu:>9.1f} {memory:>8.2f}")
    lines.append(f"load average {found['load'][0]:.1f} before, {found['load'][1]:.1f} after")
    return "\n".join(lines)
