"""Count where the house stands: files, documentation, types, and which module imports which.

    python scripts/house.py [--verbose] [--json] [--suggest]

The floors are read from the README: under the heading "The house", a code block with one room a
line. A line that starts with a number opens a floor, and the lines below it belong to that floor.
A room is a module (`precision`) or a package (`merge/`), followed by two spaces and what it does.
A line that starts with a colon lists the modules of the package above it, importer first: ` > `
separates steps, and the modules of one step do not import each other. A second such line continues
the first.

    1  shop/       sells
       : till shelf > price
       stock       counts
    0  errors      every exception

Three rules follow. A room imports from lower floors only. Inside a package a module imports from
later steps only. Every room and every module of a package stands in the list, and nothing else
does. `--suggest` prints module lists that fit the imports as they are.

The exit code is 1 if a hard limit is broken: a circle, an import against the rules, or a package
file of 500 lines or more. The other goals are shown beside the figures and do not fail.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mergekit_bayes"
COMMANDS = "bmerge_cli"
# Where each package lies below the root.
FOLDERS = {PACKAGE: PACKAGE, COMMANDS: "cli/bmerge_cli"}
# The room of the command line, as the README calls it.
COMMANDS_ROOM = "cli"
LONG = 400
TOO_LONG = 500

_ROOM = re.compile(
    r"^(?P<floor>\d+(?:\.\d+)?)?\s+(?P<name>\w+)(?P<folder>/?)(?:\s{2,}(?P<text>\S.*))?$"
)
_MODULES = re.compile(r"^\s*:\s*(?P<steps>\S.*)$")


@dataclass(frozen=True)
class Room:
    """One room of the house, as the README lists it.

    Attributes:
        name: Module or package below `mergekit_bayes`, or "cli".
        floor: Number of its floor; imports go to smaller numbers only.
        is_package: Whether it is a folder.
        text: What the README says it does.
        steps: For a package, its modules with the number of their step, counted from the top.
    """

    name: str
    floor: float
    is_package: bool
    text: str
    steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """One import between modules of the project.

    Attributes:
        source: Module that imports, by its dotted name.
        target: Module that is imported; a package stands for its `__init__`.
        line: Line of the import in the source.
        typing_only: Whether it stands under `if TYPE_CHECKING`.
    """

    source: str
    target: str
    line: int
    typing_only: bool


# --- the floors -----------------------------------------------------------------------------------


def parse_floors(readme: Path) -> dict[str, Room]:
    """Read the rooms from the section "The house" of a README.

    Args:
        readme: Path of the README.

    Returns:
        The rooms by name, in the order of the list.

    Raises:
        ValueError: If the section or its code block is missing, a line cannot be read, a room or a
            module is listed twice, floors do not fall, or a module list does not follow a package.
    """
    section = re.search(r"^## The house\n(.*?)(?=^## |\Z)", readme.read_text(), re.M | re.S)
    block = section and re.search(r"^```\w*\n(.*?)^```", section[1], re.M | re.S)
    if not block:
        raise ValueError(f"{readme}: no section '## The house' with a code block")
    rooms: dict[str, Room] = {}
    texts: dict[str, str] = {}
    floor: float | None = None
    last: Room | None = None
    for line in block[1].splitlines():
        if not line.strip():
            continue
        if modules := _MODULES.match(line):
            if last is None or not last.is_package:
                raise ValueError(f"{readme}: modules without a package above them: {line!r}")
            texts[last.name] += f" {modules['steps']}"
            continue
        match = _ROOM.match(line)
        if not match:
            raise ValueError(f"{readme}: cannot read this line of the house: {line!r}")
        if match["floor"]:
            lower = float(match["floor"])
            if floor is not None and lower >= floor:
                raise ValueError(f"{readme}: floor {match['floor']} stands below floor {floor:g}")
            floor = lower
        if floor is None:
            raise ValueError(f"{readme}: the first room has no floor: {line!r}")
        if match["name"] in rooms:
            raise ValueError(f"{readme}: {match['name']} is listed twice")
        texts[match["name"]] = ""
        last = Room(
            name=match["name"],
            floor=floor,
            is_package=bool(match["folder"]),
            text=match["text"] or "",
        )
        rooms[last.name] = last
    return {
        name: dataclasses.replace(room, steps=_parse_steps(texts[name], f"{readme}: {name}/"))
        for name, room in rooms.items()
    }


def _parse_steps(text: str, where: str) -> dict[str, int]:
    """Read `a b > c`: the number of each module's step."""
    steps: dict[str, int] = {}
    for number, names in enumerate(text.split(">")):
        if text and not names.strip():
            raise ValueError(f"{where} an empty step in {text.strip()!r}")
        for name in names.split():
            if name in steps:
                raise ValueError(f"{where} {name} is listed twice")
            steps[name] = number
    return steps


