"""``clipcov ui``: the Dagster UI with its daemon, and MLflow, both on this machine only."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from assets.instance import project_instance
from assets.partitions import sync_partitions
from assets.tracking import Tracking, tracking_uri
from clipcov_pipeline.config import Config
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.project import Project

WORKSPACE = Path(__file__).parent.parent / "workspace.yaml"


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
def main(config: str | None) -> None:
    """Serve both user interfaces until Ctrl-C."""
    project = Project.open(config)
    with project_instance(project.config) as instance:
        sync_partitions(instance, project.plan())
    Tracking(project.config).experiment_id()  # creates the store, which the server then finds up to date
    ui = project.config.ui
    click.echo(f"Dagster  http://{ui.host}:{ui.dagster_port}\nMLflow   http://{ui.host}:{ui.mlflow_port}")
    processes = [subprocess.Popen(command) for command in commands(project.config)]
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
    except KeyboardInterrupt:
        click.echo("stopping")
    for process in processes:
        process.send_signal(signal.SIGINT)
    sys.exit(max(process.wait(timeout=60) for process in processes))


def commands(config: Config) -> list[list[str]]:
    """Return the command lines of both servers; they listen on ``ui.host`` only."""
    ui, scripts = config.ui, Path(sys.executable).parent
    dagster = [
        str(scripts / "dagster"),
        "dev",
        "-w",
        str(WORKSPACE),
        "-h",
        ui.host,
        "-p",
        str(ui.dagster_port),
    ]
    artifacts = (config.work / "mlflow" / "artifacts").resolve().as_uri()
    mlflow = [str(scripts / "mlflow"), "server", "--host", ui.host, "--port", str(ui.mlflow_port)]
    mlflow += ["--backend-store-uri", tracking_uri(config.work), "--default-artifact-root", artifacts]
    return [dagster, mlflow]


if __name__ == "__main__":
    try:
        main(prog_name="clipcov ui")
    except InputError as error:
        click.echo(f"clipcov: {error}", err=True)
        sys.exit(2)
