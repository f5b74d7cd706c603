"""``clipcov select``: rank a table or arrays and write the subset."""

from pathlib import Path
from typing import Any

import click

from clipcov_pipeline.commands.pool_options import (
    PATH,
    chosen_budget,
    method_options,
    opened,
    parameters,
    pool_options,
)


@click.command()
@click.argument("source", type=PATH)
@pool_options
@click.option("--method", default="clipcov", show_default=True, help="clipcov or a baseline.")
@method_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Prefix: writes OUT.parquet, OUT.npy (DataComp) and OUT.json.",
)
def command(source: Path, method: str, threads: int | None, out: Path, **options: Any) -> None:
    """Rank SOURCE by a method and write the subset.

    SOURCE is a LanceDB table (DIR/NAME.lance), a .parquet (or a folder of them), an .npz, an .npy of image
    embeddings with --text, or a folder as clip-retrieval writes it or of DataComp's metadata. Embeddings have
    unit norm.
    """
    from clipcov_pipeline.selection.measure import Phases
    from clipcov_pipeline.selection.methods import budget_count, reads_captions, validate_method

    params = parameters(options["mode"], options["extra"], options["seed"])
    filled = validate_method(method, params)
    _check_files(method, params)
    budget = chosen_budget(options["fraction"], options["count"])
    if isinstance(budget, float):
        budget_count(budget, 1)  # a bad fraction is told before anything is read
    prefix = out.with_suffix("") if out.suffix in (".parquet", ".npy", ".json") else out
    phases = Phases()

    from clipcov_pipeline.selection.outputs import write_outputs
    from clipcov_pipeline.selection.ranking import rank

    with phases("read"):
        classes = method in ("clipcov", "clip_score_per_class")
        pool = opened(source, options, need_classes=classes, captions=reads_captions(method, params))
    with pool:
        click.echo(f"ranking {len(pool):,} pairs by {method}", err=True)
        with phases("rank"):
            ranking = rank(pool, method, budget, threads=threads, **params)
        if method == "external":
            _say_unknown(pool, params["uids"])
        for name, count in ranking.passed.items():
            click.echo(f"filter {name}: {count:,} pass", err=True)
        click.echo(f"ranked {len(ranking):,} of {len(pool):,} in {phases.seconds['rank']:.2f} s", err=True)
        with phases("objective"):
            value = _objective(pool, ranking.rows, filled if method == "clipcov" else None, threads)
        report = _report(pool, ranking, method, filled, value, phases)
        written = write_outputs(prefix, pool, ranking, report, phases)
    click.echo(_summary(report))
    click.echo("wrote " + ", ".join(map(str, written)))
    if len(written) < 3:
        click.echo("no DataComp .npy: the uids are not all UUIDs (32 hex digits)", err=True)


def _check_files(method: str, params: dict[str, Any]) -> None:
    """Tell of a filter's file that is of no use before anything is read."""
    from clipcov_pipeline.selection.filter_files import check_filter_file
    from clipcov_pipeline.selection.methods import files_of

    for key, file in files_of(method, params).items():
        if key != "uids":
            check_filter_file(key, Path(file))


def _say_unknown(pool: Any, uids: str) -> None:
    from clipcov_pipeline.selection.external import listed

    found = listed(pool, uids)
    if found.unknown:
        click.echo(f"{found.unknown:,} uids of {uids} are not in the pool", err=True)
    if found.missing:
        click.echo(f"{found.missing:,} rows of {uids} have no uid", err=True)
    if len(found.never_drawn):
        click.echo(f"{len(found.never_drawn):,} samples of {uids} have the weight 0: left out", err=True)


def _objective(pool: Any, rows: Any, params: dict[str, Any] | None, threads: int | None) -> dict[str, float]:
    """ClipCov's objective of the choice, by its own parameters or, for another method, the default ones."""
    from clipcov_pipeline.selection.methods import validate_method
    from clipcov_pipeline.selection.objective import objective

    filled = params or validate_method("clipcov")
    settings = {name: filled[name] for name in ("clip_negative", "redundancy", "repeat_penalty")}
    return objective(pool, rows, filled["weights"], **settings, threads=threads)


def _report(
    pool: Any, ranking: Any, method: str, params: dict[str, Any], value: Any, phases: Any
) -> dict[str, Any]:
    import numpy as np

    from clipcov_pipeline import __version__

    taken = np.bincount(pool.latent_class[ranking.rows], minlength=pool.n_classes)
    sizes = pool.class_sizes
    empty = sizes[(sizes > 0) & (taken == 0)]
    return {
        "version": __version__,
        "method": method,
        "params": params,
        "pool": {
            "pairs": len(pool),
            "dim": pool.dim,
            "dtype": str(pool.pairs.dtype),
            "classes": int((sizes > 0).sum()),
        },
        "subset": {"pairs": len(ranking), "classes": int((taken > 0).sum())},
        "left_out": {"classes": len(empty), "pairs": int(empty.sum())},
        "passed_filters": dict(ranking.passed),
        "objective": value,
        "class_counts": {str(c): [int(taken[c]), int(sizes[c])] for c in np.flatnonzero(sizes)},
        "seconds": phases.seconds,
        "cpu_seconds": phases.cpu_seconds,
        "anonymous_bytes": phases.anonymous_bytes,
    }


def _summary(report: dict[str, Any]) -> str:
    value = report["objective"]
    terms = "  ".join(f"{name} {value[name]:,.1f}" for name in value if name != "F")
    seconds = "  ".join(f"{name} {took:.2f}" for name, took in report["seconds"].items())
    left = report["left_out"]
    return "\n".join(
        [
            f"{report['method']}: {report['subset']['pairs']:,} of {report['pool']['pairs']:,} pairs, "
            f"{report['subset']['classes']:,} of {report['pool']['classes']:,} classes"
            f" ({left['pairs']:,} pairs are in classes left out)",
            f"F {value['F']:,.1f} = {terms}",
            f"seconds: {seconds}; anonymous memory {max(report['anonymous_bytes'].values()) / 1e9:.2f} GB",
        ]
    )
