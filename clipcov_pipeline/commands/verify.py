"""``clipcov verify``: everything that is stored, against its record."""

import sys

import click

from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.rebuild import differences, rebuild
from clipcov_pipeline.experiment.verify import verify


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--deep", is_flag=True, help="Also cut every subset from its ranking again and compare bytes.")
@click.option("--rebuild", "entry", metavar="ENTRY", help="Build STAGE/PARTITION again, aside, and compare.")
@click.option("--discard", is_flag=True, help="Remove what is damaged: `clipcov run` builds it again.")
def command(config: str | None, deep: bool, discard: bool, entry: str | None) -> None:
    """Check every stored entry against its record; exit code 1 and a line a problem where one differs."""
    project = Project.open(config)
    if entry is not None:
        _rebuild(project, config, entry)
        return
    report = verify(project, deep=deep)
    for line in report.lines():
        click.echo(line)
    checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items())
    click.echo(f"{len(report.problems)} problems; checked {checked or 'nothing: the store is empty'}")
    if not report.problems:
        return
    if discard:
        damaged = {record.fingerprint: record for record, _ in report.problems}
        for record in damaged.values():
            project.store.discard(record)
        click.echo(f"removed {len(damaged)} entries: `clipcov run` builds again what the experiment needs")
    else:
        click.echo("`clipcov verify --discard` removes what is damaged; `clipcov run` then builds it again")
    sys.exit(1)


def _rebuild(project: Project, config: str | None, name: str) -> None:
    record, again = rebuild(project, config, name)
    lines = differences(record, again)
    for line in lines:
        click.echo(line)
    if lines:
        sys.exit(1)
    outputs = ", ".join(f"{output} {digest[:12]}" for output, digest in record.digests.items())
    click.echo(f"{record.name}: built again, the same: {outputs}")
