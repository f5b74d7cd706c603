"""``mlflow server`` with `mlflow_app` in the place of MLflow's own application.

MLflow takes other applications from installed entry points only, hence the one private function that is
wrapped here; should it go, this fails at the start.
"""

from typing import Any

from mlflow import server
from mlflow.cli import cli

APP = "assets.running.mlflow_app:app"
build_command = server._build_uvicorn_command


def guarded_command(opts: Any, host: Any, port: Any, workers: Any, _: str, *rest: Any) -> list[str]:
    """Return the command of uvicorn that serves the guarded application."""
    return build_command(opts, host, port, workers, APP, *rest)


if __name__ == "__main__":
    server._build_uvicorn_command = guarded_command
    cli(prog_name="mlflow")
