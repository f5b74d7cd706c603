"""Nothing grows beyond what can be read in one sitting: files, functions and their parameters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("assets", "clipcov_pipeline") for path in (ROOT / package).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 50, 8

# numba compiles these as they stand: to cut them, or to pack their arrays, would cost speed
COMPILED_LOOPS = {"greedy_classes", "_greedy_class", "batch_classes"}

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