# --- the imports ----------------------------------------------------------------------------------


def package_files(root: Path, package: str = PACKAGE) -> list[Path]:
    """Python files of a package, sorted."""
    return sorted((root / FOLDERS[package]).rglob("*.py"))


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of all modules of both packages; a package goes by its own name."""
    names = {}
    for package, folder in FOLDERS.items():
        for path in package_files(root, package):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            names[".".join(parts)] = path
    return names


def import_graph(root: Path) -> list[Edge]:
    """All imports between modules of the project, those inside functions included.

    `from package import name` counts as an import of `package.name` if that is a module, else of
    `package` itself.
    """
    names = modules(root)
    edges: dict[Edge, None] = {}
    for name, path in names.items():
        is_package = path.name == "__init__.py"
        for target, line, typing_only in _imported(ast.parse(path.read_text()), name, is_package):
            module = _module_of(target, names)
            if module and module != name:
                edges[Edge(name, module, line, typing_only)] = None
    return list(edges)


def _imported(tree: ast.Module, name: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """Every imported name with its line and whether it is imported for type checkers only."""
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, typing_only = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, typing_only
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{origin}.{alias.name}", node.lineno, typing_only
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            pending += [(child, True) for child in node.body]
            pending += [(child, typing_only) for child in node.orelse]
        else:
            pending += [(child, typing_only) for child in ast.iter_child_nodes(node)]


def _is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None))


def _module_of(target: str, names: Mapping[str, Path]) -> str | None:
    """The longest prefix of a dotted name that is a module of the project."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


def circles(edges: list[Edge]) -> list[list[str]]:
    """Groups of modules that import each other in a circle; imports for type checkers are left out.

    Returns:
        The strongly connected components of two modules or more, sorted.
    """
    targets: dict[str, set[str]] = {}
    for edge in edges:
        targets.setdefault(edge.source, set())
        targets.setdefault(edge.target, set())
        if not edge.typing_only:
            targets[edge.source].add(edge.target)
    reachable = {name: _reachable(name, targets) for name in targets}
    groups = set()
    for name, others in reachable.items():
        group = frozenset(n for n in others if name in reachable[n])
        if group - {name}:
            groups.add(group | {name})
    return sorted(sorted(group) for group in groups)


