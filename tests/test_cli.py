"""The ``clipcov`` command as a user meets it: what it prints, its exit codes, and a line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipcov_pipeline.cli import COMMANDS
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.records import WHOLE
from clipcov_pipeline.experiment.store import Store
from make_shards import write_pool

CLIPCOV = Path(sys.executable).with_name("clipcov")
SETTINGS: dict[str, Any] = {
    "name": "mine",
    "shards": {"source": "pool"},
    "proxy": {"model": "clipcov-tiny-RN", "train": {"samples_seen": 64, "batch_size": 64, "warmup": 0}},
    "labels": {"class_names": "names.txt", "templates": ["{}"]},
    "select": {"fractions": [0.5], "methods": {"clipcov": {}, "random": {}}},
    "train": {"model": "clipcov-tiny-RN", "samples_seen": 64, "batch_size": 64, "warmup": 0},
    "evaluate": {"sets": {"other": {"shards": "other"}}, "primary_metric": "holdout/text_retrieval_recall@5"},
}


class Place:
    """A folder with a small valid experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.yaml = folder / "experiment.yaml"
        write_pool(folder / "pool", 2, 5)
        write_pool(folder / "other", 1, 2)
        (folder / "names.txt").write_text("cat\ndog\n")
        self.write(SETTINGS)

    @property
    def work(self) -> Path:
        return self.folder / "elsewhere" / "work"

    def write(self, settings: dict[str, Any]) -> None:
        self.yaml.write_text(yaml.safe_dump(settings))

    def set(self, path: str, value: Any) -> None:
        settings = yaml.safe_load(self.yaml.read_text())
        *sections, key = path.split(".")
        section = settings
        for name in sections:
            section = section[name]
        section[key] = value
        self.write(settings)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("CLIPCOV", "DAGSTER"))
        }
        return subprocess.run(
            [CLIPCOV, *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**kept, "CLIPCOV_WORK_DIR": str(self.work), "PYTHONWARNINGS": "error:::clipcov_pipeline"},
            check=False,
        )

    def content(self) -> dict[str, tuple[bytes, int]]:
        """Every file below the folder."""
        return {
            str(path.relative_to(self.folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in self.folder.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def mistake(place: Place, *arguments: str) -> str:
    """Run what must be refused: exit code 2, one line on stderr, nothing else printed, nothing written."""
    before = place.content()
    done = place.run(*(arguments or ("plan", "--config", str(place.yaml))))
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("clipcov: ")
    assert place.content() == before
    assert not place.work.exists()
    return done.stderr.removeprefix("clipcov: ").rstrip("\n").replace(str(place.folder), "HERE")


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.epoch", 3, "HERE/experiment.yaml: train.epoch: unknown key, did you mean 'epochs'?"),
        (
            "select.fractions",
            [0],
            "HERE/experiment.yaml: select.fractions.0: found 0, expected: greater than 0",
        ),
        (
            "select.fractions",
            [1.5],
            "HERE/experiment.yaml: select.fractions.0: found 1.5, expected: less than 1",
        ),
        (
            "select.methods",
            {"clipcv": {}},
            "HERE/experiment.yaml: select.methods.clipcv.method: found 'clipcv', expected one of clipcov,",
        ),
        ("train.model", "RN5", "train.model: 'RN5' is not an open_clip architecture; did you mean RN5"),
        ("proxy.model", "tiny", "proxy.model: 'tiny' is not an open_clip architecture; "),
        ("train.pretrained", "gone.pt", "train.pretrained: no checkpoint file at HERE/gone.pt; give an"),
        (
            "labels.class_names",
            "name.txt",
            "labels.class_names: cannot read HERE/name.txt (No such file or directory), did you mean"
            " 'names.txt'?; give",
        ),
        ("labels.class_names", "gone.txt", "labels.class_names: cannot read HERE/gone.txt (No such file"),
        ("shards.source", "gone", "data source HERE/gone"),
        ("evaluate.sets.other.shards", "gone", "data source HERE/gone"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_yaml_is_one_line_with_exit_code_2(place, path, value, message):
    place.set(path, value)
    assert mistake(place).startswith(message)


def test_an_empty_folder(place):
    shutil.rmtree(place.folder / "pool")
    (place.folder / "pool").mkdir()
    line = mistake(place)
    assert line.startswith("data source HERE/pool")
    assert "tar" in line


def test_a_class_list_with_duplicates(place):
    (place.folder / "names.txt").write_text("cat\ndog\ncat\n")
    assert mistake(place) == (
        "labels.class_names: HERE/names.txt names 'cat' more than once; keep one line of each"
    )


def test_a_half_written_yaml(place):
    place.yaml.write_text("name: mine\nproxy: {model: RN50, pretr")
    assert mistake(place).startswith("HERE/experiment.yaml: not readable as YAML: ")


def test_a_mistake_is_found_before_the_sample_is_unpacked(place):
    place.set("shards.source", "sample")
    place.set("train.model", "RN5")
    mistake(place)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gone.yaml", "config 'gone.yaml' not found, expected a YAML file: check the path"),
        ("smaple", "preset 'smaple' not found, expected one of ["),
    ],
)
def test_a_missing_config(place, config, message):
    assert mistake(place, "plan", "--config", config).startswith(message)


def test_run_checks_before_it_touches_anything(place):
    line = mistake(place, "run", "--config", str(place.yaml), "--only", "subset")
    assert line.startswith("--only subset: unknown stage, expected one of raw_shards, proxy_model,")


def test_a_pool_smaller_than_the_batch(place):
    """Known only when the shards have been read: these stay read, and the line comes before any training."""
    done = place.run("run", "--config", str(place.yaml))
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("clipcov: ")
    assert "batch_size: found 64, expected at most" in line
    after = place.run("plan", "--config", str(place.yaml), "--json")
    statuses = {row["step"]: row["status"] for row in map(json.loads, after.stdout.splitlines())}
    assert "raw_shards/00000" not in statuses
    assert statuses["proxy_model"] == "build"


def test_an_unknown_command_or_option_is_a_usage_error(place):
    for arguments in (["paln"], ["plan", "--confg", "x"]):
        done = place.run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Usage: clipcov" in done.stderr
        assert "Traceback" not in done.stderr


# --- what works -------------------------------------------------------------------------------------


def test_plan_says_what_would_run_and_runs_nothing(place):
    before = place.content()
    done = place.run("plan", "--config", str(place.yaml))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["build", "raw_shards/00000", "not", "built", "yet"]
    assert lines[2].split(maxsplit=2) == ["wait", "proxy_model", "waits for raw_shards/00000 and 1 more"]
    assert lines[-1].startswith("raw_shards: 2 build; proxy_model: 1 wait; embeddings: 2 wait; ")
    assert place.content() == before
    assert not place.work.exists()


def test_the_tag_of_the_proxy_that_stands_is_not_checked_again(place):
    """To check a tag open_clip is imported, and torch with it: seconds, for every command."""
    place.set("proxy", {"model": "ViT-B-32-quickgelu", "pretrained": "openai"})
    code = (
        "import sys; from clipcov_pipeline.experiment.project import Project;"
        f"Project.open({str(place.yaml)!r}); print('open_clip' in sys.modules)"
    )

    def imports_open_clip() -> str:
        env = {**os.environ, "CLIPCOV_WORK_DIR": str(place.work)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
        )
        return done.stdout.strip()

    assert imports_open_clip() == "True"
    about: dict[str, Any] = {"code_version": "1", "params": {}, "sources": {}, "inputs": {}}
    with Store(place.work / "store").write("proxy_model", WHOLE, digest_of(1), **about) as entry:
        entry.stats = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
    assert imports_open_clip() == "False"
    place.set("proxy.pretrained", "opnai")
    done = place.run("plan", "--config", str(place.yaml))
    assert done.returncode == 2
    assert done.stderr.startswith("clipcov: proxy.pretrained: 'opnai' is neither a file nor an open_clip tag")


def test_plan_as_json(place):
    done = place.run("plan", "--config", str(place.yaml), "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0] == {"step": "raw_shards/00000", "status": "build", "why": ["not built yet"]}
    assert rows[-1]["step"] == "report"
    assert {row["status"] for row in rows} == {"build", "wait"}


def test_the_config_may_come_from_the_environment(place):
    done = subprocess.run(
        [CLIPCOV, "plan"],
        capture_output=True,
        text=True,
        env={**os.environ, "CLIPCOV_CONFIG": str(place.yaml), "CLIPCOV_WORK_DIR": str(place.work)},
        check=True,
    )
    assert "raw_shards/00001" in done.stdout


def test_help_names_every_command_and_each_can_be_found(place):
    done = place.run("--help")
    assert done.returncode == 0
    for name, (_, text) in COMMANDS.items():
        assert f"\n  {name} " in done.stdout
        assert text in " ".join(done.stdout.split())
    assert place.run("--version").stdout.startswith("clipcov, version ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("run", "ui")])
def test_every_command_explains_itself(place, name):
    done = place.run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: clipcov {name}")


def test_help_and_plan_do_not_pay_for_torch_or_dagster():
    program = """
import sys, clipcov_pipeline.cli, clipcov_pipeline.commands.plan, clipcov_pipeline.experiment.project
heavy = {"torch", "open_clip", "lancedb", "dagster", "mlflow", "numba", "sklearn", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
