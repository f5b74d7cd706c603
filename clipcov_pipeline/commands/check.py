"""``clipcov check``: can an experiment run on this machine, and what does it take?"""

import json
import logging
import os
import sys

import click


@click.command()
@click.argument("config", required=False)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Time some steps (20 s).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(config: str | None, measure: bool, as_json: bool) -> None:
    """Say what is missing to run CONFIG (a YAML file or preset), and what it takes; run nothing.

    Looks at the pool, the weights and the evaluation sets; states the steps of every arm, disk and time.
    Downloads nothing. Exit status: 0 it can run, 1 something is missing, 2 the configuration is wrong.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before it is imported
    logging.disable(logging.WARNING)  # open_clip warns of the random weights that are asked for
    from clipcov_pipeline.experiment.config.load import load_config
    from clipcov_pipeline.experiment.preflight import preflight

    try:
        found = preflight(load_config(config), measure=measure)
    finally:
        logging.disable(logging.NOTSET)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else found.to_text())
    if not found.can_run:
        sys.exit(1)
