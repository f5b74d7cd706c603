"""``clipcov ui``: the Dagster UI with its daemon, and MLflow, all on this machine only."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click
from filelock import FileLock, Timeout

from assets.display.asset_checks import report_checks
from assets.display.staleness import report_staleness
from assets.mlflow_runs.tracking import mlflow_runs_url, tracking_uri
from assets.partitions import sync_partitions
from assets.running.guard import HOST_VARIABLE, allowed_hosts, is_loopback
from assets.running.instance import project_instance
from assets.steps.orphans import close_orphans, notices
from clipcov_pipeline.cli import guarded
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.automation import Ui
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.project import Project

WORKSPACE = Path(__file__).parents[2] / "workspace.yaml"


# no calls home, and none of the server's eight processes for jobs that nobody here submits
MLFLOW_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

STOP_SECONDS = 20


@click.command()
@click.option("--config", help="YAML file or preset; default $CLIPCOV_CONFIG, else the sample.")
def main(config: str | None) -> None:
    """Serve both user interfaces until Ctrl-C."""
    project = Project.open(config)
    ui = project.config.ui
    check_ports(ui)
    with project_instance(project.config) as instance:
        claim = claim_ui(project.config)
        for line in notices(close_orphans(instance, project.config, launched=claim.is_locked)):
            click.echo(line)
        plan = project.plan()
        sync_partitions(instance, plan)
        report_staleness(instance, plan)
        report_checks(instance, project.config, plan)
    # this creates the store, which the server then finds up to date
    click.echo(f"Dagster  http://{ui.host}:{ui.dagster_port}\nMLflow   {mlflow_runs_url(project.config)}")
    sys.exit(serve(commands(project.config), ui.host))


def claim_ui(config: Config) -> FileLock:
    """Return a lock that this process holds for its life, unless another UI of the project has it."""
    lock = FileLock(config.work / "dagster_home" / "ui.lock")
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock


def check_ports(ui: Ui) -> None:
    """Raise InputError when another program listens where a server should."""
    for name in ("dagster_port", "mlflow_port"):
        with socket.socket() as probe:
            if probe.connect_ex((ui.host, getattr(ui, name))) == 0:
                raise InputError(
                    f"ui.{name}: found {getattr(ui, name)} in use by another program, expected a free port:"
                    " stop that program or choose another port in the YAML"
                )


def commands(config: Config) -> Mapping[str, list[str]]:
    """Return the servers' command lines by name; they listen on ``ui.host`` only."""
    ui, module = config.ui, [sys.executable, "-m"]
    workspace = ["--workspace", str(WORKSPACE)]
    artifacts = (config.work / "mlflow" / "artifacts").resolve().as_uri()
    server = [*module, "assets.running.webserver", "--host", ui.host, "--port", str(ui.dagster_port)]
    mlflow = [*module, "assets.running.mlflow_server", "server"]
    mlflow += ["--host", ui.host, "--port", str(ui.mlflow_port), "--allowed-hosts", _mlflow_hosts(ui)]
    mlflow += ["--backend-store-uri", tracking_uri(config.work), "--default-artifact-root", artifacts]
    return {
        "Dagster's web server": [*server, *workspace],
        "Dagster's daemon": [
            *module,
            "assets.running.daemon",
            "--log-level",
            "warning",
            *workspace,
        ],
        "MLflow": [*mlflow, "--workers", "1"],
    }


def _mlflow_hosts(ui: Ui) -> str:
    """What MLflow's own check of hosts takes; addresses in numbers are left to the guard before it."""
    names = allowed_hosts(ui.host)
    return (
        ",".join([*names, *(f"{name}:{ui.mlflow_port}" for name in names)]) if is_loopback(ui.host) else "*"
    )


def serve(commands: Mapping[str, list[str]], host: str) -> int:
    """Run the servers until Ctrl-C or SIGTERM, or until one of them ends; return the exit code.

    ``host``: where they listen, for the guard before them.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background programs with SIGINT ignored
        signal.signal(signum, signal.default_int_handler)
    environment = {**os.environ, **MLFLOW_SETTINGS, HOST_VARIABLE: host}
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            # a session of its own: Ctrl-C reaches only this process, which then stops them in order
            servers[name] = subprocess.Popen(command, env=environment, start_new_session=True)
        while True:
            for name, server in servers.items():
                if server.poll() is not None:
                    click.echo(
                        f"{name} has ended with code {server.returncode}, stopping the others", err=True
                    )
                    return server.returncode or 1
            time.sleep(0.5)
    except KeyboardInterrupt:
        click.echo("stopping")
        return 0
    finally:
        stop(list(servers.values()))


def stop(servers: list[subprocess.Popen[bytes]]) -> None:
    """Ask every server to end, then kill what is left of it and of its children."""
    for server in servers:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.wait(max(deadline - time.monotonic(), 0.1))
        with suppress(ProcessLookupError):  # all gone, as it should be
            os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    guarded(main, "clipcov ui")
