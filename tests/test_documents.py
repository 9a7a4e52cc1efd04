"""Text, JSON and YAML from outside: what a document costs is bounded before it is parsed."""

import ast
import json
import os
import time
from pathlib import Path

import pytest

from mergekit_bayes.documents import (
    DocumentError,
    parse_json,
    parse_yaml,
    read_bytes,
    read_mapping,
    read_object,
    read_text,
)
from mergekit_bayes.errors import CheckpointError

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


# Where documents are still read elsewhere, by module; each of them is to go.
_ELSEWHERE: dict[str, int] = {}


def test_documents_are_read_in_one_room() -> None:
    """No module parses JSON or YAML, or reads a whole file, but by `documents`."""
    root = Path(__file__).parent.parent
    found: dict[str, int] = {}
    for file in (*(root / "mergekit_bayes").rglob("*.py"), *(root / "cli").rglob("*.py")):
        if file.name != "documents.py":
            calls = sum(map(_reads_a_document, ast.walk(ast.parse(file.read_text()))))
            if calls:
                found[file.relative_to(root).as_posix()] = calls
    assert found == _ELSEWHERE


def _reads_a_document(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if (
            owner,
            name,
        ) in {
            ("json", "load"),
            ("json", "loads"),
            ("yaml", "load"),
            ("yaml", "safe_load"),
            ("yaml", "load_all"),
            ("yaml", "safe_load_all"),
        }:
            return True
        case ast.Attribute(attr="read_text" | "read_bytes", value=value):
            # `source.read_bytes(name, offset, out)` reads a tensor.
            return isinstance(value, ast.Name | ast.BinOp | ast.Call | ast.Attribute)
        case ast.Attribute(attr="model_validate_json"):
            return True
    return False
