"""``clipcov bench``: measure this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
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
    "--scratch-dir", "folder", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file."
)
def selection(json_path: Path | None, **options: Any) -> None:
    """Speed of the selection on synthetic CLIP-like embeddings: a table, and JSON on request.

    Scratch files (2 KB a pair at 512 dimensions) are removed at the end.
    """
    from clipcov_pipeline.bench.selection_speed import run_benchmark, table

    found = run_benchmark(**options, say=lambda line: click.echo(line, err=True))
    click.echo(table(found))
    text = json.dumps(found, indent=2) + "\n"
    if json_path is None:
        click.echo(text, nl=False)
    else:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(text)


@command.command()
@click.option("--pairs", type=click.IntRange(100), default=1_000_000, show_default=True)
@click.option("--classes", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--dim", type=click.IntRange(4), default=512, show_default=True)
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True)
@click.option("--draws", type=click.IntRange(1), default=10, show_default=True, help="Random subsets.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all processors.")
@click.option(
    "--scratch-dir", "folder", type=click.Path(path_type=Path), help="Default: the system's temporary folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diagnostics(as_json: bool, **options: Any) -> None:
    """Seconds and anonymous memory of one subset's diagnostics on synthetic CLIP-like embeddings."""
    from clipcov_pipeline.bench.diagnostics_speed import as_text, bench_diagnostics

    found = bench_diagnostics(**options)
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
@click.option("--images", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="ImageFolder: a folder of photos a class (or train/ and test/ with these).")  # fmt: skip
@click.option("--test-images", type=click.Path(path_type=Path, file_okay=False),
              help="Test photos by class; default: DIR/test, else a fifth of each class.")  # fmt: skip
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
@click.option("--crop-scale", type=click.FloatRange(0, 1, min_open=True), default=0.4, show_default=True,
              help="Least area of the arms' random crop; open_clip's own is 0.9.")  # fmt: skip
@click.option("--proxy-samples-seen", type=click.IntRange(1), default=204_800, show_default=True)
@click.option("--proxy-batch-size", type=click.IntRange(2), default=256, show_default=True)
@click.option("--model", default="clipcov-tiny-RN", show_default=True, help="An open_clip model's name.")
@click.option("--pretrained", type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Fine-tune: weights that every arm starts from, such as a full-pool arm's.")  # fmt: skip
@click.option("--proxy-pretrained", multiple=True,
              type=click.Path(path_type=Path, dir_okay=False, exists=True),
              help="Second round: an arm's weights as the proxy's; once a draw.")  # fmt: skip
@click.option("--noise", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Share of captions that are not faithful.")  # fmt: skip
@click.option("--largest", type=click.IntRange(1), default=5000, show_default=True, help="Largest class.")
@click.option("--imbalance", type=click.FloatRange(1), default=10.0, show_default=True)
@click.option("--duplicates", type=click.FloatRange(0, 1), default=0.25, show_default=True,
              help="Near-duplicates, as a share of the photos.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True,
              help="Trainings side by side (automation.pools.gpu of the experiments).")  # fmt: skip
@click.option("--prepare", is_flag=True, help="Plant the pools and write the experiments, run nothing.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers to this file."
)
def quality(out: Path, draws: tuple[int, ...], prepare: bool, json_path: Path | None, **options: Any) -> None:
    """Does the subset train a better CLIP? Methods compared on labelled photos made into a web-like pool.

    Every draw of the pool is an ordinary experiment, OUT/drawN/experiment.yaml. Run again after a stop:
    what is finished is kept.
    """
    from clipcov_pipeline.bench import quality as bench_quality
    from clipcov_pipeline.bench import quality_tables

    paths = _prepared(out, draws, options)
    for path in paths:
        click.echo(f"experiment: {path}", err=True)
    if prepare:
        return
    codes = [_run_experiment(path) for path in paths]
    if code := next(filter(None, codes), 0):  # below 0 where a signal ended the run
        sys.exit(code)
    scores, truth, seconds = quality_tables.collect(paths)
    click.echo(quality_tables.to_text(scores, truth, seconds))
    quality_tables.plot_covariance(scores, truth, out / bench_quality.SCATTER)
    click.echo(f"\nevery subset over alignment and scale: {out / bench_quality.SCATTER}", err=True)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(quality_tables.to_json(scores, truth, seconds))


def _prepared(out: Path, draws: Sequence[int], options: dict[str, Any]) -> list[Path]:
    """Plant every draw of the pool and write its experiment; the YAMLs."""
    from clipcov_pipeline.bench.quality import Matrix, matrix_methods, prepare
    from clipcov_pipeline.bench.testbed_rule import Rule

    proxies = options.pop("proxy_pretrained") or [None] * len(draws)
    if len(proxies) != len(draws):
        raise InputError(f"--proxy-pretrained: found {len(proxies)} files, expected {len(draws)}, one a draw")
    images, test_images, methods = (options.pop(name) for name in ("images", "test_images", "methods"))
    rule = {name: options.pop(name) for name in ("largest", "imbalance", "noise", "duplicates")}
    labels = methods.split(",") if methods else ()
    matrix = Matrix(matrix_methods(labels, early_proxy=proxies[0] is None), **options)
    return [
        prepare(images, test_images, out / f"draw{draw}", Rule(draw=draw, **rule), matrix, proxy)
        for draw, proxy in zip(draws, proxies, strict=True)
    ]
