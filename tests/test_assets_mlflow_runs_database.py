"""A kill during MLflow's first migrations, at a statement in their middle: the store opens ever after."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from assets.mlflow_runs.database import ensure_database, is_made

KILLED = """
import os, signal, sys
from pathlib import Path
import sqlalchemy
left = int(sys.argv[3])

@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global left
    left -= statement.lstrip().startswith(("CREATE", "ALTER", "DROP"))
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "mlflow":  # as MLflow does it itself
    from mlflow import MlflowClient
    MlflowClient(f"sqlite:///{sys.argv[2]}")
else:
    from assets.mlflow_runs.database import ensure_database
    ensure_database(Path(sys.argv[2]))
"""

OPENED = "import sys; from mlflow import MlflowClient; MlflowClient(f'sqlite:///{sys.argv[1]}')"


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", *argv], capture_output=True, text=True, check=False)


def experiments(database: Path) -> list[tuple[str]]:
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT name FROM experiments").fetchall()


@pytest.mark.slow
def test_a_store_that_mlflow_left_half_made_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    assert python(KILLED, "mlflow", str(database), "60").returncode == -signal.SIGKILL
    assert python(OPENED, str(database)).returncode == 1  # what every later open came to
    assert not is_made(database)
    ensure_database(database)
    assert "held no run" in caplog.text
    assert experiments(database) == [("Default",)]
    assert python(OPENED, str(database)).returncode == 0


@pytest.mark.slow
def test_a_kill_while_it_is_made_leaves_none(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    assert python(KILLED, "clipcov", str(database), "60").returncode == -signal.SIGKILL
    assert not database.exists()
    ensure_database(database)
    assert is_made(database)


def test_what_is_no_store_at_all_is_left_alone(tmp_path: Path) -> None:
    """It may have held runs."""
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        ensure_database(database)
    assert database.read_bytes() == b"no database" * 100
