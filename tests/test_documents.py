"""Text, JSON and YAML from outside: what a document costs is bounded before it is parsed."""

import ast
import json
import os
import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from mergekit_bayes.documents import (
    DocumentError,
    as_record,
    parse_json,
    parse_yaml,
    read_bytes,
    read_mapping,
    read_object,
    read_text,
)
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.records import Frozen

_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
_MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[]," * 10_000_000, "MiB when it is parsed"),
        ("1" * 400, "digits"),
        ("[1" + "0" * 309 + "]", "digits"),
        ("1e999", "too large"),
        (r'{"a": "\ud800"}', "surrogate"),
        ("{", "Expecting"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b'{"a": "\xe9"}', "not UTF-8 from byte 7"),
    ],
)
def test_json_that_costs_too_much_or_is_none_is_refused_with_a_reason(
    text: str | bytes, reason: str
) -> None:
    with pytest.raises(DocumentError, match=reason):
        parse_json(text)


def test_json_as_published_models_use_it_is_read() -> None:
    text = '{"model_max_length": 1000000000000000019884624838656, "limit": [0.0, Infinity]}'
    content = parse_json(text)
    assert content == {"model_max_length": 10**30 + 19884624838656, "limit": [0.0, float("inf")]}
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[NaN]", "[Infinity]"])
def test_strict_json_is_that_of_the_standard(text: str) -> None:
    parse_json(text)
    with pytest.raises(DocumentError):
        parse_json(text, strict=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 500, "nest"),
        ("- " * 100_000, "nested too deeply"),
        (_BOMB, "stands for more than 200,000 values"),
        (_MERGES, "stands for more than 200,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("- a\n" * 210_000, "stands for more than"),
        ("#" * (1 << 21), "characters, where at most"),
        ("a: " + "1" * 350, "digits"),
        ("a: " + ":".join(["59"] * 100_000), "digits"),
        ("a: 2026-99-99", "month"),
        ("!!python/object:os.system x", "constructor"),
        ("!!int x", "invalid literal"),
        ("!!timestamp x", "groupdict"),
        ('!!float ""', "index out of range"),
        ("!!bool x", "x"),
        ("a: \ud800", "surrogates"),
        ("? [a]\n: b", "unhashable"),
    ],
)
def test_yaml_that_costs_too_much_or_is_none_is_refused_with_a_reason(
    text: str, reason: str
) -> None:
    start = time.process_time()
    with pytest.raises(DocumentError, match=reason):
        parse_yaml(text)
    assert time.process_time() - start < 2


def test_yaml_with_aliases_is_read_and_a_key_twice_is_refused_where_asked() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}", unique=True)
    assert parse_yaml("a: 1\na: 2") == {"a": 2}
    with pytest.raises(DocumentError, match="twice"):
        parse_yaml("a: 1\na: 2", unique=True)


def test_no_pipe_folder_or_large_file_is_read(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe.json", tmp_path / "large.json"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing on the disk
    with pytest.raises(DocumentError, match="not a regular file"):
        read_bytes(pipe)
    with pytest.raises(DocumentError, match="1,099,511,627,776 bytes"):
        read_bytes(large)
    with pytest.raises(DocumentError, match="not a regular file"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    for file in (pipe, large, tmp_path, tmp_path / "missing.json"):
        assert read_object(file) == {}
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_mapping(file)


def test_the_pipe_of_a_shell_is_read() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write("a: 1")
    try:
        assert read_text(Path(f"/dev/fd/{reader}")) == "a: 1"
    finally:
        os.close(reader)


def test_a_mapping_is_read_by_its_ending(tmp_path: Path) -> None:
    file = tmp_path / "record.yaml"
    file.write_text("a: [1]")
    assert read_mapping(file) == {"a": [1]}
    for text in ("[1]", "1: 2"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"record.yaml: cannot be read .* Save it again."):
            read_mapping(file, "Save it again.")
    file = file.with_suffix(".json")
    file.write_text(json.dumps({"a": {"b": 1}}))
    assert read_mapping(file) == {"a": {"b": 1}}


class _Inside(Frozen):
    count: int = Field(ge=1)
    kind: Literal["a", "b"] = "a"


class _Record(Frozen):
    name: str
    inside: _Inside

    @model_validator(mode="after")
    def _refuse_no(self) -> "_Record":
        if self.name == "no":
            raise ValueError("no name is no")
        return self


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"inside": {"count": 1}}, "'name' is missing"),
        ({"name": "n", "inside": {"count": 1, "x": 2}}, "'inside.x' is no key of it"),
        ({"name": 3, "inside": {"count": 1}}, "'name' is 3, expected text"),
        (
            {"name": "n", "inside": {"count": 0}},
            "'inside.count' is 0, expected at least 1",
        ),
        (
            {"name": "n", "inside": {"count": 1, "kind": "c"}},
            "'inside.kind' is 'c', expected 'a' or 'b'",
        ),
        (
            {"name": "no", "inside": {"count": 1}},
            "it is {'name': 'no', 'inside': {'count': 1}}, no name is no",
        ),
    ],
)
def test_what_is_wrong_with_a_record_is_told_without_pydantic_s_words(
    content: object, reason: str
) -> None:
    with pytest.raises(DocumentError) as error:
        as_record(_Record, content)
    assert str(error.value) == reason


