"""``clipcov schema``: what an editor completes and checks a YAML by."""

import click


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of an experiment's YAML.

    Editors with a YAML language server read it where the YAML's first line says
    `# yaml-language-server: $schema=clipcov.schema.json`.
    """
    from clipcov_pipeline.experiment.config.schema import as_text

    click.echo(as_text(), nl=False)
