"""What the code is like, as figures: `python tools/measure_code.py [SRC ...]`, a column per tree.

Needs the standard library and radon. SRC is a folder that holds `mka`, by default this checkout's.
"""

import ast
import io
import os
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from radon.complexity import cc_visit
from radon.raw import analyze

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
FOR_TOOLS = ("noqa", "pyright:", "type:", "fmt:")
KINDS = ("mha", "mqa", "gqa", "mla", "mka", "fmka")
DRAWING = ("matplotlib", "altair", "vl_convert", "torch", "transformers", "rich", "numpy")
DEFAULTS = ("chunk_size", "top_k", "session_stride", "session_slots", "session_decay")
"""Options of the memories whose default must be written once."""


class Tree:
    """One tree of sources, read once."""

    def __init__(self, src: Path) -> None:
        self.src = src
        self.files = sorted((src / "mka").rglob("*.py"))
        self.texts = [path.read_text(encoding="utf-8") for path in self.files]
        self.modules = [ast.parse(text) for text in self.texts]

    @property
    def lines(self) -> list[str]:
        """All lines of all files."""
        return [line for text in self.texts for line in text.splitlines()]

    def functions(self) -> Iterator[tuple[FunctionNode, bool]]:
        """Every function, and whether it is public: neither private, nor within another
        function."""
        for module in self.modules:
            yield from functions_in(module, inside=False)


