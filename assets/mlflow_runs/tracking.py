"""MLflow: a run a recipe, below one of the experiment, found again by tag, linked with Dagster both ways."""

import json
import logging
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from assets.mlflow_runs.database import ensure_database, is_made
from clipcov_pipeline.experiment.config.experiment import Config
from clipcov_pipeline.experiment.digests import git_commit
from clipcov_pipeline.experiment.project import Project

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FINGERPRINT_TAG = "clipcov.fingerprint"

ARTIFACTS = "/mlflow/artifacts/"

ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

KIND_TAG = "clipcov.kind"

EXPERIMENT_RUN, ARM_RUN = "experiment", "arm"


# MLflow 3 opens on pages for language models and their traces, unless an address or a tag says otherwise
TRAINING_VIEW = "workflowType=machine_learning"

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

DIGEST_DIGITS = 16  # MLflow takes 36 at most; the whole digest is among the run's tags

MAX_BATCH = 100  # MLflow's bound on parameters a request


def tracking_uri(work: Path) -> str:
    """Return the SQLite store's address; absolute, so that every process means the same one."""
    return f"sqlite:///{(work / 'mlflow' / 'mlflow.db').resolve()}"


def metric_name(name: str) -> str:
    """Return a score's name as MLflow allows it (no ``@``)."""
    return name.replace("@", "_at_")


class Tracking:
    """MLflow runs of one experiment."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.work / "mlflow"

    def client(self) -> "MlflowClient":
        """Return a client on the work folder's SQLite store."""
        from mlflow import MlflowClient

        # a line a table when the store is created, a line a model
        for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with self.alone():
            ensure_database(self.folder / "mlflow.db")
            _follow_moved_artifacts(self.folder)
            return MlflowClient(tracking_uri(self.config.work))

    def alone(self) -> FileLock:
        """Return a lock for what is created on first use, which arms side by side would create twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "first_use.lock")

    def experiment_id(self) -> str:
        """Return the MLflow experiment's id; created on first use with artifacts below the work folder."""
        client = self.client()
        with self.alone():
            found = client.get_experiment_by_name(self.config.name)
            if found is None:
                place = (self.folder / "artifacts" / self.config.name).resolve().as_uri()
                return client.create_experiment(
                    self.config.name, artifact_location=place, tags=EXPERIMENT_TAGS
                )
        for key, value in EXPERIMENT_TAGS.items():
            if key not in found.tags:
                client.set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id

    def parent(self) -> str:
        """Return the id of the experiment's own run, which groups the arms' runs; created on first use.

        It is never left open: it holds the leaderboard, and what is logged to a finished run is kept as well.
        """
        client, experiment = self.client(), self.experiment_id()
        tags = {
            KIND_TAG: EXPERIMENT_RUN,
            "mlflow.note.content": "The arms are the runs below; the leaderboard is among the artifacts.",
        }
        with self.alone():
            found = f"tags.`{KIND_TAG}` = '{EXPERIMENT_RUN}'"
            if runs := client.search_runs([experiment], found, max_results=1):
                return runs[0].info.run_id
            run = client.create_run(experiment, run_name=self.config.name, tags=tags)
        client.set_terminated(run.info.run_id)
        return run.info.run_id

    def find(self, fingerprint: str) -> "Run | None":
        """Return the run of a checkpoint by its fingerprint, so that a retry goes on in it."""
        runs = self.client().search_runs(
            [self.experiment_id()], f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", max_results=1
        )
        return runs[0] if runs else None

    def start(self, name: str, fingerprint: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Create the run of a checkpoint, or open it again; return its id."""
        from mlflow.entities import Param, RunTag

        client = self.client()
        run = self.find(fingerprint)
        every_tag = {
            **tags,
            KIND_TAG: ARM_RUN,
            "mlflow.parentRunId": self.parent(),
            FINGERPRINT_TAG: fingerprint,
            "clipcov.git_commit": git_commit(),
            "mlflow.source.name": "clipcov",
            "mlflow.source.type": "LOCAL",
        }
        if run is None:
            run = client.create_run(self.experiment_id(), run_name=name, tags=every_tag)
            values = [Param(key, str(value)) for key, value in params.items()]
            for start in range(0, len(values), MAX_BATCH):
                client.log_batch(run.info.run_id, params=values[start : start + MAX_BATCH])
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in every_tag.items()])
        return run.info.run_id

    def unfinished(self) -> list[tuple[str, str]]:
        """Return (run, Dagster run) of what is being trained, of all experiments of the work folder.

        By SQL: every tick asks, and mostly nothing is left, for which MLflow need not be imported.
        """
        database = self.folder / "mlflow.db"
        if not is_made(database):
            return []
        query = (
            "SELECT run_uuid, value FROM runs JOIN tags USING (run_uuid)"
            " WHERE status = 'RUNNING' AND key = 'dagster.run_id'"
        )
        with self.alone(), closing(sqlite3.connect(database)) as connection:
            return connection.execute(query).fetchall()

    def is_there(self, run_id: str) -> bool:
        """Return whether a run can be logged to: it may have been deleted in MLflow."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client().get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise  # such as a database that is locked
            return False

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(metric_name(name), float(value), now, step) for name, value in metrics.items()]
        self.client().log_batch(run_id, metrics=values)

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file into the run's artifacts."""
        self.client().log_artifact(run_id, str(path), folder)

    def log_config(self, run_id: str, project: Project) -> None:
        """Keep the YAML that the run was made under; the file may have been edited since."""
        if (path := project.config.path) is not None:
            self.client().log_text(run_id, project.config_text, f"config/{path.name}")

    def log_dataset(self, run_id: str, name: str, digest: str, folder: Path, rows: int) -> None:
        """Note the data that a run trained on; the same data twice is noted once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_DIGITS],
            source_type="local",
            source=json.dumps({"uri": folder.resolve().as_uri()}),
            profile=json.dumps({"num_rows": rows}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self.client().log_inputs(run_id, [DatasetInput(dataset, tags)])

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run: FINISHED, FAILED or KILLED."""
        self.client().set_terminated(run_id, status)


