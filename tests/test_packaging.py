"""The package as it is installed and as Dagster loads it: names, imports, files."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import assets
import clipcov_pipeline

ROOT = Path(__file__).parent.parent
PACKAGES = ("assets", "clipcov_pipeline")
HEAVY = ("torch", "open_clip", "lancedb", "mlflow", "numba", "sklearn", "matplotlib")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_packages_that_are_imported_are_ours():
    """A folder `tests/assets` or another package of that name would shadow the code location."""
    assert Path(str(assets.__file__)) == ROOT / "assets" / "__init__.py"
    assert Path(str(clipcov_pipeline.__file__)) == ROOT / "clipcov_pipeline" / "__init__.py"
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_every_test_file_is_named_after_what_it_tests():
    """`test_ROOM.py` or `test_ROOM_SUBJECT.py`; a few are of no room."""
    rooms = {path.stem for path in (ROOT / "clipcov_pipeline").iterdir()} | {"assets"}
    apart = {"packaging", "docs", "examples"}
    for path in (ROOT / "tests").glob("test_*.py"):
        subject = path.stem.removeprefix("test_")
        assert subject in apart or subject.partition("_")[0] in rooms, path.name


def test_workspace_and_project_name_the_same_code_location(pyproject):
    (location,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    module = location["python_module"]
    project = pyproject["tool"]["dg"]["project"]
    assert project["root_module"] == "assets"
    assert project["code_location_target_module"] == module["module_name"] == "assets.definitions"
    assert project["code_location_name"] == module["location_name"] == "clipcov"
    assert (ROOT / "assets" / "definitions.py").is_file()


PROBE = """
import json, sys, time
import assets.definitions as module
import dagster
found = {name: value for name, value in vars(module).items() if isinstance(value, dagster.Definitions)}
seconds = time.process_time()
print(json.dumps([list(found), sorted(sys.modules), seconds]))
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[list[str], set[str], float]:
    """What a fresh process has after it loaded the code location: definitions, modules, least CPU seconds."""
    probe, found = [sys.executable, "-c", PROBE], []
    for _ in range(3):
        done = subprocess.run(probe, capture_output=True, text=True, check=True, cwd=ROOT)
        found.append(json.loads(done.stdout))
    definitions, names, _ = found[0]
    # the least: caches that are cold, or shared with what else is at work, cost time of the CPU, too
    return definitions, set(names), min(seconds for _, _, seconds in found)


def test_the_module_that_they_name_holds_the_definitions(loaded):
    assert loaded[0] == ["defs"]


def test_the_code_location_loads_without_heavy_imports(loaded):
    assert sorted(loaded[1] & set(HEAVY)) == []


def test_the_code_location_loads_in_under_3_seconds_of_cpu(loaded):
    print(f"\nassets.definitions: {loaded[2]:.2f} s of CPU")
    assert loaded[2] < 3


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", modules("clipcov_pipeline"), ids=lambda path: path.stem)
def test_the_library_knows_neither_dagster_nor_mlflow_nor_assets(path):
    assert imported(path) & {"dagster", "mlflow", "assets", "tests"} == set()


