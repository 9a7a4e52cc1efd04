"""YAML: its events are counted, with every alias as what it stands for, before values are made."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_bayes.documents.files import SETTINGS, DocumentError
from mergekit_bayes.documents.json_text import DEPTH, DIGITS, LARGEST
from mergekit_bayes.errors import shown

if TYPE_CHECKING:
    import yaml

T = TypeVar("T")
_NODES = 200_000  # with every alias counted as what it stands for
_NUMERAL = re.compile(r"[-+0-9_:.]+")
# What PyYAML raises where a value is not of its tag: `!!int x`, `!!timestamp x`, `!!float ""`.
_OF_TAGS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


def parse_yaml(text: str, *, unique: bool = False) -> object:
    """Parse YAML into plain values, as `yaml.safe_load`.

    Args:
        text: The document.
        unique: Refuse a key that is twice in a mapping.

    Raises:
        DocumentError: If the text is not YAML, is nested too deeply, refers to itself, or stands
            for too many values once every alias is replaced by what it stands for.
    """
    import yaml

    return _parse(text, yaml.load, unique)


def parse_yaml_documents(text: str, *, unique: bool = False) -> list[object]:
    """Parse the documents of a YAML stream, which `---` separates, as `yaml.safe_load_all`.

    The limits of `parse_yaml` hold for all of them together. A document without any value is left
    out, as the one behind a last `---`.

    Raises:
        DocumentError: As `parse_yaml`.
    """
    import yaml

    documents = _parse(text, lambda *given: list(yaml.load_all(*given)), unique)
    return [content for content in documents if content is not None]


def _parse(text: str, load: Callable[[str, Any], T], unique: bool) -> T:
    """What PyYAML loads from a text, within limits."""
    import yaml

    if len(text) > SETTINGS:
        raise DocumentError(f"{len(text):,} characters, where at most {SETTINGS:,} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader))
        content = load(text, _unique_loader(loader) if unique else loader)
    except DocumentError:
        raise
    except (yaml.YAMLError, *_OF_TAGS) as error:
        raise DocumentError(_in_short(error)) from None
    _check_numbers(content)
    return content


def _in_short(error: Exception) -> str:
    """An error of PyYAML in one line, without the name that it gives to a string."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())[:300]


def _check_events(events: "Iterator[yaml.Event]") -> None:
    """Refuse YAML by its depth and by the number of nodes that it stands for."""
    import yaml

    sizes: dict[str | None, int] = {}  # nodes under each anchor that is complete
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes counted when it began
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(a == event.anchor for a, _ in open_nodes):
                raise DocumentError(f"the anchor {shown(event.anchor)} contains itself")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            nodes += 1
            open_nodes.append((event.anchor, nodes - 1))
            sizes.pop(event.anchor, None)
            if len(open_nodes) > DEPTH:
                raise DocumentError("nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - start
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            # PyYAML reads 1:1:1 as a number of base 60, in time that grows with its square.
            if len(event.value) > DIGITS and _NUMERAL.fullmatch(event.value):
                raise DocumentError(f"a number has {len(event.value):,} digits")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if nodes > _NODES:
            raise DocumentError(f"it stands for more than {_NODES:,} values")


def _check_numbers(content: object) -> None:
    """Refuse whole numbers that no float can hold."""
    level = [content]
    while level:
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list | tuple | set):
                inner += value
            elif isinstance(value, int) and abs(value) >= LARGEST:
                raise DocumentError("a number has more than 300 digits")
        level = inner


def _unique_loader(base: Any) -> Any:
    """A loader for which a key that is twice in a mapping is an error."""
    import yaml

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """A mapping whose keys are written once; what `<<` brings in may be replaced."""
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in keys:
                        problem = f"the key '{key.value}' is there twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    keys.add(key.value)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return Loader
