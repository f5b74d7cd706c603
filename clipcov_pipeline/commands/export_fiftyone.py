"""``clipcov export-fiftyone``: a subset as a FiftyOne dataset on disk."""

import sys
from pathlib import Path

import click

from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.world import latent_class_names


@click.command("export-fiftyone")
@click.argument("subset")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@click.option(
    "--rejected",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Also so many samples that the subset leaves out.",
)
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
def command(subset: str, out: Path, rejected: int, config: str | None) -> None:
    """Write SUBSET (METHOD-fFRACTION) in FiftyOne's format, with classes, ranks, gains and tags.

    FiftyOne is not needed here. To look at it: pip install 'clipcov-pipeline[fiftyone]', then load the folder
    with fiftyone.Dataset.from_dir and the type fiftyone.types.FiftyOneDataset.
    """
    from tqdm import tqdm

    from clipcov_pipeline.report.fiftyone import export_fiftyone
    from clipcov_pipeline.report.search import Searcher

    searcher = Searcher.open(Project.open(config))
    with tqdm(unit=" samples", disable=not sys.stderr.isatty()) as bar:
        names = latent_class_names(searcher.project.config)
        exported = export_fiftyone(
            searcher, subset, out, rejected=rejected, class_names=names, progress=bar.update
        )
    for reason, count in exported.missing.items():
        click.echo(f"left out {count:,}: {reason}", err=True)
    click.echo(f"{exported.samples:,} samples written to {out}")
