"""Fixtures shared by several test files."""

import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from clipcov_pipeline.pool.bundled import unpack_sample
from lab import Lab
from simulation import Simulation

# `make test` runs test files side by side: each keeps to a core, or their threads wait for one another
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same is tested everywhere: on a machine with GPUs, trainings would take them
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# a shell's background jobs (`make test &`) ignore interruptions, and so would what tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a Dagster instance that is opened sets them for its children, and they outrank what a YAML says
SETTINGS = ("CLIPCOV_CONFIG", "CLIPCOV_WORK_DIR", "DAGSTER_HOME")

# begun first where test files run side by side: begun last, one of them ends minutes after all others
LONGEST = ("test_assets_automation.py", "test_assets_graph.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Each test begins and ends without the settings that another one left in the environment."""
    clear_environment()
    yield
    clear_environment()


def clear_environment() -> None:
    for name in SETTINGS:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sample's own shards."""
    return unpack_sample(tmp_path_factory.mktemp("sample"))[0]


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The small experiment, run once from nothing. Copy it before changing anything.

    Test processes side by side share one: the first to come builds it.
    """
    clear_environment()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, done = shared / "built_lab", shared / "built_lab.json"
    with FileLock(shared / "built_lab.lock"):
        if not done.exists():
            folder.mkdir()
            first_run = Lab.create(folder, shared / "sample").run()
            done.write_text(json.dumps(first_run))
    lab = Lab(folder)
    lab.first_run = Counter(json.loads(done.read_text()))
    return lab


@pytest.fixture
def lab(built_lab: Lab, tmp_path: Path) -> Lab:
    """An independent copy of the experiment after its first run."""
    return built_lab.copy(tmp_path / "lab")


@pytest.fixture
def fresh(tmp_path: Path) -> Simulation:
    """A simulated experiment of which nothing is built."""
    return Simulation(tmp_path)


@pytest.fixture(scope="session")
def simulated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a simulated experiment in which everything is built."""
    simulation = Simulation(tmp_path_factory.mktemp("simulated"))
    simulation.run()
    return simulation.folder


@pytest.fixture
def built(simulated_once: Path, tmp_path: Path) -> Simulation:
    """A simulated experiment in which everything is built, for the test alone."""
    shutil.copytree(simulated_once, tmp_path, dirs_exist_ok=True)
    return Simulation(tmp_path)


@pytest.fixture(scope="session")
def old_experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The YAML of a small experiment that earlier code built, see `make_old_store.py`. Only to be read."""
    return unpacked("store_of_0_2.tar.xz", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="session")
def oldest_experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `old_experiment`, of the time when subsets were tars. Only to be read."""
    return unpacked("store_of_0_1.tar.xz", tmp_path_factory.mktemp("oldest"))


def unpacked(archive: str, folder: Path) -> str:
    with tarfile.open(Path(__file__).with_name(archive)) as tar:
        tar.extractall(folder, filter="data")
    return str(folder / "experiment.yaml")