def test_documents_are_read_in_one_room() -> None:
    """No module parses JSON or YAML, or reads a whole file, but by `documents`."""
    root = Path(__file__).parent.parent
    found: dict[str, int] = {}
    for file in (*(root / "mergekit_bayes").rglob("*.py"), *(root / "cli").rglob("*.py")):
        if file.parent.name != "documents" and (reads := _reads(file.read_text())):
            found[file.relative_to(root).as_posix()] = len(reads)
    assert found == {}


@pytest.mark.parametrize(
    ("code", "is_a_read"),
    [
        ("json.loads(text)", True),
        ("parse = json.loads if x else yaml.safe_load", True),
        ("from json import loads", True),
        ("import json as j", True),
        ("yaml.load(text, yaml.CSafeLoader)", True),
        ("path.read_text()", True),
        ("Path(x).read_text(encoding='utf-8')", True),
        ("texts = map(Path.read_text, files)", True),
        ("(folder / name).read_bytes()", True),
        ("Report.model_validate_json(text)", True),
        ("TypeAdapter(int).validate_json(text)", True),
        ("open(path).read()", True),
        ("path.open().readlines()", True),
        ("source.read_bytes(name, offset, out)", False),
        ("super().read_bytes(name, 0, memory)", False),
        ("json.dumps(content)", False),
        ("yaml.safe_dump(content)", False),
        ("read_text(path)", False),
        ("def read_bytes(self, name, offset, out): ...", False),
    ],
)
def test_a_read_is_found_in_any_form(code: str, is_a_read: bool) -> None:
    assert bool(_reads(code)) == is_a_read


_PARSERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "yaml": {
        *("load", "load_all", "safe_load", "safe_load_all", "full_load", "full_load_all"),
        *("unsafe_load", "unsafe_load_all", "parse", "scan", "compose", "compose_all"),
    },
}
_TENSOR_ARGUMENTS = 3  # of TensorSource.read_bytes(name, offset, out), which reads a tensor


def _reads(code: str) -> list[ast.AST]:
    """The places in a module that parse a document or read a whole file by themselves."""
    tree = ast.parse(code)
    of_tensors = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) == _TENSOR_ARGUMENTS
    }
    return [node for node in ast.walk(tree) if _is_read(node) and id(node) not in of_tensors]


def _is_read(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="json" | "yaml" as library), attr=name):
            return name in _PARSERS[library]
        case ast.ImportFrom(module="json" | "yaml" as library, names=names):
            return any(alias.name in _PARSERS[library] for alias in names)
        case ast.Import(names=names):
            return any(alias.name in _PARSERS and alias.asname for alias in names)
        case ast.Attribute(attr="read_text" | "read_bytes"):
            return True
        case ast.Attribute(attr="model_validate_json" | "validate_json"):
            return True
        case ast.Attribute(attr="read" | "readlines", value=ast.Call(func=ast.Name(id="open"))):
            return True
        case ast.Attribute(attr="read" | "readlines", value=ast.Call(func=ast.Attribute(attr=a))):
            return a == "open"
    return False
