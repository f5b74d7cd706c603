"""Dagster's web server behind the `Guard`; Dagster 1.13 has no setting for any of it.

Its command makes the application by a function of its module, which is wrapped here; should it go, this
fails at the start.
"""

import os
from typing import Any

from dagster_webserver import cli

from assets.running.guard import HOST_VARIABLE, Guard

make_app = cli.create_app_from_workspace_process_context  # pyright: ignore[reportPrivateImportUsage]


def guarded_app(*args: Any, **options: Any) -> Guard:
    """Return Dagster's application behind the guard."""
    return Guard(make_app(*args, **options), os.environ[HOST_VARIABLE])


if __name__ == "__main__":
    cli.create_app_from_workspace_process_context = guarded_app  # pyright: ignore[reportPrivateImportUsage]
    cli.main()