def imported_from_assets(path: Path) -> set[str]:
    """Modules of the code location that a module imports from, inside functions too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name for name in names if name.startswith("assets.")}


def test_stages_know_each_other_only_by_their_dependencies():
    """definitions -> stage files, one a stage at the top of assets/ -> the folders of shared modules."""
    top = ROOT / "assets"
    stages = {f"assets.{stage}" for stage in clipcov_pipeline_stages()}
    assert len(stages) >= 9
    files = {f"assets.{path.stem}" for path in top.glob("*.py")}
    assert stages <= files
    assert stages <= imported_from_assets(top / "definitions.py")
    for path in modules("assets"):
        if path != top / "definitions.py":
            names = imported_from_assets(path)
            assert names & stages == set(), f"{path} imports {names & stages}"


def clipcov_pipeline_stages() -> tuple[str, ...]:
    from clipcov_pipeline.experiment.stages import STAGES

    return STAGES


@pytest.mark.parametrize("path", modules("assets"), ids=lambda path: path.stem)
def test_annotations_under_assets_are_real(path):
    """Dagster cannot resolve the type of `context` from a string."""
    assert "from __future__ import annotations" not in path.read_text()


def test_every_module_says_what_it_is_for():
    for package in PACKAGES:
        for path in modules(package):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert text, path
            assert len(text) > 20, path


def test_the_wheel_holds_every_file_of_the_packages(tmp_path):
    """The sample, presets and model descriptions are data: setuptools leaves out what is not listed."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building without a network needs setuptools 77 in this environment")
    source = tmp_path / "source"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.tmp")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    expected = {
        str(p.relative_to(source)) for pkg in PACKAGES for p in (source / pkg).rglob("*") if p.is_file()
    }
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--wheel-dir", str(tmp_path / "out")]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *offline], check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    info = f"clipcov_pipeline-{clipcov_pipeline.__version__}.dist-info/"
    assert {name for name in sizes if not name.startswith(info)} == expected
    for name in ("clipart-train.tar.xz", "clipart-heldout-vendor.tar.xz", "LICENSES.md", "class_names.txt"):
        path = f"clipcov_pipeline/pool/sample_data/{name}"
        assert sizes[path] == (ROOT / path).stat().st_size
    assert "clipcov_pipeline/experiment/config/presets/sample.yaml" in sizes
    assert f"{info}licenses/LICENSE" in sizes


def test_the_version_is_one(pyproject):
    assert pyproject["project"]["version"] == clipcov_pipeline.__version__ == version("clipcov-pipeline")


# ---- sizes: what can be read in one sitting

FILES = [path for package in PACKAGES for path in modules(package)]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 50, 8

# numba compiles these as they stand: to cut them, or to pack their arrays, would cost speed
COMPILED_LOOPS = {
    "_candidates",
    "_advance",
    "_bounds",
    "_evaluate",
    "_pick",
    "_settle",
    "score_classes",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file but the compiled loops, with methods and those within others."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function) and not (node.name in COMPILED_LOOPS and is_compiled(node)):
            yield node


def is_compiled(function: Function) -> bool:
    return any("njit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines(function: Function) -> int:
    """From ``def`` to the end, docstring and comments among them; decorators are not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: Function) -> list[str]:
    """What a caller gives: all but ``self`` and ``cls``."""
    given = function.args
    named = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def where(path: Path, function: Function) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_the_rules_see_what_they_are_to_see():
    source = "def f(self, a, /, b, *c, d=1, **e):\n    def g():\n        pass\n    return g\n"
    outer, inner = (n for n in ast.walk(ast.parse(source)) if isinstance(n, Function))
    assert (parameters(outer), lines(outer), lines(inner)) == (["a", "b", "d"], 4, 2)
    assert len(FILES) > 100


def test_no_file_is_longer_than_400_lines():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = [f"{path.relative_to(ROOT)}: {size} lines" for path, size in sizes.items() if size > FILE_LINES]
    assert not long, f"cut by subject, into modules that say their job: {long}"


def test_no_function_is_longer_than_50_lines():
    long = [
        f"{where(path, function)}: {lines(function)} lines"
        for path in FILES
        for function in functions(path)
        if lines(function) > FUNCTION_LINES
    ]
    if long:
        pytest.fail("give the parts of these a name and a function each:\n" + "\n".join(long))


def test_no_function_has_more_than_8_parameters():
    many = [
        f"{where(path, function)}: {len(parameters(function))} parameters"
        for path in FILES
        for function in functions(path)
        if len(parameters(function)) > PARAMETERS
    ]
    if many:
        pytest.fail("what belongs together becomes a record (a NamedTuple):\n" + "\n".join(many))
