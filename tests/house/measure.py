"""Measure the package's structure: ``python -m tests.house.measure [FOLDER]`` prints a table.

It reads the source with ``ast`` and imports nothing of it, so it also measures an older checkout:
``python -m tests.house.measure path/to/checkout``.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

#: Words that an engineer who never met the authors would stop at, as regular expressions.
PRIVATE_WORDS = (
    r"at hand",
    r"\banew\b",
    r"\bwhoever\b",
    r"\bwhatever\b",
    r"\bwhichever\b",
    r"\bhangs? on\b",
    r"\bbeside\b",
    r"\bso many\b",
    r"\bso long\b",
    r"\bhardly\b",
    r"\basks? about\b",
    r"\basked about\b",
    r"(?<!there )\bis no (?!longer\b)[a-z]+",
    r"\balike\b",
    r"\bdearer\b",
    r"\bof one's own\b",
    r"\bnobody\b",
    r"\bby itself\b",
    r"\bas far as\b",
    r"\bpictures?\b",
    r"\bbooks\b",
    r"\bin vain\b",
    r"\bstands? (?:in|there|for)\b",
)

#: Texts that are stored, sent or fixed by others, in which such words may stand.
FIXED_TEXTS = re.compile(
    r"/emulator/books|books\.json|picture@|``pictures``|^\"(?:pictures|dearer)\"$"
)


def python_files(folder: Path) -> list[Path]:
    """Return the Python files below a folder, sorted, without caches."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield each comment and string of a module with its line number."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or (
            token.type == getattr(tokenize, "FSTRING_MIDDLE", -1)
        ):
            yield token.start[0], token.string


