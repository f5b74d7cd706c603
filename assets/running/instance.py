"""The project's Dagster instance, below the work folder."""

import logging
import os
from pathlib import Path

import dagster as dg
import yaml

from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.files import write_text_at_once

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
    """Create Dagster's home below the work folder and make this process and its children use it.

    A `dagster.yaml` that holds no settings is written again; one with others is left as it is, with a line.
    """
    home = config.work / "dagster_home"
    settings = home / "dagster.yaml"
    _keep_settings(settings)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["CLIPCOV_WORK_DIR"] = str(config.work)
    if config.path is not None:
        os.environ["CLIPCOV_CONFIG"] = str(config.path)


def _keep_settings(path: Path) -> None:
    found = _settings_of(path)
    if not isinstance(found, dict) or not found:
        if path.exists():
            logging.getLogger(__name__).warning(f"{path} held no settings (a full disk?): written again")
        write_text_at_once(path, yaml.safe_dump(SETTINGS))
    elif changed := [key for key in SETTINGS if found.get(key) != SETTINGS[key]]:
        logging.getLogger(__name__).warning(
            f"{path}: {', '.join(changed)} are not as this version writes them; kept: remove the file to have"
            " it written again"
        )


def _settings_of(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def project_instance(config: Config) -> dg.DagsterInstance:
    """Open the project's instance, so that its UI shows what is run here."""
    set_dagster_home(config)
    instance = dg.DagsterInstance.get()
    for pool, slots in config.automation.pools.items():
        instance.event_log_storage.set_concurrency_slots(pool, slots)
    return instance
