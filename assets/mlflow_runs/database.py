"""MLflow's SQLite store: whole or not there, though a kill may come among its many first migrations."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from clipcov_pipeline.files import written_at_once


def ensure_database(database: Path) -> None:
    """Make MLflow's store beside its place and rename it there; one that was never finished is made again.

    Hold `Tracking.alone` meanwhile.
    """
    if is_made(database):
        return
    if database.exists():
        logging.getLogger(__name__).warning(
            f"{database} was never finished (a kill or a full disk at its first use) and held no run:"
            " made again"
        )
        for left in database.parent.glob(f"{database.name}*"):  # with the journal of the broken migration
            left.unlink()
    with written_at_once(database) as temporary:
        _make(temporary)


def is_made(database: Path) -> bool:
    """Return whether the store was finished: MLflow writes its first experiment after all migrations.

    Raises:
        sqlite3.DatabaseError: no SQLite file, or one that is damaged: it may have held runs.
    """
    if not database.is_file():
        return False
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'experiments'"
        if not connection.execute(query).fetchone()[0]:
            return False
        return bool(connection.execute("SELECT count(*) FROM experiments").fetchone()[0])


def _make(path: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{path.resolve()}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()
