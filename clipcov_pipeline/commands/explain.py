"""``clipcov explain``: say why a sample is in or out of a ClipCov subset."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from clipcov_pipeline.commands.pool_options import (
    PATH,
    chosen_budget,
    method_options,
    opened,
    parameters,
    pool_options,
)
from clipcov_pipeline.errors import InputError

if TYPE_CHECKING:
    from clipcov_pipeline.selection.explain import Explanation


# what a subset of an experiment settles by itself
OF_A_SOURCE = (
    "source", "text", "labels", "class_embedding", "clusters", "scratch_dir", "fraction", "count", "mode",
    "extra", "seed",
)  # fmt: skip


@click.command()
@click.argument("uid")
@click.argument("source", type=PATH, required=False)
@click.option("--subset", help="Of an experiment, such as clipcov-f0.25; instead of SOURCE.")
@click.option(
    "--config", help="With --subset: YAML file or preset; default $CLIPCOV_CONFIG, else the sample."
)
@pool_options
@method_options
@click.option("--neighbours", type=click.IntRange(0), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    uid: str,
    source: Path | None,
    subset: str | None,
    config: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say why the sample UID is in or out of a ClipCov subset.

    Of an experiment's with --subset; or of what ``clipcov select`` takes of SOURCE with the same options and
    a budget (a pool without uids takes a row number).
    """
    from clipcov_pipeline.selection.explain import describe

    if subset is not None:
        found = _of_experiment(ctx, uid, subset, config, options["neighbours"], options["threads"])
    elif config is not None:
        raise InputError("explain: found --config without --subset, expected both, or neither with a SOURCE")
    elif source is not None:
        found = _of_source(uid, source, options)
    else:
        raise InputError("explain: found neither SOURCE nor --subset, expected one: clipcov explain --help")
    click.echo(json.dumps(asdict(found), indent=2) if as_json else describe(found))


def _of_experiment(
    ctx: click.Context, uid: str, subset: str, config: str | None, neighbours: int, threads: int | None
) -> "Explanation":
    given = [n for n in OF_A_SOURCE if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT]
    if given:
        raise InputError(
            f"explain: found {', '.join(given)} beside --subset, expected none: the experiment settles them"
        )
    from clipcov_pipeline.experiment.project import Project
    from clipcov_pipeline.report.explain_subset import explain_subset

    return explain_subset(Project.open(config), uid, subset, n_neighbours=neighbours, threads=threads)


def _of_source(uid: str, source: Path, options: dict[str, Any]) -> "Explanation":
    from clipcov_pipeline.selection.methods import reads_captions, validate_method

    params = parameters(options["mode"], options["extra"], options["seed"])
    budget = chosen_budget(options["fraction"], options["count"])
    validate_method("clipcov", params)
    if budget is None:
        raise InputError("budget: found none, expected --fraction or --count: the subset to explain")

    from clipcov_pipeline.selection.explain import explain

    with opened(source, options, captions=reads_captions("clipcov", params)) as pool:
        how = {"n_neighbours": options["neighbours"], "threads": options["threads"]}
        return explain(pool, uid, budget, params, **how)