def module_of(path: Path, root: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, known: set[str]) -> set[str]:
    """Return the modules of the package that a module imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in names]
        else:
            continue
        found.update(name for name in names if name in known and name != module)
    return found


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:  # noqa: C901 - Kosaraju
    """Return the strongly connected components of more than one module."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: dict[str, set[str]], into: list[str]) -> None:
        stack = [(start, iter(sorted(edges[start])))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            for following in rest:
                if following not in seen:
                    seen.add(following)
                    stack.append((following, iter(sorted(edges[following]))))
                    break
            else:
                stack.pop()
                into.append(node)

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    back: dict[str, set[str]] = {node: set() for node in graph}
    for node, targets in graph.items():
        for target in targets:
            back[target].add(node)
    seen.clear()
    circles = []
    for node in reversed(order):
        if node not in seen:
            circle: list[str] = []
            visit(node, back, circle)
            if len(circle) > 1:
                circles.append(sorted(circle))
    return circles


def import_graph(checkout: Path) -> dict[str, set[str]]:
    """Return the imports between the modules of a checkout's package."""
    files = python_files(checkout / "krea_dagster")
    known = {module_of(path, checkout) for path in files}
    return {
        module_of(path, checkout): imports_of(
            ast.parse(path.read_text()), module_of(path, checkout), known
        )
        for path in files
    }


def class_names(checkout: Path) -> dict[str, list[str]]:
    """Return the modules in which each class name of a checkout's package is defined."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in python_files(checkout / "krea_dagster"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module_of(path, checkout))
    return found


def private_words_of(source: str) -> list[tuple[int, str]]:
    """Return the line and text of each private word in a module's comments and strings."""
    return [
        (line, match)
        for line, text in prose_of(source)
        for word in PRIVATE_WORDS
        for match in re.findall(word, FIXED_TEXTS.sub("", text), re.IGNORECASE)
    ]


def find_tests_without_assert(source: str) -> list[str]:
    """Return the tests of a module that assert nothing.

    A test asserts by ``assert``, by ``pytest.raises``, ``warns`` or ``fail``, by Playwright's
    ``expect``, by a function called ``assert_...`` or ``..._validate`` or ``validate_...``, or by
    a function of its module that does.
    """
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    helpers = {one.name for one in functions if not _is_test(one) and _asserts(one, set())}
    return [one.name for one in functions if _is_test(one) and not _asserts(one, helpers)]


def _is_test(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return function.name.startswith("test_")


def _asserts(function: ast.AST, helpers: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in helpers or name in ("raises", "warns", "fail", "expect"):
                return True
            if re.match(r"_?assert_|validate_|.*_validate$", name):
                return True
    return False


def _percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _spread(values: list[int]) -> str:
    return f"{statistics.median(values):g}/{_percentile(values, 0.9)}/{max(values)}"


def measure(checkout: Path) -> list[tuple[str, str]]:
    """Return the figures of a checkout as names and values."""
    package = checkout / "krea_dagster"
    files = python_files(package)
    lengths, functions, classes, arguments = [], [], [], []
    words = broad = ignores = noqa = documented = public = one_line = documents = comments = 0
    for path in files:
        source = path.read_text()
        tree = ast.parse(source)
        lengths.append(source.count("\n"))
        ignores += source.count("type: ignore")
        noqa += source.count("# noqa")
        comments += sum(line.lstrip().startswith("#") for line in source.splitlines())
        words += len(private_words_of(source))
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "BaseException"
                broad += caught in ("Exception", "BaseException")
            if isinstance(node, ast.ClassDef):
                classes.append(int(node.end_lineno or 0) - node.lineno + 1)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(int(node.end_lineno or 0) - node.lineno + 1)
                given = node.args
                arguments.append(len(given.posonlyargs + given.args + given.kwonlyargs))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                document = ast.get_docstring(node)
                if not node.name.startswith("_"):
                    public += 1
                    documented += document is not None
                if document is not None:
                    documents += 1
                    one_line += "\n" not in document.strip()
    tests = sum(path.read_text().count("\n") for path in python_files(checkout / "tests"))
    lines = sum(lengths)
    twice = [name for name, modules in class_names(checkout).items() if len(modules) > 1]
    return [
        ("files", str(len(files))),
        ("lines", f"{lines:,}"),
        ("file lines, median/p90/max", _spread(lengths)),
        ("files of less than 60 lines", str(sum(length < 60 for length in lengths))),
        ("files at the top of engine/, plugin/, spend/", _top_files(package)),
        ("function lines, median/p90/max", _spread(functions)),
        ("functions of more than 50 lines", str(sum(length > 50 for length in functions))),
        ("class lines, p90/max", f"{_percentile(classes, 0.9)}/{max(classes)}"),
        ("arguments, p90/max", f"{_percentile(arguments, 0.9)}/{max(arguments)}"),
        ("broad except", str(broad)),
        ("type: ignore", str(ignores)),
        ("noqa", str(noqa)),
        ("public names documented", f"{documented / public:.0%}"),
        ("docstrings of one line", f"{one_line / documents:.0%}"),
        ("comment lines", f"{comments / lines:.1%}"),
        ("tests to source", f"{tests / lines:.2f}"),
        *(
            (f"tests to source, {folder}", _ratio(checkout, folder))
            for folder in ("engine", "api", "spend", "curation", "emulator", "plugin")
        ),
        ("circles of imports", str(len(circles_of(import_graph(checkout))))),
        ("class names with two meanings", str(len(twice))),
        ("private words", str(words)),
    ]


def _top_files(package: Path) -> str:
    return ", ".join(
        str(len(list((package / folder).glob("*.py")))) for folder in ("engine", "plugin", "spend")
    )


def _ratio(checkout: Path, folder: str) -> str:
    source = sum(
        path.read_text().count("\n") for path in python_files(checkout / "krea_dagster" / folder)
    )
    tests = sum(path.read_text().count("\n") for path in python_files(checkout / "tests" / folder))
    return f"{tests / source:.2f}"


if __name__ == "__main__":
    for name, value in measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(f"{name:<46} {value}")
