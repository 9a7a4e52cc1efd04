"""Documents in which a value, a name or an entry is not what a reader expects."""

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import yaml

_BIG = (
    *(1 << 31, 1 << 32, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64),
    *(10**9, 10**30, 10**400, 10**4000),
)
_NUMBERS = (*_BIG, *(-n for n in _BIG), -1, 0, 1, 2, 7, 0.0, 1.0, 4.5, 1e308, -0.0, 1e-320)
_CONSTANTS = (True, False, None, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    *("", "4", "F32", "F8_E4M3", "F4", "BOOL", "I64", "1e999", "0x10", "__metadata__", "é", "名"),
    *("\ud800", "\udfff x", "\x00", "\n", "\x1b[2J\x1b]0;title\x07"),
    *("[red]x[/red]", "[/]", ":smile:"),
    *("..", "../x", "/etc/passwd", "a\0b", "x" * 300),
    *("(a+)+$", "("),
)
_CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [0],
    [0, 0],
    [4, 0],
    [0, 4, 8],
    [[4]],
    [{}],
    [None],
    {"a": 1},
    {"": {}},
    {"dtype": "F32"},
    [1 << 62, 1 << 62],
    [1 << 62, 1 << 62, 0],
    [0, 1 << 62, 1 << 62],
    [1] * 70,
    [-1, -4],
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)
ODD = (*_NUMBERS, *_CONSTANTS, *TEXTS, *_CONTAINERS)
_HOLE = "@hole@"  # stands in a document for what only text can say


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a document."""
    yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from nodes(value[key], (*path, key))


def changed_document(
    document: Any, rng: random.Random, odd: tuple[Any, ...] = ODD, times: int = 1
) -> Any:
    """A copy with values, names or entries replaced, dropped, moved or added."""
    document = copy.deepcopy(document)
    for _ in range(times):
        path = rng.choice(list(nodes(document)))
        if not path:
            if times == 1 and rng.random() < 0.2:
                document = copy.deepcopy(rng.choice(odd))
            continue
        outer = document
        for key in path[:-1]:
            outer = outer[key]
        action = rng.randrange(7)
        if action == 0:
            del outer[path[-1]]
        elif action == 1 and isinstance(outer, dict):
            outer[rng.choice([v for v in odd if isinstance(v, str)])] = outer.pop(path[-1])
        elif action == 2 and type(outer[path[-1]]) in (int, float):
            outer[path[-1]] += rng.choice((-1, 1, -4, 4, 1000, 1 << 40))
        elif action == 3 and isinstance(outer, list):
            outer.insert(rng.randrange(len(outer) + 1), copy.deepcopy(rng.choice(odd)))
        elif action == 4:
            value = outer[path[-1]]
            outer[path[-1]] = [value] if rng.random() < 0.5 else {"x": value}
        elif action == 5 and isinstance(outer[path[-1]], str):
            outer[path[-1]] += rng.choice([v for v in odd if isinstance(v, str)])
        else:
            outer[path[-1]] = copy.deepcopy(rng.choice(odd))
    return document


def _with_hole(document: Any, rng: random.Random) -> Any:
    """A copy in which one value is the hole."""
    document = {"x": copy.deepcopy(document)}
    path = rng.choice([p for p in nodes(document) if p])
    outer: Any = document
    for key in path[:-1]:
        outer = outer[key]
    outer[path[-1]] = _HOLE
    return document["x"]


def json_text(document: Any, rng: random.Random) -> bytes:
    """JSON as bytes, with characters escaped or as they are."""
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def json_values(data: bytes, rng: random.Random) -> bytes:
    """JSON with other values, names or entries."""
    times = rng.choice((1, 1, 1, 2))
    return json_text(changed_document(json.loads(data), rng, times=times), rng)


def json_spelling(data: bytes, rng: random.Random) -> bytes:
    """JSON with one value that no document of Python's can hold."""
    depth = rng.choice((10, 200, 900, 5000, 200_000))
    spellings = (
        b"[" * depth + b"]" * depth,
        b'{"a":' * depth + b"0" + b"}" * depth,
        b"[" * depth,
        b"9" * rng.choice((20, 400, 5000, 300_000)),
        b"1e400",
        b"-1E+999999",
        b'{"a": 1, "a": 2}',
        rb'"\ud800"',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b"[" + b"[]," * rng.choice((*[100] * 9, 3_000_000)) + b"[]]",
        b'"' + b"\\u0000" * 100_000 + b'"',
    )
    text = json.dumps(_with_hole(json.loads(data), rng)).encode()
    return text.replace(json.dumps(_HOLE).encode(), rng.choice(spellings), 1)


def _yaml_spelling(document: Any, rng: random.Random) -> str:
    depth = rng.choice((10, 200, 5000))
    bomb = "[&a [x,x,x,x,x,x,x,x,x]"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f", &{name} [" + ",".join([f"*{before}"] * 9) + "]"
    spellings = (
        bomb + "]",
        "&a [*a]",
        "*nowhere",
        "!!python/object/apply:os.system ['touch ran']",
        "!!binary ====",
        "!!timestamp x",
        "2001-13-45",
        "2001-01-01T00:00:00+99:99",
        "1:" * 3000 + "1",
        "9" * rng.choice((400, 5000, 100_000)),
        "{? [a, b] : c}",
        "{a: 1, a: 2}",
        "{<<: 1}",
        "{1: 2, null: 3, 1.5: 4}",
        "[" * depth + "]" * depth,
        '"\\ud800"',
        "!!set {a, b}",
        "!!int x",
        "!!float []",
        "\t- x",
        "0o9",
        ".inf",
        "@x",
    )
    hole = yaml.safe_dump(_with_hole(document, rng))
    return hole.replace(f"'{_HOLE}'", rng.choice(spellings), 1)


def yaml_values(data: bytes, rng: random.Random) -> bytes:
    """YAML, or the front matter of a card, with other values, names or entries."""
    front, text, rest = _yaml_part(data)
    document = changed_document(yaml.safe_load(text), rng, times=rng.choice((1, 1, 1, 2)))
    return front + yaml.safe_dump(document).encode(errors="surrogatepass") + rest


def yaml_spelling(data: bytes, rng: random.Random) -> bytes:
    """YAML, or the front matter of a card, with one value that is spelt in an odd way."""
    front, text, rest = _yaml_part(data)
    return front + _yaml_spelling(yaml.safe_load(text), rng).encode() + rest


def _yaml_part(data: bytes) -> tuple[bytes, bytes, bytes]:
    matter = re.match(rb"(---\n)(.*?)(\n---.*)", data, re.S)
    return matter.groups() if matter else (b"", data, b"")  # type: ignore[return-value]


def json_line(data: bytes, rng: random.Random) -> bytes:
    """One row of JSON lines broken, as any document."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((json_values, json_values, json_spelling))(lines[at], rng) + b"\n"
    return b"".join(lines)
