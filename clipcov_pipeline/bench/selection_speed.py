"""Speed of the selection on synthetic embeddings, beside what bounds it and what else there is."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from clipcov_pipeline.bench.measuring import Bench, Say, drop_cached, fresh_pool
from clipcov_pipeline.bench.peers import compare_peers
from clipcov_pipeline.bench.synthetic import synthetic_arrays, synthetic_blocks, synthetic_classes
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import check_similarity
from clipcov_pipeline.selection.measure import Phases
from clipcov_pipeline.selection.parallel import thread_count
from clipcov_pipeline.selection.pool import Pool
from clipcov_pipeline.selection.ranking import rank

# classes of 1,000 pairs, and of 3,000 as CC3M has in ImageNet's 1,000: the notebook's cost goes with that
NOTEBOOK_PAIRS, NOTEBOOK_CLASSES = 100_000, (100, 33)

_FRACTION = 0.1

_READ_BYTES = 16 << 20


def needed_bytes(pairs: int, dim: int, lance: bool) -> int:
    """Disk the benchmark takes: the sorted rows, with a LanceDB table twice more, and the notebook's
    matrices."""
    rows = pairs * dim * 4
    return rows * (3 if lance else 1) + (4 << 30)


@dataclass(frozen=True)
class Size:
    """The synthetic pool."""

    pairs: int
    classes: int
    dim: int
    seed: int = 0


class Also(TypedDict, total=False):
    """What else is measured.

    lance: from a LanceDB table of the pool to parquet. notebook: the authors' route, with its matrices, at
    ``NOTEBOOK_PAIRS``. peers: apricot and submodlib on one class, where they are installed.
    """

    lance: bool
    notebook: bool
    peers: bool


def run_benchmark(
    size: Size,
    *,
    repeat: int = 3,
    threads: int | None = None,
    folder: Path | None = None,
    say: Say = lambda _line: None,
    **also: Unpack[Also],
) -> dict[str, Any]:
    """Measure the selection, and remove everything written.

    Args:
        size: of the synthetic pool.
        repeat: runs a measurement is the median of.
        folder: where scratch files go; the system's temporary folder when None.
        say: called with a line after each measurement.
        **also: `Also`; by default the authors' route.

    Returns:
        JSON-able: settings, machine, rows, exponents, notebook and peers comparisons.

    Raises:
        InputError: the disk has not the room.
    """
    room = _room(size, folder, also.get("lance", False))
    try:
        bench = Bench(room, repeat, threads, say)
        machine: dict[str, Any] = {"threads": thread_count(threads), "load_before": os.getloadavg()}
        found = {"settings": {**asdict(size), "repeat": repeat}, "machine": machine}
        found |= _measured(bench, size, also)
        machine["load_after"] = os.getloadavg()
        return {**found, "rows": bench.rows}
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _room(size: Size, folder: Path | None, lance: bool) -> Path:
    """A new scratch folder."""
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    need, free = needed_bytes(size.pairs, size.dim, lance), shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"scratch folder {folder}: found {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB for "
            f"{size.pairs:,} pairs; choose another with --scratch-dir, or fewer pairs"
        )
    return Path(tempfile.mkdtemp(prefix="clipcov-bench-", dir=folder))


def _measured(bench: Bench, size: Size, also: Also) -> dict[str, Any]:
    _warm_up(bench, size.dim)
    pool = _synthetic_pool(bench, size.pairs, size.classes, size.dim, size.seed)
    _floors(bench, pool, pool.pairs.nbytes / 1e9)
    _engine(bench, pool)
    found: dict[str, Any] = {"exponent": _scaling(bench, pool)}
    _labels(bench, pool, size.classes)
    if also.get("lance", False):
        _from_table(bench, pool)
    pool.close()
    if also.get("notebook", True):
        found["notebook"] = [_notebook(bench, classes, size.dim, size.seed) for classes in NOTEBOOK_CLASSES]
    if also.get("peers", False):
        found["peers"] = compare_peers(bench, size.dim, size.seed)
    return found


def _warm_up(bench: Bench, dim: int) -> None:
    began = time.perf_counter()
    image, text, labels, similarity = synthetic_arrays(2000, 4, dim)
    pool = Pool.from_arrays(image, text, labels, similarity)
    for mode in ("greedy", "notebook"):
        rank(pool, budget=0.5, mode=mode)
    bench.add(
        "load compiled code", 2000, time.perf_counter() - began, note="numba: compiled once, then cached"
    )


def _synthetic_pool(bench: Bench, pairs: int, classes: int, dim: int, seed: int) -> Pool:
    latent_class = synthetic_classes(pairs, classes, seed)
    similarity = np.empty(pairs, np.float32)

    def blocks() -> Any:
        at = 0
        for image, text, label in synthetic_blocks(latent_class, dim, seed):
            rows = np.arange(at, at + len(image))
            similarity[rows] = label
            yield rows, image, text
            at += len(image)

    def make() -> Pool:
        return Pool.from_blocks(
            blocks(), dim, np.float16, latent_class, similarity, {}, scratch_dir=bench.folder
        )

    pool = bench.measure("generate and sort by class", pairs, make, repeat=1)
    pool.label_similarity = check_similarity(similarity, pairs)
    return pool


def _floors(bench: Bench, pool: Pool, gigabytes: float) -> None:
    path = Path(str(getattr(pool.pairs, "filename", "")))
    buffer = bytearray(_READ_BYTES)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    bench.measure("floor: read the embeddings once", len(pool), read)
    row = bench.rows[-1]
    row["note"] = f"{gigabytes:.2f} GB, {gigabytes / row['seconds']:.1f} GB/s"
    drop_cache(pool)
    bench.measure("floor: read them from a cold disk", len(pool), read, repeat=1)
    row = bench.rows[-1]
    row["note"] = f"{gigabytes / row['seconds']:.2f} GB/s"


def drop_cache(pool: Pool) -> None:
    """Drop a memory-mapped pool's file from the page cache, as far as the system lets us."""
    path = getattr(pool.pairs, "filename", None)
    if path is None or not hasattr(os, "posix_fadvise"):
        return
    pairs: Any = pool.pairs
    pairs.flush()
    # pages that are mapped stay: let go of ours first
    if hasattr(pairs._mmap, "madvise"):
        import mmap

        pairs._mmap.madvise(mmap.MADV_DONTNEED)
    drop_cached([path])


