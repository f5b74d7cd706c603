"""``clipcov init``: a YAML for shards that somebody has."""

import re
from pathlib import Path

import click

from clipcov_pipeline.errors import InputError


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
    from clipcov_pipeline.experiment.config.load import load_config
    from clipcov_pipeline.experiment.config.schema import FILE, as_text
    from clipcov_pipeline.experiment.starter import look_at, starter
    from clipcov_pipeline.proxy.models import resolve_device

    if out.exists():
        raise InputError(f"--out: found {out}, expected a new file: give another name or remove it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"--name: found {name!r}, expected letters, digits, dots, dashes or underscores")
    look = look_at(source)
    given = source if "://" in source else str(Path(source).absolute())
    text = starter(name, given, look, gpu=resolve_device("auto") != "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    schema = out.with_name(FILE)
    if not schema.exists():
        schema.write_text(as_text(), encoding="utf-8")
    load_config(str(out))
    click.echo(text.splitlines()[1].removeprefix("# "))
    click.echo(f"{out} is written; next:  clipcov check {out}")
