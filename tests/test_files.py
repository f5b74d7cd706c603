"""What is read again is written whole or not at all, everywhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipcov_pipeline.files import write_text_at_once

REPO = Path(__file__).parent.parent

# files that are written in place, and why none of them can be taken for whole
IN_PLACE = {
    "clipcov_pipeline/files.py": "the helper itself",
    "clipcov_pipeline/pool/packing.py": "a part of an entry",
    "clipcov_pipeline/pool/bundled.py": "into a temporary folder, which is renamed",
    "clipcov_pipeline/proxy/vectors.py": "an empty lock",
    "clipcov_pipeline/report/drawing.py": "a part of an entry: the store renames its folder last",
    "clipcov_pipeline/report/fiftyone.py": "an export into an empty folder, its metadata last",
    "clipcov_pipeline/report/gallery.py": "a part of an entry",
    "clipcov_pipeline/selection/outputs.py": "into a temporary folder, each file renamed",
    "clipcov_pipeline/subsets/files.py": "tars of an entry or of an export, their list last",
    "clipcov_pipeline/training/remote_reads.py": "what is fetched: a .part that is renamed",
    "clipcov_pipeline/training/seen.py": "inside written_at_once",
    "assets/leaderboard.py": "a part of an entry",
    "assets/scores.py": "a part of an entry",
    "assets/training/worker.py": "a log that people read",
}


def writes(path: Path) -> Iterator[int]:
    """Lines that open a file for writing, or write a whole one, by the syntax tree."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        given = [*node.args, *(word.value for word in node.keywords)]
        modes = [arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        opened = name == "open" and any(mode[:1] in tuple("wxa") and len(mode) < 4 for mode in modes)
        if opened or name in ("write_text", "write_bytes"):
            yield node.lineno


def test_no_other_code_writes_a_file_in_place() -> None:
    rooms = [*(REPO / "clipcov_pipeline").rglob("*.py"), *(REPO / "assets").rglob("*.py")]
    found = {path.relative_to(REPO).as_posix() for path in rooms if any(writes(path))}
    assert {name for name in found if not name.startswith("clipcov_pipeline/bench/")} - {
        "clipcov_pipeline/commands/bench.py"
    } == set(IN_PLACE)  # a benchmark's table is looked at, not read again


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("a.write_text('x')\nopen(b, 'wb')\np.open(mode='a')\np.open('rb')\nfs.open(p, 'w')\n")
    assert sorted(writes(code)) == [1, 2, 3, 5]


WRITE = """
import resource, sys
from pathlib import Path
from clipcov_pipeline.files import write_text_at_once
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
write_text_at_once(Path(sys.argv[1]), "new" * 100)
"""


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "folder" / "note.json"
    if before is not None:
        write_text_at_once(path, before)
    argv = [sys.executable, "-c", WRITE, str(path)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "File too large" in run.stderr
    assert [file.read_text() for file in path.parent.iterdir()] == ([] if before is None else [before])