def _engine(bench: Bench, pool: Pool) -> None:
    from clipcov_pipeline.selection.methods import DEFAULT_WEIGHTS
    from clipcov_pipeline.selection.objective import scores

    n, threads = len(pool), bench.threads
    drop_cache(pool)
    bench.measure("rank all, cold", n, lambda: rank(fresh_pool(pool), threads=threads), repeat=1)
    bench.measure("  class sums and pair similarities", n, lambda: fresh_pool(pool).statistics(threads))
    pool.statistics(threads)
    bench.measure("  base scores", n, lambda: scores(pool, DEFAULT_WEIGHTS, threads=threads))
    bench.measure("rank all, warm", n, lambda: rank(fresh_pool(pool), threads=threads))
    bench.measure("rank 10 %, warm", n, lambda: rank(fresh_pool(pool), budget=_FRACTION, threads=threads))
    bench.measure(
        "rank 10 %, strict",
        n,
        lambda: rank(fresh_pool(pool), budget=_FRACTION, mode="strict", threads=threads),
    )
    bench.measure(
        "rank 10 %, global merge",
        n,
        lambda: rank(fresh_pool(pool), budget=_FRACTION, class_balance="global", threads=threads),
    )
    bench.measure(
        "rank 10 %, notebook",
        n,
        lambda: rank(fresh_pool(pool), budget=_FRACTION, mode="notebook", threads=threads),
    )


