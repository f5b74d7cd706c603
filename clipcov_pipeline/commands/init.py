"""``clipcov init``: a YAML for shards that somebody has."""

from pathlib import Path

import click

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import write_text_at_once


@click.command("init")
@click.argument("source")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="experiment.yaml",
    show_default=True,
    help="YAML to write.",
)
@click.option("--name", default="my-pool", show_default=True, help="Of the experiment.")
def command(source: str, out: Path, name: str) -> None:
    """Look at the shards of SOURCE (a folder, a brace pattern, a URL) and write a commented YAML for them."""
    from clipcov_pipeline.experiment.config.experiment import check_name
    from clipcov_pipeline.experiment.config.load import load_config
    from clipcov_pipeline.experiment.config.schema import FILE, as_text
    from clipcov_pipeline.experiment.starter import look_at, starter
    from clipcov_pipeline.proxy.models import resolve_device

    if out.exists():
        raise InputError(f"--out: found {out}, expected a new file: give another name or remove it")
    try:
        check_name(name)
    except ValueError as error:
        raise InputError(f"--name: {error}") from None
    look = look_at(source)
    given = source if "://" in source else str(Path(source).absolute())
    text = starter(name, given, look, gpu=resolve_device("auto") != "cpu")
    write_text_at_once(out, text)
    schema = out.with_name(FILE)
    if not schema.exists():
        write_text_at_once(schema, as_text())
    load_config(str(out))
    click.echo(text.splitlines()[1].removeprefix("# "))
    click.echo(f"{out} is written; next:  clipcov check {out}")
