"""``clipcov gc``: what no current plan needs, with sizes; removed only when told."""

import click

from clipcov_pipeline.experiment import gc, sizes
from clipcov_pipeline.experiment.project import Project


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--delete", is_flag=True, help="Remove what is listed.")
@click.option(
    "--keep",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Newest earlier entries of each partition that stay.",
)
@click.option(
    "--idle-hours",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Unfinished work written to within this time stays: it may belong to a run.",
)
def command(config: str | None, delete: bool, keep: int, idle_hours: float) -> None:
    """List what no current plan needs, with sizes; remove it with --delete, when nothing runs.

    Earlier entries that --keep spares need no build when a parameter is changed back. Rows in LanceDB that
    only earlier entries read are embedded again then.
    """
    project = Project.open(config)
    items = gc.find(project, keep=keep, idle_hours=idle_hours)
    for item in items:
        click.echo(f"{sizes.human(item.size):>12}  {item.kind:10}  {item.name}")
    total = sizes.human(sum(item.size for item in items))
    if not items:
        click.echo("Nothing to remove.")
    elif delete:
        freed = gc.delete(project, items, idle_hours=idle_hours)
        click.echo(f"Removed {len(items)} items, {sizes.human(freed)} freed.")
    else:
        click.echo(f"{len(items)} items, {total}; `clipcov gc --delete` removes them.")
