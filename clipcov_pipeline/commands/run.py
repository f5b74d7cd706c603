"""``clipcov run`` and ``clipcov ui``: hand over to the Dagster side, which this package does not import."""

import os
import sys

import click

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _hand_over(module: str, arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@click.command(context_settings=PASS_ON)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Run what is out of date, and only that."""
    _hand_over("assets.running.run", ctx.args)


@click.command(context_settings=PASS_ON)
@click.pass_context
def ui(ctx: click.Context) -> None:
    """Serve the Dagster UI and MLflow on this machine."""
    _hand_over("assets.running.ui", ctx.args)