def _reachable(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    """All modules that a module imports, directly or through others."""
    reached: set[str] = set()
    pending = [start]
    while pending:
        for target in targets.get(pending.pop(), ()):
            if target not in reached:
                reached.add(target)
                pending.append(target)
    return reached


def room_of(module: str) -> str:
    """Room of a module: the part below the package, "cli", or "" for `mergekit_bayes` itself."""
    package, *rest = module.split(".")
    if package == COMMANDS:
        return COMMANDS_ROOM
    return rest[0] if rest else ""


def _module_in_room(module: str) -> str:
    """Name of a module inside its room, "" for the room itself."""
    parts = module.split(".")
    below = parts[1:] if parts[0] == COMMANDS else parts[2:]
    return below[0] if below else ""


def upward_imports(edges: list[Edge], rooms: Mapping[str, Room]) -> list[str]:
    """Imports that break the order of the house, each as one line of text.

    A room may import from lower floors; inside a package a module may import from later steps. The
    package's own `__init__` may import all of its modules, and no module may import it back. The
    root of `mergekit_bayes` holds the version and may be imported by all. Modules that the list
    lacks are reported by `list_errors`, not here.
    """
    errors = []
    for edge in edges:
        source, target = room_of(edge.source), room_of(edge.target)
        text = f"{edge.source} (line {edge.line}) imports {edge.target}"
        if source == target:
            reason = _order_error(edge, rooms.get(source))
        elif source == "":
            reason = "the root of the package imports nothing of it"
        elif source in rooms and target in rooms and rooms[target].floor >= rooms[source].floor:
            reason = f"floor {rooms[source].floor:g} imports floor {rooms[target].floor:g}"
        else:
            reason = None
        if reason:
            errors.append(f"{text}: {reason}")
    return errors


def _order_error(edge: Edge, room: Room | None) -> str | None:
    """What is wrong with an import inside one room, if anything."""
    source, target = _module_in_room(edge.source), _module_in_room(edge.target)
    if source == "" or source == target:
        return None
    if target == "":
        return "a module does not import the __init__ of its own package"
    if room is None or source not in room.steps or target not in room.steps:
        return None
    if room.steps[source] == room.steps[target]:
        return "both are of one step"
    if room.steps[source] > room.steps[target]:
        return f"{target} is listed before {source}"
    return None


def list_errors(root: Path, rooms: Mapping[str, Room]) -> list[str]:
    """Rooms and modules that the list lacks, and those in the list that do not exist."""
    contents: dict[str, set[str]] = {}
    for module in modules(root):
        if room := room_of(module):
            contents.setdefault(room, set()).update(filter(None, [_module_in_room(module)]))
    errors = [f"{name} is not in the README's list" for name in sorted(contents.keys() - rooms)]
    errors += [
        f"{name} is in the README's list and does not exist"
        for name in sorted(rooms.keys() - contents)
    ]
    for name in sorted(contents.keys() & rooms):
        listed = rooms[name].steps.keys()
        errors += [
            f"{name}/{m} is not in the README's list" for m in sorted(contents[name] - listed)
        ]
        errors += [
            f"{name}/{m} is in the README's list and does not exist"
            for m in sorted(listed - contents[name])
        ]
    return errors


def suggest_steps(root: Path) -> dict[str, list[list[str]]]:
    """Module lists that fit the imports, for the README: per package its steps from the top.

    Raises:
        ValueError: If a package holds a circle.
    """
    inside: dict[str, dict[str, set[str]]] = {}
    for module in modules(root):
        room, name = room_of(module), _module_in_room(module)
        if room and name:
            inside.setdefault(room, {}).setdefault(name, set())
    for edge in import_graph(root):
        source, target = _module_in_room(edge.source), _module_in_room(edge.target)
        if room_of(edge.source) == room_of(edge.target) and source and target and source != target:
            inside[room_of(edge.source)][source].add(target)
    result = {}
    for room, targets in inside.items():
        left = dict(targets)
        steps = []
        while left:
            top = sorted(name for name in left if not any(name in left[n] for n in left))
            if not top:
                raise ValueError(f"{room}/ holds a circle among {', '.join(sorted(left))}")
            steps.append(top)
            left = {name: targets for name, targets in left.items() if name not in top}
        result[room] = steps
    return result


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
    reached = sorted({module} | _reachable(module, targets))
    return reached, sum(count_lines(names[name]) for name in reached)


# --- files and words ------------------------------------------------------------------------------


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


# --- the figures ----------------------------------------------------------------------------------


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


def figures(root: Path, readme: Path | None = None) -> Figures:
    """Count a tree.
        readme: Where the floors are; the README at the root by default.

    Raises:
        ValueError: If the README's list of the house cannot be read.
    """
    rooms = parse_floors(readme or root / "README.md")
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
    reached = [len(modules) for modules, _ in numbers.reach.values()] or [0]
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        print(f"error: {unreadable}", file=sys.stderr)
        return 1
    errors = numbers.hard_errors()
    if options.json:
        print(json.dumps({**dataclasses.asdict(numbers), "hard_errors": errors}, indent=1))
        return bool(errors)
    for name, value, goal, met in table(numbers):
        mark = {None: "", True: "met", False: "MISSED"}[met]
        print(f"{name:32} {value:>11}  {goal:10} {mark}".rstrip())
    if options.verbose:
        _print_details(numbers)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
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
    for name, (modules, count) in numbers.reach.items():
        print(f"{count:5}  {name}: {', '.join(modules)}")


if __name__ == "__main__":
    sys.exit(main())