@lru_cache(maxsize=8)  # once a process
def _follow_moved_artifacts(folder: Path) -> None:
    """Let MLflow find its artifacts after the work folder was moved: its store holds absolute addresses."""
    database, place = folder / "mlflow.db", (folder / "artifacts").resolve().as_uri()
    if not database.is_file():
        return
    with closing(sqlite3.connect(database)) as connection, connection:
        locations = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        parts = [str(location).rpartition(ARTIFACTS) for (location,) in locations]
        for old in {before + found.rstrip("/") for before, found, _ in parts if found} - {place}:
            for table, column in ADDRESSES:
                end = len(old) + 1
                moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                connection.execute(f"{moved} WHERE substr({column}, 1, ?) = ?", (place, end, end, f"{old}/"))
            data = (f'"{old.removesuffix(ARTIFACTS[:-1])}/', f'"{place.removesuffix(ARTIFACTS[:-1])}/')
            connection.execute("UPDATE datasets SET dataset_source = replace(dataset_source, ?, ?)", data)


def local_path(uri: str) -> Path:
    """Return the path of a ``file://`` address."""
    return Path(url2pathname(urlsplit(uri).path))


def mlflow_run_url(config: Config, run_id: str) -> str:
    """Return the address of an MLflow run's page, among the trainings rather than MLflow's GenAI pages."""
    experiment = _experiment_of(config.work / "mlflow" / "mlflow.db", run_id)
    place = f"experiments/{experiment}/runs/{run_id}?{TRAINING_VIEW}" if experiment else f"runs/{run_id}"
    return f"http://{config.ui.host}:{config.ui.mlflow_port}/#/{place}"


def mlflow_runs_url(config: Config) -> str:
    """Return the address of the experiment's table of runs, the best by the primary metric first."""
    best = quote(f"metrics.`{metric_name(config.evaluate.primary_metric)}`", safe="")
    return (
        f"http://{config.ui.host}:{config.ui.mlflow_port}/#/experiments/{Tracking(config).experiment_id()}/runs"
        f"?{TRAINING_VIEW}&orderByKey={best}&orderByAsc=false"
    )


def _experiment_of(database: Path, run_id: str) -> str | None:
    """Return the experiment of a run; by SQL, because it is asked for by stages that need no MLflow."""
    if not database.is_file():
        return None
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT experiment_id FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    return str(found[0]) if found else None


def dagster_run_url(config: Config, run_id: str) -> str:
    """Return the address of a Dagster run's page."""
    return f"http://{config.ui.host}:{config.ui.dagster_port}/runs/{run_id}"
