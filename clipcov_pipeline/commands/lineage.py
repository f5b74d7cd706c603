"""``clipcov lineage``: what an entry was made from, up to the shards."""

import json

import click

from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.report.lineage import as_json, as_text, trace


@click.command()
@click.argument("name")
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--json", "machine", is_flag=True, help="One JSON object with every entry in full.")
def command(name: str, config: str | None, machine: bool) -> None:
    """Print what NAME was made from: leaderboard, scores/ARM@SET, a subset, an arm, or an MLflow run's id.

    An earlier entry is NAME@FINGERPRINT or its fingerprint (`clipcov diff --list STAGE`).
    """
    project = Project.open(config)
    lineage = trace(project, name)
    click.echo(json.dumps(as_json(project, lineage), indent=1) if machine else as_text(project, lineage))
