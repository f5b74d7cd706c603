"""The project's Dagster instance, below the work folder."""

import os

import dagster as dg
import yaml

from clipcov_pipeline.experiment.config.experiment import Config

SETTINGS = {
    "telemetry": {"enabled": False},
    "nux": {"enabled": False},  # the newsletter dialog over the first page
    # "Materialize all" is a chain of runs: none should wait long in the queue
    "run_coordinator": {
        "module": "dagster.core.run_coordinator",
        "class": "QueuedRunCoordinator",
        "config": {"dequeue_interval_seconds": 1},
    },
    "concurrency": {"pools": {"granularity": "op", "default_limit": 1}},
    # a run that does not start is closed, and what a run that has ended held of a pool is given back
    "run_monitoring": {"enabled": True, "poll_interval_seconds": 15, "free_slots_after_run_end_seconds": 30},
}


def set_dagster_home(config: Config) -> None:
    """Create Dagster's home below the work folder and make this process and its children use it."""
    home = config.work / "dagster_home"
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text(yaml.safe_dump(SETTINGS))
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["CLIPCOV_WORK_DIR"] = str(config.work)
    if config.path is not None:
        os.environ["CLIPCOV_CONFIG"] = str(config.path)


def project_instance(config: Config) -> dg.DagsterInstance:
    """Open the project's instance, so that its UI shows what is run here."""
    set_dagster_home(config)
    instance = dg.DagsterInstance.get()
    for pool, slots in config.automation.pools.items():
        instance.event_log_storage.set_concurrency_slots(pool, slots)
    return instance
