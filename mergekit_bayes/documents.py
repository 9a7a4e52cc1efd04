"""Text, JSON and YAML from outside, read within limits of size, depth and memory.

A file may come from anybody: what it costs to read is bounded before it is parsed, and whatever is
wrong with it is a `DocumentError`, whose text is a reason in a few words. All such files are read
here; `tests/test_documents.py` refuses a bare `json.loads`, `yaml.safe_load` or `read_text`.
"""

import errno
import io
import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_bayes.errors import CheckpointError, shown

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")

SIDE_FILE = 128 << 20  # bytes; the largest published tokenizers have about 35 MB
CONFIG = 16 << 20  # bytes; the largest tokenizer_config.json have about 1 MB
SETTINGS = 1 << 20  # bytes of YAML; the front matter of the largest cards has about 300 KB
_DEPTH = 100  # configs nest about 5 deep
MEMORY = 512 << 20  # bytes that a parsed document may take, estimated from above
_YAML_NODES = 200_000  # with every alias counted as what it stands for
_DIGITS = 400  # characters of a numeral
_NUMERAL = re.compile(r"[-+0-9_:.]+")
_LARGEST = 2**1023  # beyond it an integer has no float
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# What a list, an object, a name in it and one more value take in CPython, in bytes.
_COSTS = ((b"[", 88), (b"{", 200), (b":", 120), (b",", 72))
# Text with such characters takes 4 and 2 bytes for each of its characters.
_WIDTHS = ((re.compile(rb"[\xf0-\xff]"), 4), (re.compile(rb"[\xc4-\xff]"), 2))
# What PyYAML raises where a value is not of its tag: `!!int x`, `!!timestamp x`, `!!float ""`.
_OF_TAGS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


class DocumentError(ValueError):
    """A document cannot be read; the text is the reason, as it fits into parentheses."""


def open_regular(file: Path) -> io.BufferedReader:
    """Open a regular file to read it.

    A pipe under `/dev`, as a shell's `<(...)` makes it, is opened as well; no other pipe is waited
    for.

    Raises:
        OSError: The file cannot be opened.
        DocumentError: It is no regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        is_shell_pipe = stat.S_ISFIFO(mode) and str(file).startswith("/dev/")
        if not stat.S_ISREG(mode) and not is_shell_pipe:
            raise DocumentError("not a regular file")
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(file: Path, limit: int = SIDE_FILE) -> bytes:
    """The bytes of a file that `open_regular` opens.

    Args:
        file: The file.
        limit: The most bytes that are read.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: It is no regular file, or is larger than `limit`.
    """
    with open_regular(file) as content:
        size = os.fstat(content.fileno()).st_size
        data = content.read(size + 1) if size <= limit else b""
        if len(data) > size:  # it grows, or is a pipe or one of the kernel's, which say 0
            data += content.read(max(0, limit + 1 - len(data)))
        if (found := max(len(data), size)) > limit:
            raise DocumentError(f"{found:,} bytes, where at most {limit:,} are read")
        return data


def read_text(file: Path, limit: int = SIDE_FILE) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: As `read_bytes`, or the file is not UTF-8.
    """
    return decode_text(read_bytes(file, limit))


