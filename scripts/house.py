"""Count where the house stands: files, documentation, types, and imports against its floors.

    python scripts/house.py [--verbose] [--json] [--suggest]

Prints a line for each figure: its value, its goal, and whether the goal is met. A missed goal does
not fail. The exit code is 1 if a hard limit is broken, which is printed as an error: a circle of
imports, an import against the floors, a room or module that is missing in the README's list or
only stands there, or a package file of 500 lines or more. The list and its rules are described in
`scripts/floors.py`; `--suggest` prints module lists that fit the imports as they are.
"""

import argparse
import ast
import dataclasses
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.floors import (
    COMMANDS,
    PACKAGE,
    Edge,
    circles,
    import_graph,
    list_errors,
    modules,
    package_files,
    parse_floors,
    reachable,
    suggest_steps,
    upward_imports,
)

ROOT = Path(__file__).resolve().parents[1]
LONG = 400
TOO_LONG = 500


@dataclass(frozen=True)
class Figures:
    """All figures of a tree.

    Attributes:
        lines: Lines of each file of the package.
        command_lines: Lines of each file of the command line.
        documented: Public names of both, and whether each has a docstring.
        any_in_annotations: Uses of `Any` in annotations, by file of the package.
        lines_with_any: Lines of the package that contain the word `Any`.
        skipped_formats: `fmt: skip` comments, by file of the package, commands, tests and scripts.
        circles: Groups of modules that import each other.
        upward_imports: Imports against the order of the house.
        list_errors: Differences between the README's list and the tree.
        reach: Per merge method, the modules that it needs and the sum of their lines.
    """

    lines: dict[str, int]
    command_lines: dict[str, int]
    documented: dict[str, bool]
    any_in_annotations: dict[str, int]
    lines_with_any: int
    skipped_formats: dict[str, int]
    circles: list[list[str]]
    upward_imports: list[str]
    list_errors: list[str]
    reach: dict[str, tuple[list[str], int]]

    @property
    def undocumented(self) -> list[str]:
        """Public names without a docstring."""
        return [name for name, has in self.documented.items() if not has]

    def files_from(self, lines: int) -> dict[str, int]:
        """Files of the package and the command line of at least this many lines."""
        return {f: n for f, n in {**self.lines, **self.command_lines}.items() if n >= lines}

    def hard_errors(self) -> list[str]:
        """Hard limits that the tree breaks, each as one line of text."""
        return [
            *(f"circle: {' <-> '.join(circle)}" for circle in self.circles),
            *self.upward_imports,
            *self.list_errors,
            *(f"{name} has {count} lines" for name, count in self.files_from(TOO_LONG).items()),
        ]


def figures(root: Path) -> Figures:
    """Count a tree.

    Raises:
        ValueError: If the README's list of the house cannot be read.
    """
    rooms = parse_floors(root / "README.md")
    edges = import_graph(root)
    files, commands = package_files(root), package_files(root, COMMANDS)
    others = [p for folder in ("tests", "scripts") for p in sorted((root / folder).rglob("*.py"))]

    def by_file(paths: list[Path], count: Callable[[Path], int]) -> dict[str, int]:
        return {path.relative_to(root).as_posix(): count(path) for path in paths}

    def nonzero(counts: dict[str, int]) -> dict[str, int]:
        return {name: count for name, count in counts.items() if count}

    return Figures(
        lines=by_file(files, count_lines),
        command_lines=by_file(commands, count_lines),
        documented={
            f"{path.relative_to(root).as_posix()}: {name}": has
            for path in files + commands
            for name, has in public_names(path)
        },
        any_in_annotations=nonzero(by_file(files, any_in_annotations)),
        lines_with_any=sum(map(lines_with_any, files)),
        skipped_formats=nonzero(by_file([*files, *commands, *others], skipped_formats)),
        circles=circles(edges),
        upward_imports=upward_imports(edges, rooms),
        list_errors=list_errors(root, rooms),
        reach={
            path.stem: reach(root, f"{PACKAGE}.methods.{path.stem}", edges)
            for path in files
            if path.parent.name == "methods" and _declares_method(path)
        },
    )


def _declares_method(path: Path) -> bool:
    """Whether a file of `methods/` declares a method, as AVERAGE in `average`."""
    return bool(re.search(rf"^{path.stem.upper()} = Method\(", path.read_text(), re.M))


