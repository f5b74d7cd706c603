"""The Dagster daemon of ``clipcov ui``, which looks after a running backfill every 2 seconds.

"Materialize all" is a backfill of nine runs, each of which starts when the one before has ended. Dagster's
own daemon looks every 30 s: with nothing to do that took 4.5 minutes. Dagster 1.13 has no setting for it,
hence the one private constant that is set here; should it go, backfills are slow again, and nothing else.
"""

from dagster._daemon import controller
from dagster._daemon.cli import run_command

BACKFILL_SECONDS = 2


if __name__ == "__main__":
    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = BACKFILL_SECONDS
    run_command(prog_name="assets.running.daemon")