def functions_in(node: ast.AST, *, inside: bool) -> Iterator[tuple[FunctionNode, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child, not inside and not child.name.startswith("_")
            yield from functions_in(child, inside=True)
        else:
            yield from functions_in(child, inside=inside)


def root_modules(tree: Tree) -> str:
    return str(
        sum(path.parent == tree.src / "mka" and "__" not in path.name for path in tree.files)
    )


def num_files(tree: Tree) -> str:
    sizes = sorted(len(text.splitlines()) for text in tree.texts)
    return f"{len(sizes)} (median {statistics.median(sizes):.0f}, largest {sizes[-1]})"


def physical_lines(tree: Tree) -> str:
    return f"{len(tree.lines):,}"


def source_lines(tree: Tree) -> str:
    return f"{sum(analyze(text).sloc for text in tree.texts):,}"


def logical_lines(tree: Tree) -> str:
    return f"{sum(analyze(text).lloc for text in tree.texts):,}"


def characters(tree: Tree) -> str:
    """Of the code alone, however it is laid out: as `ast.unparse` writes it, without docstrings."""
    return f"{sum(len(ast.unparse(without_strings(module))) for module in tree.modules):,}"


def without_strings(module: ast.Module) -> ast.Module:
    """The module without its docstrings."""
    copy = ast.parse(ast.unparse(module))
    for node in ast.walk(copy):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                kept = [child for child in body if not is_docstring(child)]
                setattr(node, name, kept or [ast.Pass()] if body else body)
    return copy


def is_docstring(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def longest_function(tree: Tree) -> str:
    spans = [(node.end_lineno or 0) - node.lineno + 1 for node, _ in tree.functions()]
    return f"{max(spans)} lines (median {statistics.median(spans):.0f})"


def annotated(tree: Tree) -> str:
    public = [node for node, is_public in tree.functions() if is_public]
    return share(sum(is_annotated(node) for node in public), len(public))


def is_annotated(node: FunctionNode) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    return all(argument.annotation for argument in named) and node.returns is not None


def documented(tree: Tree) -> str:
    public = [node for node, is_public in tree.functions() if is_public]
    return share(sum(ast.get_docstring(node) is not None for node in public), len(public))


def share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} % of {total:,}"


def comments(tree: Tree) -> str:
    """Lines with a comment, alone or after code; what only speaks to a tool does not count."""
    count = 0
    for text in tree.texts:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            words = token.string.lstrip("# ")
            count += token.type == tokenize.COMMENT and not words.startswith(FOR_TOOLS)
    return share(count, len(tree.lines))


def line_lengths(tree: Tree) -> str:
    lengths = [len(line) for line in tree.lines if line.strip()]
    return f"{statistics.quantiles(lengths, n=10)[8]:.0f}, {max(lengths)}"


def complexity(tree: Tree) -> str:
    values = [block.complexity for text in tree.texts for block in cc_visit(text)]
    return f"{statistics.mean(values):.1f}, {statistics.quantiles(values, n=20)[18]:.0f}"


def imports_of_help(tree: Tree) -> str:
    """Modules that `mka --help` imports, and the heavy packages among them."""
    command = [sys.executable, "-X", "importtime", "-m", "mka", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tree.src)}
    ran = subprocess.run(  # noqa: S603 (our own command)
        command, capture_output=True, text=True, env=environment, check=True
    )
    names = re.findall(r"^import time:.*\|\s+(\S+)$", ran.stderr, re.MULTILINE)
    heavy = [name for name in DRAWING if name in names]
    return f"{len(names)}, {', '.join(heavy) or 'none of them heavy'}"


def repeated_defaults(tree: Tree) -> str:
    """Parameters and fields of the memories whose default is a literal that is written in several
    files.

    `mka convert` has defaults of its own, which are other numbers.
    """
    places: dict[tuple[str, str], set[Path]] = {}
    for path, module in zip(tree.files, tree.modules, strict=True):
        for name, default in defaults_in(module):
            if name in DEFAULTS and isinstance(default, ast.Constant) and default.value is not None:
                places.setdefault((name, repr(default.value)), set()).add(path)
    return str(sum(len(paths) - 1 for paths in places.values()))


def defaults_in(module: ast.Module) -> Iterator[tuple[str, ast.expr | None]]:
    """Names and defaults of parameters and of annotated fields."""
    for node in ast.walk(module):
        if isinstance(node, FunctionNode):
            positional = [*node.args.posonlyargs, *node.args.args]
            given = node.args.defaults
            pairs = [*zip(positional[len(positional) - len(given) :], given, strict=True)]
            pairs += [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
            is_maker = node.name in ("__init__", "__call__")
            yield from ((argument.arg, default) for argument, default in pairs if is_maker)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


def files_with_a_name(tree: Tree) -> str:
    """Files in which the name of some mechanism is a string of its own, without studies and
    the like."""
    found = set()
    for path, module in zip(tree.files, tree.modules, strict=True):
        names = {node.value for node in ast.walk(module) if is_kind(node)}
        if len(names) > 1:
            found.add(path.relative_to(tree.src / "mka").as_posix())
    return f"{len(found)}: {', '.join(sorted(found))}"


def is_kind(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS


MEASURES: dict[str, Callable[[Tree], str]] = {
    "root modules": root_modules,
    "files": num_files,
    "lines": physical_lines,
    "lines of source (radon sloc)": source_lines,
    "logical lines (radon lloc)": logical_lines,
    "characters of code, layout apart": characters,
    "longest function": longest_function,
    "public functions annotated": annotated,
    "public functions documented": documented,
    "comment lines": comments,
    "line length: p90, largest": line_lengths,
    "complexity: mean, p95": complexity,
    "imports of mka --help": imports_of_help,
    "defaults written again": repeated_defaults,
    "files that list mechanisms": files_with_a_name,
}


def main(arguments: list[str]) -> None:
    folders = arguments or [str(Path(__file__).parents[1] / "src")]
    for folder in folders:
        if not (Path(folder) / "mka" / "__init__.py").is_file():
            sys.exit(f"{folder} holds no package mka; give folders such as src")
    trees = [Tree(Path(folder).resolve()) for folder in folders]
    for name, measure in MEASURES.items():
        print(f"{name:<34} {'   '.join(f'{measure(tree):<34}' for tree in trees)}".rstrip())


if __name__ == "__main__":
    main(sys.argv[1:])
