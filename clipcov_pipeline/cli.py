"""The ``clipcov`` command: finds the subcommand, and turns a user's mistake into one line and exit code 2."""

import importlib
import sys

import click

from clipcov_pipeline.errors import InputError

# name -> (module:command, one-line help): modules are imported only when their command runs, so that
# `clipcov --help` and `clipcov plan` do not pay for torch
COMMANDS = {
    "init": ("clipcov_pipeline.commands.init:command", "Look at your shards and write a YAML for them."),
    "run": ("clipcov_pipeline.commands.run:command", "Run what is out of date, and only that."),
    "plan": ("clipcov_pipeline.commands.plan:command", "Print what would run, and why."),
    "check": ("clipcov_pipeline.commands.check:command", "Say what is missing to run, and what it takes."),
    "schema": ("clipcov_pipeline.commands.schema:command", "Print the JSON Schema of the YAML, for editors."),
    "ui": ("clipcov_pipeline.commands.run:ui", "Serve the Dagster UI and MLflow on this machine."),
    "select": ("clipcov_pipeline.commands.select:command", "Rank a table or arrays and write the subset."),
    "explain": ("clipcov_pipeline.commands.explain:command", "Say why a sample is in or out of a subset."),
    "search": ("clipcov_pipeline.commands.search:command", "Find samples by a text or an image."),
    "report": (
        "clipcov_pipeline.commands.report:command",
        "Print leaderboard, diagnostics and failed checks.",
    ),
    "export": ("clipcov_pipeline.commands.export:command", "Write a subset for other tools."),
    "export-fiftyone": (
        "clipcov_pipeline.commands.export_fiftyone:command",
        "Write a subset as a FiftyOne dataset.",
    ),
    "verify": ("clipcov_pipeline.commands.verify:command", "Check everything stored against its record."),
    "gc": ("clipcov_pipeline.commands.gc:command", "List what nothing needs; remove it with --delete."),
    "lineage": (
        "clipcov_pipeline.commands.lineage:command",
        "Say what an entry was made from.",
    ),
    "diff": ("clipcov_pipeline.commands.diff:command", "Compare two subsets or two leaderboards."),
    "bench": (
        "clipcov_pipeline.commands.bench:command",
        "Measure on this machine: speed, and the quality of subsets.",
    ),
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clipcov-pipeline")
def cli() -> None:
    """Choose the part of an image-caption pool that is worth training CLIP on."""


def guarded(command: click.Command, prog_name: str) -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        command(prog_name=prog_name)
    except InputError as error:
        click.echo(f"clipcov: {error}", err=True)
        sys.exit(2)


def main() -> None:
    """Entry point of the ``clipcov`` command."""
    guarded(cli, "clipcov")


if __name__ == "__main__":
    main()