def _scaling(bench: Bench, pool: Pool) -> dict[str, float]:
    """Exponents of the CPU seconds of a full ranking in the number of pairs: the same classes throughout, so
    that they grow with the pool, and classes of the same sizes, so that there are more of them."""
    sizes = [size for size in (100_000, 300_000, 1_000_000) if size < len(pool)]
    by_class = np.random.default_rng(0).permutation(pool.n_classes)[pool.latent_class]
    ways = {
        "classes grow": (np.arange(len(pool)), "rank all of {:,}"),
        "more classes": (np.argsort(by_class, kind="stable"), "rank all of {:,}, of some classes"),
    }
    found = {}
    for way, (rows, words) in ways.items() if sizes else ():
        for size in sizes:
            with pool.take(rows[:size]) as part:
                work = partial(lambda part: rank(fresh_pool(part), threads=bench.threads), part)
                bench.measure(words.format(size), size, work)
        lines = [bench.row(words.format(size)) for size in sizes] + [bench.row("rank all, warm")]
        logs = np.log([[line["pairs"], line["cpu_seconds"]] for line in lines])
        found[way] = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return found


def _labels(bench: Bench, pool: Pool, classes: int) -> None:
    from clipcov_pipeline.selection.latent_classes import zero_shot_labels

    d, block = pool.dim, 4096
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((classes, d), np.float32)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    rows = rng.standard_normal((block, d), np.float32)
    out = np.empty((block, classes), np.float32)
    times = -(-len(pool) // block)

    def multiply() -> None:
        for _ in range(times):
            np.matmul(rows, prompts.T, out=out)

    bench.measure("floor: sgemm of the labels", len(pool), multiply)
    row = bench.rows[-1]
    row["note"] = f"{2 * times * block * d * classes / row['seconds'] / 1e9:.0f} GFLOP/s"
    image, text = pool.pairs[:, :d], pool.pairs[:, d:]
    bench.measure(
        "zero-shot labels", len(pool), lambda: zero_shot_labels(image, prompts, text, threads=bench.threads)
    )
    bench.rows[-1]["note"] = f"{bench.rows[-1]['seconds'] / row['seconds']:.2f} x the sgemm"


def _from_table(bench: Bench, pool: Pool) -> None:
    import lancedb
    import polars as pl
    import pyarrow as pa

    digits = np.random.default_rng(1).bytes(16 * len(pool)).hex()
    uid = np.frombuffer(digits.encode(), "S32")
    kind = pa.list_(pa.float16(), pool.dim)
    schema = pa.schema([("uid", pa.string()), ("image_embedding", kind), ("text_embedding", kind)])

    def batches() -> Any:
        for at in range(0, len(pool), 65536):
            rows = np.arange(at, min(at + 65536, len(pool)))
            sides = [pa.array(np.ascontiguousarray(side).reshape(-1)) for side in pool.sides(rows)]
            columns = [pa.array(uid[rows].astype(str))]
            columns += [pa.FixedSizeListArray.from_arrays(side, pool.dim) for side in sides]
            yield pa.record_batch(columns, schema=schema)

    began = time.perf_counter()
    database = lancedb.connect(bench.folder / "lance")
    database.create_table("embeddings", pa.RecordBatchReader.from_batches(schema, batches()))
    bench.add("write the LanceDB table", len(pool), time.perf_counter() - began)
    labels = bench.folder / "labels.parquet"
    frame = {
        "uid": uid.astype(str),
        "latent_class": pool.latent_class,
        "label_similarity": pool.label_similarity,
    }
    pl.DataFrame(frame).write_parquet(labels)
    # a process of its own, so that its memory is its own too
    out = bench.folder / "subset"
    source = bench.folder / "lance" / "embeddings.lance"
    command = [sys.executable, "-m", "clipcov_pipeline.cli", "select", str(source), "--labels", str(labels)]
    command += ["--fraction", str(_FRACTION), "--scratch-dir", str(bench.folder), "--out", str(out)]
    command += [] if bench.threads is None else ["--threads", str(bench.threads)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - began
    report = json.loads(out.with_suffix(".json").read_text())
    split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items())
    memory = max(report["anonymous_bytes"].values()) / 1e9
    cpu = sum(report["cpu_seconds"].values())
    bench.add("LanceDB table to parquet, 10 %", len(pool), took, cpu, memory, f"clipcov select: {split}")


def _notebook(bench: Bench, classes: int, dim: int, seed: int) -> dict[str, Any]:
    """The authors' route beside ours, and how far their rule and our notebook mode agree."""
    from clipcov_pipeline.bench.notebook_route import notebook_route

    n, of = NOTEBOOK_PAIRS, f"of {classes} classes"
    image, text, labels, similarity = synthetic_arrays(n, classes, dim, seed)
    matrices = bench.folder / "matrices"
    matrices.mkdir()
    found: dict[str, Any] = {"pairs": n, "classes": classes, "jaccard": {}}
    theirs_cpu = 0.0
    for fraction in (_FRACTION, 0.5):
        phases = Phases()
        theirs = notebook_route(image, text, labels, similarity, round(n * fraction), matrices, phases)
        if fraction == _FRACTION:
            for name, note in (
                ("matrices", "its precompute, incl. writing them"),
                ("loop", "incl. reading them twice, as it does"),
            ):
                seconds, cpu = phases.seconds[name], phases.cpu_seconds[name]
                bench.add(f"notebook: {name} {of}", n, seconds, cpu, phases.anonymous_bytes[name] / 1e9, note)
                theirs_cpu += cpu
        pool = Pool.from_arrays(image, text, labels, similarity)
        ours = rank(pool, budget=fraction, mode="notebook", clip_negative=True, threads=bench.threads).rows
        found["jaccard"][str(fraction)] = len(np.intersect1d(ours, theirs)) / len(np.union1d(ours, theirs))
    shutil.rmtree(matrices)
    layout, ranked = f"ours: arrays to pool {of}", f"ours: sums and rank 10 % {of}"
    pool = bench.measure(layout, n, lambda: Pool.from_arrays(image, text, labels, similarity))
    bench.measure(ranked, n, lambda: rank(fresh_pool(pool), budget=_FRACTION, threads=bench.threads))
    rank_cpu, layout_cpu = (bench.row(what)["cpu_seconds"] for what in (ranked, layout))
    found["cpu_ratio"] = theirs_cpu / rank_cpu
    found["cpu_ratio_with_layout"] = theirs_cpu / (rank_cpu + layout_cpu)
    return found


def table(found: dict[str, Any]) -> str:
    """The measurements as a plain-text table."""
    lines = [f"{'what':44} {'pairs':>10} {'seconds':>9} {'CPU s':>9} {'anon GB':>8}  note"]
    for row in found["rows"]:
        cpu = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.3f}"
        memory = "" if row["anonymous_gb"] is None else f"{row['anonymous_gb']:.2f}"
        lines.append(
            f"{row['what']:44} {row['pairs']:>10,} {row['seconds']:>9.3f} {cpu:>9} {memory:>8}  {row['note']}"
        )
    lines += [
        f"{way}: CPU seconds grow as pairs to the power {power:.2f}"
        for way, power in found["exponent"].items()
    ]
    lines += [
        f"{notebook['pairs']:,} pairs in {notebook['classes']} classes: the notebook's route, matrices "
        f"included, takes {notebook['cpu_ratio']:.0f} times the CPU of ours "
        f"({notebook['cpu_ratio_with_layout']:.0f} times with sorting our rows by class); "
        f"Jaccard of its choice and our notebook mode {notebook['jaccard']}"
        for notebook in found.get("notebook", [])
    ]
    for name, state in found.get("peers", {}).items():
        if state != "measured":
            lines.append(f"{name}: {state}")
    load = found["machine"]
    lines.append(
        f"{load['threads']} threads; load average {load['load_before'][0]:.1f} before, "
        f"{load['load_after'][0]:.1f} after"
    )
    return "\n".join(lines)
