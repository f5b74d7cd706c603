"""``clipcov diff``: what differs between two subsets or two leaderboards, and which settings made it so."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.report import diff


@click.command()
@click.argument("names", nargs=-1)
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--list", "stage", help="List the stored entries of a stage (subsets, leaderboard) instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(names: tuple[str, ...], config: str | None, stage: str | None, as_json: bool) -> None:
    """Compare two subsets or two leaderboards, A and B.

    Each is a name (clipcov-f0.5, leaderboard: the one that stands now), NAME@FINGERPRINT or a fingerprint
    (6 digits or more) of an earlier one, or the path of a subset's parquet.
    """
    settings = None if _are_files(names) else load_config(config)
    store = Store(settings.work / "store" if settings else Path())
    if stage:
        for record in diff.stored(store, stage):
            standing = store.current_fingerprint(stage, record.partition) == record.fingerprint
            click.echo(f"{diff.title(record)}{'  current' if standing else ''}")
        return
    if len(names) != 2:
        raise click.UsageError(f"found {len(names)} names, expected two: clipcov diff A B")
    found, titles = diff.compare(store, *names)
    if as_json:
        click.echo(json.dumps({"a": titles[0], "b": titles[1], **asdict(found)}))
    elif isinstance(found, diff.SubsetDiff):
        click.echo(diff.subset_text(found, titles))
    else:
        click.echo(diff.board_text(found, titles))


def _are_files(names: tuple[str, ...]) -> bool:
    return bool(names) and all(name.endswith(".parquet") for name in names)