def table(numbers: Figures) -> list[tuple[str, str, str, bool | None]]:
    """Rows of the printed table: figure, value, goal, and whether it is met (None: no goal)."""
    lines = list(numbers.lines.values()) or [0]
    median, longest = int(statistics.median(lines)), max(lines)
    public, missing = len(numbers.documented), len(numbers.undocumented)
    share = 100 * (public - missing) / public if public else 100.0
    anys = sum(numbers.any_in_annotations.values())
    reached = [len(names) for names, _ in numbers.reach.values()] or [0]
    reached_lines = [count for _, count in numbers.reach.values()] or [0]

    def none_of(name: str, count: int) -> tuple[str, str, str, bool | None]:
        return name, str(count), "0", count == 0

    return [
        (f"files of {PACKAGE}", str(len(numbers.lines)), "", None),
        (f"files of {COMMANDS}", str(len(numbers.command_lines)), "", None),
        ("median lines of a file", str(median), "120", median <= 120),
        ("lines of the longest file", str(longest), f"under {LONG}", longest < LONG),
        none_of(f"files of {LONG} lines or more", len(numbers.files_from(LONG))),
        ("public names documented, %", f"{share:.1f}", "100", missing == 0),
        ("public names without docstring", f"{missing} of {public}", "", None),
        ("Any in annotations", str(anys), "under 200", anys < 200),
        ("lines with the word Any", str(numbers.lines_with_any), "", None),
        none_of("fmt: skip", sum(numbers.skipped_formats.values())),
        none_of("circles", len(numbers.circles)),
        none_of("upward imports", len(numbers.upward_imports)),
        none_of("errors in the README's list", len(numbers.list_errors)),
        (
            "reach of a merge method, modules",
            f"{min(reached)} to {max(reached)}",
            "2",
            max(reached) <= 2,
        ),
        (
            "reach of a merge method, lines",
            f"{min(reached_lines)} to {max(reached_lines)}",
            "200",
            max(reached_lines) <= 200,
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the figures of a repository.

    Args:
        arguments: Command line; that of the process by default.

    Returns:
        1 if a hard limit is broken, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="list what the figures count")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--suggest", action="store_true", help="module lists that fit the imports")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    if options.suggest:
        for room, steps in suggest_steps(options.root).items():
            print(f"{room}/\n   : {' > '.join(' '.join(step) for step in steps)}")
        return 0
    try:
        numbers = figures(options.root)
    except ValueError as unreadable:
        print(f"error: {unreadable} (scripts/floors.py describes the list)", file=sys.stderr)
        return 1
    errors = numbers.hard_errors()
    if options.json:
        print(json.dumps({**dataclasses.asdict(numbers), "hard_errors": errors}, indent=1))
        return bool(errors)
    print(f"{'figure':32} {'value':>11}  {'goal':10}")
    for name, value, goal, met in table(numbers):
        mark = {None: "", True: "met", False: "MISSED"}[met]
        print(f"{name:32} {value:>11}  {goal:10} {mark}".rstrip())
    if options.verbose:
        _print_details(numbers)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"hard limits broken: {len(errors)} (see --help)")
    return bool(errors)


def _print_details(numbers: Figures) -> None:
    """Print the names behind the figures."""
    counts = {
        f"files of {LONG} lines or more": numbers.files_from(LONG),
        "Any in annotations": numbers.any_in_annotations,
        "fmt: skip": numbers.skipped_formats,
    }
    for title, by_file in counts.items():
        rows = [f"{count:5}  {name}" for name, count in by_file.items()]
        print("\n".join(["", title, *(rows or ["  none"])]))
    rows = [f"  {name}" for name in numbers.undocumented]
    print("\n".join(["", "public names without docstring", *(rows or ["  none"])]))
    print("\nreach of the merge methods")
    for name, (reached, count) in numbers.reach.items():
        print(f"{count:5}  {name}: {', '.join(reached)}")


def reach(root: Path, module: str, edges: list[Edge]) -> tuple[list[str], int]:
    """What a module needs of its own package: itself and all that it imports, with their lines.

    Returns:
        The modules, sorted, and the sum of their lines. `__init__` files count only if a name is
        imported from them.
    """
    names = modules(root)
    targets: dict[str, set[str]] = {}
    for edge in edges:
        if not edge.typing_only:
            targets.setdefault(edge.source, set()).add(edge.target)
    reached = sorted({module} | reachable(module, targets))
    return reached, sum(count_lines(names[name]) for name in reached)


def count_lines(path: Path) -> int:
    """Number of lines of a file."""
    return len(path.read_text().splitlines())


def public_names(path: Path) -> Iterator[tuple[str, bool]]:
    """Public names of a module and whether each has a docstring.

    Public are the module, and its classes, functions, methods and properties without a leading
    underscore, as long as all that encloses them is public, too. Names nested in functions,
    overloads, and setters of properties do not count.
    """
    if path.stem.startswith("_") and path.stem != "__init__":
        return
    tree = ast.parse(path.read_text())
    yield path.stem, ast.get_docstring(tree) is not None
    pending: list[tuple[ast.AST, str]] = [(child, "") for child in ast.iter_child_nodes(tree)]
    while pending:
        node, prefix = pending.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_") or _is_repeat(node):
                continue
            yield f"{prefix}{node.name}", ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                pending += [(child, f"{prefix}{node.name}.") for child in node.body]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending += [(child, prefix) for child in ast.iter_child_nodes(node)]


def _is_repeat(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a definition repeats a name that is documented elsewhere."""
    words = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(w.split(".")[-1] in ("overload", "setter", "deleter") for w in words)


def any_in_annotations(path: Path) -> int:
    """How often `Any` stands in the annotations of a module.

    Counted are arguments, return types, annotated variables, and type aliases at module level
    (`Rows = list[dict[str, Any]]`).
    """
    tree = ast.parse(path.read_text())
    annotations: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            annotations.append(node.annotation)
        elif type(node).__name__ == "TypeAlias":
            annotations.append(getattr(node, "value", None))
    annotations += [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp)
    ]
    return sum(_count_any(annotation) for annotation in annotations if annotation)


def _count_any(annotation: ast.AST) -> int:
    """Occurrences of `Any` below a node; annotations in quotes are read, too."""
    count = 0
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                count += _count_any(ast.parse(node.value, mode="eval"))
            except SyntaxError:
                continue
        else:
            count += "Any" in (getattr(node, "id", None), getattr(node, "attr", None))
    return count


def lines_with_any(path: Path) -> int:
    """Number of lines of a file that contain the word `Any`."""
    return sum(bool(re.search(r"\bAny\b", line)) for line in path.read_text().splitlines())


def skipped_formats(path: Path) -> int:
    """Number of comments in a file that switch the formatter off for a line."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(t.type == tokenize.COMMENT and "fmt: skip" in t.string for t in tokens)


if __name__ == "__main__":
    sys.exit(main())
