"""``clipcov bench``: measure this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.training.parent import PARENT_VARIABLE


@click.group()
def command() -> None:
    """Measure on this machine."""


@command.command()
@click.option("--pairs", type=click.IntRange(1000), default=300_000, show_default=True)
@click.option("--classes", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(4), default=512, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Medians of so many runs."
)
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@click.option(
    "--lance", is_flag=True, help="Also from a LanceDB table to parquet (needs the disk three times over)."
)
@click.option(
    "--notebook/--no-notebook", default=True, show_default=True, help="The authors' route at 100,000 pairs."
)
@click.option(
    "--peers",
    is_flag=True,
    help="apricot and submodlib on one class (the extra `peers`).",
)
@click.option(
    "--scratch-dir", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file."
)
def selection(scratch_dir: Path | None, json_path: Path | None, **how: Any) -> None:
    """Speed of the selection on synthetic CLIP-like embeddings: a table, and JSON on request.

    Scratch files (2 KB a pair at 512 dimensions) are removed at the end.
    """
    from clipcov_pipeline.bench.selection_speed import Size, run_benchmark, table

    def say(line: str) -> None:
        click.echo(line, err=True)

    size = Size(*(how.pop(name) for name in ("pairs", "classes", "dim", "seed")))
    found = run_benchmark(size, folder=scratch_dir, say=say, **how)
    click.echo(table(found))
    text = json.dumps(found, indent=2) + "\n"
    if json_path is None:
        click.echo(text, nl=False)
    else:
        _write(json_path, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@command.command()
@click.option("--pairs", type=click.IntRange(100), default=1_000_000, show_default=True)
@click.option("--classes", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(4), default=512, show_default=True)
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True)
@click.option("--draws", type=click.IntRange(1), default=10, show_default=True, help="Random subsets.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@click.option(
    "--scratch-dir", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diagnostics(
    pairs: int, classes: int, dim: int, scratch_dir: Path | None, as_json: bool, **how: Any
) -> None:
    """Seconds and anonymous memory of one subset's diagnostics on synthetic CLIP-like embeddings."""
    from clipcov_pipeline.bench.diagnostics_speed import as_text, bench_diagnostics

    found = bench_diagnostics(pairs, classes, dim, folder=scratch_dir, **how)
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))


@command.command()
@click.option("--shards", type=click.IntRange(1), default=13_000, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Processes.")
@click.option(
    "--scratch-dir", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(shards: int, repeat: int, scratch_dir: Path | None, as_json: bool) -> None:
    """Time the plan of 50 recipes over a pool of many shards, of which everything is built."""
    from clipcov_pipeline.bench.plan_speed import as_text, bench_plan

    found = bench_plan(shards, repeat, scratch_dir, lambda line: click.echo(line, err=True))
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))


