"""What tools/measure_code.py measures, held to: CONTRIBUTING's rules about the code itself."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "tools")
LONGEST_FUNCTION, LONGEST_LINE = 80, 100


@pytest.fixture(scope="module")
def measures() -> Any:
    path = ROOT / "tools" / "measure_code.py"
    spec = importlib.util.spec_from_file_location("measure_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(measures: Any) -> Any:
    return measures.Tree(ROOT / "src")


def number(text: str) -> float:
    """The first number of a figure."""
    return float(text.split()[0].rstrip(",:").replace(",", ""))


def test_few_modules_at_the_root(measures: Any, tree: Any) -> None:
    assert number(measures.root_modules(tree)) <= 4


def test_every_public_function_is_annotated_and_documented(measures: Any, tree: Any) -> None:
    assert number(measures.annotated(tree)) == 100
    bare = [
        node.name
        for node, is_public in tree.functions()
        if is_public and ast.get_docstring(node) is None
    ]
    assert bare == []


def test_comments_say_why(measures: Any, tree: Any) -> None:
    assert number(measures.comments(tree)) >= 4


def test_lines_are_short(measures: Any, tree: Any) -> None:
    assert number(measures.line_lengths(tree)) <= 88


def test_a_default_is_written_once(measures: Any, tree: Any) -> None:
    assert measures.repeated_defaults(tree) == "0"


def test_a_new_mechanism_is_three_files(measures: Any, tree: Any) -> None:
    """Its file, its twin, its row: the names of mechanisms stand in no other table."""
    known = {"record/mechanisms.py", "record/studies.py", "experiments/budgets.py"}
    listed = measures.files_with_a_name(tree).partition(": ")[2].split(", ")
    assert set(listed) <= known, "studies name what they train, budgets what others are matched to"


def test_the_measures_see_what_they_are_for(measures: Any, tmp_path: Path) -> None:
    """Planted: a module at the root, a bare function, a default written again, a list of names."""
    package = tmp_path / "mka"
    (package / "memory").mkdir(parents=True)
    (package / "loose.py").write_text("def bare(x):\n    return ('mka', 'fmka')\n")
    for name in ("a", "b"):
        text = "class Layer:\n    def __init__(self, chunk_size: int = 16) -> None:\n        pass\n"
        (package / "memory" / f"{name}.py").write_text(text)
    planted = measures.Tree(tmp_path)
    assert measures.root_modules(planted) == "1"
    assert number(measures.documented(planted)) == 0
    assert number(measures.annotated(planted)) < 100
    assert measures.repeated_defaults(planted) == "1"
    assert measures.files_with_a_name(planted) == "1: loose.py"


def num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def functions() -> Iterator[tuple[str, int]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    where = f"{path.relative_to(ROOT)}:{node.name}"
                    whole = num_lines(node)
                    text = node.body[0] if ast.get_docstring(node) is not None else None
                    yield where, whole - (num_lines(text) if text else 0)


def test_no_function_is_long() -> None:
    assert [where for where, lines in functions() if lines > LONGEST_FUNCTION] == []