def decode_text(data: bytes) -> str:
    """Bytes as UTF-8 text.

    Raises:
        DocumentError: They are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DocumentError("not UTF-8 but UTF-16") from None
        raise DocumentError(f"not UTF-8 from byte {error.start} on") from None


def parse_json(text: bytes | str, *, strict: bool = False, limit: int = MEMORY) -> object:
    """Parse JSON.

    An escaped half of a surrogate pair is refused, because it is not a character, and so is a
    number that no float can hold.

    Args:
        text: UTF-8, or text.
        strict: Refuse a name that is twice in an object, and NaN and infinity, which JSON does not
            have but which Python writes.
        limit: The most bytes that it may take when it is parsed.

    Raises:
        DocumentError: If the text is not such JSON, is nested too deeply, or would take too much
            memory.
    """
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    check_memory(data, limit)
    try:
        content: object = json.loads(
            decode_text(data),
            parse_int=_whole_number,
            parse_float=_number,
            object_pairs_hook=_without_duplicates if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except DocumentError:
        raise
    except ValueError as error:
        raise DocumentError(str(error)) from None
    if data.count(b"[") + data.count(b"{") > _DEPTH:
        _check_depth(content)
    if _HALF_PAIR.search(data):  # only an escape can produce half of a surrogate pair
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DocumentError("half of a surrogate pair") from None
    return content


def check_memory(data: bytes, limit: int = MEMORY) -> None:
    """Refuse JSON that would take too much memory, before a library parses it.

    Raises:
        DocumentError: If it would.
    """
    width = next((width for signs, width in _WIDTHS if signs.search(data)), 1)
    # The bytes themselves, all of them as text, and the strings that are made of it.
    memory = len(data) * (1 + 2 * width) + sum(cost * data.count(sign) for sign, cost in _COSTS)
    if memory > limit:
        raise DocumentError(f"it may take {memory >> 20:,} MiB when it is parsed")


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

    if len(text) > SETTINGS:
        raise DocumentError(f"{len(text):,} characters, where at most {SETTINGS:,} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader))
        content: object = yaml.load(text, _unique_loader(loader) if unique else loader)
    except DocumentError:
        raise
    except (yaml.YAMLError, *_OF_TAGS) as error:
        raise DocumentError(_in_short(error)) from None
    _check_numbers(content)
    return content


def read_mapping(
    file: Path, what_to_do: str = "Write it again, or remove it.", limit: int = SIDE_FILE
) -> dict[str, Any]:
    """The mapping in a JSON file, or in a YAML file by its ending.

    Args:
        file: The file.
        what_to_do: The last sentence of the message if it cannot be read.
        limit: The most bytes of JSON that are read.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    try:
        if file.suffix in (".yaml", ".yml"):
            content = parse_yaml(read_text(file, SETTINGS))
        else:
            content = parse_json(read_bytes(file, limit))
        if not isinstance(content, dict):
            raise DocumentError("it is not a mapping")
        if not all(isinstance(key, str) for key in content):
            raise DocumentError("its keys are not all text")
        return content
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    raise CheckpointError(f"{file}: cannot be read ({reason}). {what_to_do}")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `CONFIG` bytes; empty if it cannot be read.

    For what a merge can do without.
    """
    try:
        return read_mapping(file, limit=CONFIG)
    except CheckpointError:
        return {}


def as_record(model: type[M], content: object) -> M:
    """The record that parsed JSON or YAML holds.

    Raises:
        DocumentError: It is not such a record; the reason says what is wrong first.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        found = f" and not {shown(first['input'])}" if first["type"] != "missing" else ""
        raise DocumentError(f"{shown(place)}: {first['msg']}{found}") from None


def read_record(model: type[M], file: Path, what_to_do: str = "Write it again, or remove it.") -> M:
    """The record in a JSON or YAML file.

    Args:
        model: The record's class.
        file: The file.
        what_to_do: The last sentence of the message if it cannot be read.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    content = read_mapping(file, what_to_do)
    try:
        return as_record(model, content)
    except DocumentError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). {what_to_do}") from None


def parse_lines(file: Path) -> Iterator[object]:
    """The JSON values in a file that has one on each line, parsed as they are asked for.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: It is no regular file, or a line is not such JSON as `parse_json` reads.
    """
    with open_regular(file) as content:
        for number in itertools.count(1):
            line = content.readline(SETTINGS + 1)
            if not line:
                return
            if len(line) > SETTINGS:
                raise DocumentError(f"line {number} has more than {SETTINGS:,} bytes")
            try:
                yield parse_json(line)
            except DocumentError as error:
                raise DocumentError(f"line {number}: {error}") from None


def _in_short(error: Exception) -> str:
    """An error of PyYAML in one line, without the name that it gives to a string."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())[:300]


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS or abs(number := int(text)) >= _LARGEST:
        raise DocumentError(f"the number {text[:12]}... has {len(text):,} digits")
    return number


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise DocumentError(f"the number {text[:40]} is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DocumentError(f"it names {shown(counts.most_common(1)[0][0])} twice")
    return content


def _refuse_constant(text: str) -> None:
    raise DocumentError(f"{text} is no number of JSON")


def _check_depth(content: object) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(_DEPTH):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise DocumentError("nested too deeply")


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
            if len(open_nodes) > _DEPTH:
                raise DocumentError("nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - start
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            # PyYAML reads 1:1:1 as a number of base 60, in time that grows with its square.
            if len(event.value) > _DIGITS and _NUMERAL.fullmatch(event.value):
                raise DocumentError(f"a number has {len(event.value):,} digits")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if nodes > _YAML_NODES:
            raise DocumentError(f"it stands for more than {_YAML_NODES:,} values")


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
            elif isinstance(value, int) and abs(value) >= _LARGEST:
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
