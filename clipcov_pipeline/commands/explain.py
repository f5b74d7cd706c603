"""``clipcov explain``: say why a sample is in or out of a ClipCov subset."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from clipcov_pipeline.commands.pool_options import (
    chosen_budget,
    method_options,
    parameters,
    pool_options,
    reading_progress,
)
from clipcov_pipeline.errors import InputError


@click.command()
@click.argument("uid")
@pool_options
@method_options
@click.option("--neighbours", type=click.IntRange(0), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    uid: str, source: Path, text: Path | None, labels: Path | None, class_embedding: Path | None,
    clusters: int | None, scratch_dir: Path | None, fraction: float | None, count: int | None,
    mode: str | None, extra: tuple[str, ...], seed: int, threads: int | None, neighbours: int, as_json: bool,
) -> None:  # fmt: skip
    """Say why the sample UID of SOURCE is in or out of the ClipCov subset of a budget.

    SOURCE and the options are those of ``clipcov select``; a pool without uids takes a row number.
    """
    from clipcov_pipeline.selection.methods import validate_method

    params = parameters(mode, extra, seed)
    validate_method("clipcov", params)
    budget = chosen_budget(fraction, count)
    if budget is None:
        raise InputError("budget: found none, expected --fraction or --count: the subset to explain")

    from clipcov_pipeline.selection.explain import describe, explain
    from clipcov_pipeline.selection.sources import Labelling, open_pool

    with reading_progress() as progress:
        labelling = Labelling(labels, class_embedding, clusters, seed)
        pool = open_pool(source, text, labelling, scratch_dir=scratch_dir, progress=progress)
    with pool:
        found = explain(pool, uid, budget, params, n_neighbours=neighbours, threads=threads)
    click.echo(json.dumps(asdict(found), indent=2) if as_json else describe(found))
