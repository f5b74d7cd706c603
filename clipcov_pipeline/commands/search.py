"""``clipcov search``: samples by a text or an image."""

import json
from pathlib import Path
from typing import Any

import click

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.project import Project


@click.command()
@click.argument("text", required=False)
@click.option(
    "--image", type=click.Path(path_type=Path), help="Look up by this image file instead of a text."
)
@click.option(
    "--by",
    type=click.Choice(["image", "caption"]),
    default="image",
    show_default=True,
    help="Which embedding of the samples is compared.",
)
@click.option("--count", type=click.IntRange(1, 10_000), default=10, show_default=True)
@click.option("--in", "inside", multiple=True, metavar="SUBSET", help="Only what is chosen in SUBSET.")
@click.option("--not-in", "outside", multiple=True, metavar="SUBSET", help="Only what SUBSET leaves out.")
@click.option(
    "--index/--no-index",
    default=None,
    help="Make and use a vector index; default: where the table has over 100,000 rows.",
)
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write the hits with pictures to this file."
)
def command(
    text: str | None, image: Path | None, config: str | None, as_json: bool, html: Path | None, **how: Any
) -> None:
    """Find the samples nearest to TEXT, or to an image, by the proxy's embeddings.

    SUBSET is METHOD-fFRACTION, such as clipcov-f0.25.
    """
    if (text is None) == (image is None):
        found = "neither" if text is None else "both"
        raise InputError(f'search: found {found}, expected a text or --image: clipcov search "a red bird"')
    from clipcov_pipeline.report import search

    project = Project.open(config)
    searcher = search.Searcher.open(project)
    encoder = searcher.encoder()
    rules = project.config.shards.image_rules
    query = search.image_query(encoder, image, rules) if image else search.text_query(encoder, str(text))
    hits = search.search(searcher, query, report=lambda line: click.echo(line, err=True), **how)
    click.echo(json.dumps(search.as_json(hits)) if as_json else search.as_text(hits))
    if html is not None:
        from clipcov_pipeline.report.drawing import write_page

        write_page(search.hits_gallery(project, str(text or image), hits), html)
        click.echo(f"Pictures: {html}", err=True)
