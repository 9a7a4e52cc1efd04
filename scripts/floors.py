"""The floors of the house: the list in the README, the imports, and which of them break it.

The list is read from the README: under the heading "The house", a code block with one room a line.
A line that starts with a number opens a floor, and the lines below it belong to that floor. A room
is a module (`precision`) or a package (`merge/`), followed by two spaces and what it does. A line
that starts with a colon lists the modules of the package above it, importer first: ` > ` separates
steps, and the modules of one step do not import each other. A second such line continues the first.

    1  shop/       sells
       : till shelf > price
       stock       counts
    0  errors      every exception

Three rules follow. A room imports from lower floors only. Inside a package a module imports from
later steps only. Every room and every module of a package stands in the list, and nothing else
does.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "mergekit_bayes"
COMMANDS = "bmerge_cli"
# Where each package lies below the root.
FOLDERS = {PACKAGE: PACKAGE, COMMANDS: "cli/bmerge_cli"}
# The room of the command line, as the README calls it.
COMMANDS_ROOM = "cli"

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
    steps: Mapping[str, int]


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
    lines: dict[str, re.Match[str]] = {}  # of the rooms, by name
    floors: dict[str, float] = {}
    steps: dict[str, str] = {}  # of the packages, as `a b > c`
    floor, name = float("inf"), ""
    for line in filter(str.strip, block[1].splitlines()):
        if modules := _MODULES.match(line):
            if name not in steps:
                raise ValueError(f"{readme}: modules without a package above them: {line!r}")
            steps[name] += f" {modules['steps']}"
            continue
        room = _ROOM.match(line)
        if not room:
            raise ValueError(f"{readme}: cannot read this line of the house: {line!r}")
        if room["floor"]:
            if float(room["floor"]) >= floor:
                raise ValueError(f"{readme}: floor {room['floor']} stands below floor {floor:g}")
            floor = float(room["floor"])
        elif not floors:
            raise ValueError(f"{readme}: the first room has no floor: {line!r}")
        name = room["name"]
        if name in lines:
            raise ValueError(f"{readme}: {name} is listed twice")
        lines[name], floors[name] = room, floor
        if room["folder"]:
            steps[name] = ""
    return {
        name: Room(
            name,
            floors[name],
            name in steps,
            room["text"] or "",
            _parse_steps(steps.get(name, ""), f"{readme}: {name}/"),
        )
        for name, room in lines.items()
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
    imported = {name: reachable(name, targets) for name in targets}
    groups = set()
    for name, others in imported.items():
        group = frozenset(n for n in others if name in imported[n])
        if group - {name}:
            groups.add(group | {name})
    return sorted(sorted(group) for group in groups)


def reachable(start: str, targets: Mapping[str, set[str]]) -> set[str]:
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