def _run_experiment(path: Path) -> int:
    """Run one of several experiments; its lines begin with its folder's name. The exit status."""
    env = {
        **os.environ,
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",  # lines as they come, not by the block
    }
    command = [sys.executable, "-m", "assets.running.run", "--config", str(path)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            _echo_lines(run, path.parent.name)
        except KeyboardInterrupt:  # it got that as well: it closes its training, and ends
            _echo_lines(run, path.parent.name)
            raise
    return run.returncode


def _echo_lines(run: "subprocess.Popen[str]", name: str) -> None:
    assert run.stdout is not None
    for line in run.stdout:
        click.echo(f"{name}  {line}", nl=False, err=True)


def _numbers(kind: type) -> Any:
    """A callback that reads ``0.05,0.1`` as a tuple."""

    def read(_ctx: click.Context, option: click.Parameter, text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise click.BadParameter(f"found {text!r}, expected numbers and commas", param=option) from error

    return read


@command.command()
@click.option(
    "--samples", type=click.IntRange(1), default=3000, show_default=True, help="Of the synthetic pool."
)
@click.option(
    "--image-size", "size", type=click.IntRange(8), default=64, show_default=True, help="Pixels a side."
)
@click.option("--samples-per-shard", type=click.IntRange(1), default=500, show_default=True)
@click.option("--densities", default="0.05,0.25,1", show_default=True, callback=_numbers(float))
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs; of small densities more."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True)
@click.option(
    "--latency",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="Seconds before each answer of the web server.",
)
@click.option("--model", default="clipcov-tiny-RN", show_default=True, help="An open_clip model's name.")
@click.option(
    "--subsets", type=click.IntRange(20), help="Instead: make 10 subsets of a pool of so many samples."
)
@click.option(
    "--start",
    type=click.IntRange(1000),
    help="Instead: start on an index of so many samples in 1,000 shards.",
)
@click.option(
    "--scratch-dir", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file."
)
def loader(
    scratch_dir: Path | None, json_path: Path | None, subsets: int | None, start: int | None, **how: Any
) -> None:
    """Training data from an index of the original tars, beside tars of the subset's own.

    Samples a second from a warm disk, a cold one and a web server on this machine, on a synthetic pool that
    is removed at the end. `--subsets` and `--start` measure something else instead.
    """
    from clipcov_pipeline.bench import loader_speed, loader_start, loader_tables, subset_making

    def say(line: str) -> None:
        click.echo(line, err=True)

    if start is not None:
        found = loader_start.bench_start(start, how["workers"], how["batch_size"], how["model"], scratch_dir)
        click.echo(loader_tables.start_table(found))
    elif subsets is not None:
        found = subset_making.bench_subsets(subsets, how["size"], scratch_dir, say)
        click.echo(loader_tables.subsets_table(found))
    else:
        found = loader_speed.bench_loader(loader_speed.Loading(**how), scratch_dir, say)
        click.echo(loader_tables.speed_table(found))
    if json_path is not None:
        _write(json_path, json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class _Quality:
    """The options of ``clipcov bench quality``."""

    images: Path
    test_images: Path | None
    out: Path
    methods: str | None
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    draws: tuple[int, ...]
    samples_seen: int
    batch_size: int
    crop_scale: float
    proxy_samples_seen: int
    proxy_batch_size: int
    model: str
    pretrained: Path | None
    proxy_pretrained: tuple[Path, ...]
    noise: float
    largest: int
    imbalance: float
    duplicates: float
    jobs: int
    prepare: bool
    json_path: Path | None


@command.command()
@click.option(
    "--images",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="ImageFolder: a folder of photos a class (or train/ and test/ with these).",
)
@click.option(
    "--test-images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Test photos by class; default: DIR/test, else a fifth of each class.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("quality"), show_default=True)
@click.option("--methods", help="Labels with commas between; default: the matrix of eight.")
@click.option("--fractions", default="0.05,0.1,0.25", show_default=True, callback=_numbers(float))
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers(int), help="Of the training.")
@click.option("--draws", default="0", show_default=True, callback=_numbers(int), help="Seeds of the pool.")
@click.option(
    "--samples-seen", type=click.IntRange(1), default=51_200, show_default=True, help="By each arm."
)
@click.option("--batch-size", type=click.IntRange(2), default=128, show_default=True)
# a subset of 5 % is seen forty times: with open_clip's own crop of 0.9 it is learnt by heart
@click.option(
    "--crop-scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Least area of the arms' random crop; open_clip's own is 0.9.",
)
@click.option("--proxy-samples-seen", type=click.IntRange(1), default=204_800, show_default=True)
@click.option("--proxy-batch-size", type=click.IntRange(2), default=256, show_default=True)
@click.option("--model", default="clipcov-tiny-RN", show_default=True, help="An open_clip model's name.")
@click.option(
    "--pretrained",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Fine-tune: weights that every arm starts from, such as a full-pool arm's.",
)
@click.option(
    "--proxy-pretrained",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Second round: an arm's weights as the proxy's; once a draw.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of captions that are not faithful.",
)
@click.option("--largest", type=click.IntRange(1), default=5000, show_default=True, help="Largest class.")
@click.option("--imbalance", type=click.FloatRange(1), default=10.0, show_default=True)
@click.option(
    "--duplicates",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="Near-duplicates, as a share of the photos.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trainings side by side (automation.pools.gpu of the experiments).",
)
@click.option("--prepare", is_flag=True, help="Plant the pools and write the experiments, run nothing.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file."
)
def quality(**options: Any) -> None:
    """Does the subset train a better CLIP? Methods compared on labelled photos made into a web-like pool.

    Every draw of the pool is an ordinary experiment, OUT/drawN/experiment.yaml. Run again after a stop:
    what is finished is kept.
    """
    given = _Quality(**options)
    paths = _prepare(given)
    for path in paths:
        click.echo(f"experiment: {path}", err=True)
    if given.prepare:
        return
    codes = [_run_experiment(path) for path in paths]
    if code := next(filter(None, codes), 0):  # below 0 where a signal ended the run
        sys.exit(code)
    _show(given, paths)


def _prepare(given: _Quality) -> list[Path]:
    """Plant every draw and write its experiment; the paths of these."""
    from clipcov_pipeline.bench.quality import Arms, Proxy, matrix_methods, prepare
    from clipcov_pipeline.bench.testbed_rule import Rule

    proxies = given.proxy_pretrained or (None,) * len(given.draws)
    if len(proxies) != len(given.draws):
        raise InputError(
            f"--proxy-pretrained: found {len(proxies)} files, expected {len(given.draws)}, one a draw"
        )
    labels = given.methods.split(",") if given.methods else ()
    arms = Arms(
        methods=matrix_methods(labels, early_proxy=not given.proxy_pretrained),
        fractions=given.fractions,
        seeds=given.seeds,
        samples_seen=given.samples_seen,
        batch_size=given.batch_size,
        crop_scale=given.crop_scale,
        model=given.model,
        pretrained=given.pretrained,
    )
    planting = {name: getattr(given, name) for name in ("largest", "imbalance", "noise", "duplicates")}
    return [
        prepare(
            given.images,
            given.test_images,
            given.out / f"draw{draw}",
            Rule(draw=draw, **planting),
            arms,
            Proxy(given.proxy_samples_seen, given.proxy_batch_size, weights),
            given.jobs,
        )
        for draw, weights in zip(given.draws, proxies, strict=True)
    ]


def _show(given: _Quality, paths: Sequence[Path]) -> None:
    """Print, draw and write what all draws have given."""
    import polars as pl

    from clipcov_pipeline.bench.quality import SCATTER
    from clipcov_pipeline.bench.quality_tables import collect, plot_covariance, summary, to_text

    scores, truth, seconds = collect(paths)
    click.echo(to_text(scores, truth, seconds))
    plot_covariance(scores, truth, given.out / SCATTER)
    click.echo(f"\nevery subset over alignment and scale: {given.out / SCATTER}", err=True)
    if given.json_path is not None:
        metrics = scores["metric"].unique(maintain_order=True)
        board = pl.concat([summary(scores, m).with_columns(metric=pl.lit(m)) for m in metrics])
        tables = {"summary": board, "truth": truth, "scores": scores, "seconds": seconds}
        found = {name: table.to_dicts() for name, table in tables.items()}
        _write(given.json_path, json.dumps(found, indent=1) + "\n")
