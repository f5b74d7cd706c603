"""``clipcov export``: hand a subset on in the forms that other tools read."""

import sys
from pathlib import Path

import click

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.plan import Plan, Status
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import Record, node_name
from clipcov_pipeline.subsets.export import FORMATS, Format, export_subset
from clipcov_pipeline.subsets.files import Members


@click.command("export")
@click.argument("subset")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="tars",
    show_default=True,
    help="WebDataset tars, DataComp's npy, the index as parquet or csv, or parquet with images"
    " as Hugging Face datasets reads them.",
)
@click.option("--all-members", is_flag=True, help="Tars: whatever else a sample has, too.")
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
def command(subset: str, out: Path, form: Format, all_members: bool, config: str | None) -> None:
    """Write SUBSET (METHOD-fFRACTION, or full-f1) in a form that other tools read.

    Tars hold image, caption and json of each sample as they are; the uid is written into the json, where
    DataComp's tools look for it, and under a rule of shards.caption the caption into the txt. Other members
    are left out: open_clip_train decodes all there are, and drops a pair with one that it cannot.
    """
    import polars as pl
    from tqdm import tqdm

    project = Project.open(config)
    plan = project.plan()
    index = pl.read_parquet(project.store.checked(current(plan, "subsets", subset), "subset.parquet"))
    with tqdm(total=index.height, unit=" samples", disable=not sys.stderr.isatty()) as bar:
        paths = export_subset(
            index,
            list(project.tars.values()),
            out,
            form,
            samples_per_shard=project.config.select.samples_per_shard,
            storage_options=dict(project.config.shards.storage_options),
            members=Members(project.config.shards.caption, everything=all_members),
            progress=bar.update,
        )
    once = "" if form != "tars" or index["weight"].n_unique() == 1 else ", each once: tars hold no weights"
    click.echo(f"{index.height:,} samples written to {out}: {len(paths)} files{once}")


def current(plan: Plan, stage: str, partition: str) -> Record:
    """Return the record of an entry that is up to date.

    Raises:
        InputError: no such partition in the experiment, or it is out of date.
    """
    step = plan.by_name.get(node_name(stage, partition))
    if step is None:
        known = ", ".join(plan.keys(stage))
        raise InputError(f"{stage}: found {partition!r}, expected one of the experiment's: {known}")
    if step.record is None or step.status is not Status.CURRENT:
        raise InputError(
            f"{step.node.name}: out of date ({'; '.join(step.why)}); bring it up to date: clipcov run"
        )
    return step.record
