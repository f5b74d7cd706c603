"""``clipcov bench``: measure this machine."""

import json
from pathlib import Path

import click


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
def selection(
    pairs: int, classes: int, dim: int, seed: int, repeat: int, threads: int | None, lance: bool,
    notebook: bool, peers: bool, scratch_dir: Path | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Speed of the selection on synthetic CLIP-like embeddings: a table, and JSON on request.

    Scratch files (2 KB a pair at 512 dimensions) are removed at the end.
    """
    from clipcov_pipeline.selection.benchmark import run_benchmark, table

    found = run_benchmark(
        pairs, classes, dim, seed=seed, repeat=repeat, threads=threads, folder=scratch_dir, lance=lance,
        notebook=notebook, peers=peers, say=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    click.echo(table(found))
    text = json.dumps(found, indent=2) + "\n"
    if json_path is None:
        click.echo(text, nl=False)
    else:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(text)
