"""A file or folder of rows may hold anything: it is read or refused by one message, and nothing
is fetched because a card says so.
"""

import gzip
import json
import os
import socket
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models import data_files, row_bytes, rows
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rows import load_rows

GOOD = '{"text": "the cat"}\n{"text": "a dog"}\n'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def nested(depth, opening="[", closing="]"):
    return '{"text": "a", "x": ' + opening * depth + "1" + closing * depth + "}\n"


FILES = {
    "utf16.jsonl": (GOOD.encode("utf-16"), "is UTF-16"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "is UTF-16"),
    "latin.jsonl": (GOOD.encode() + b'{"text": "caf\xe9"}\n', "line 3: byte 0xe9 is not UTF-8"),
    "latin.csv": (b"text\ncaf\xe9\n", "line 2: byte 0xe9"),
    "latin.txt": (b"caf\xe9\n", "line 1: byte 0xe9"),
    "cut.txt": ("é".encode()[:1], "byte 0xc3"),
    "zeros.jsonl": (b"\0" * 5000, "begins with zeros"),
    "nul.jsonl": ('{"text": "a\0b"}\n', "datasets cannot read it"),
    "half.jsonl": ('{"text": "\\ud800"}\n', "surrogate"),
    "deep.jsonl": (GOOD + nested(10**5), "line 3.*nested"),
    "deep.json": ("[" * 10**6, "nested"),
    "objects.jsonl": (nested(10**5, '{"a":', "}"), "line 1.*nested"),
    "text.jsonl": ('{"text": ' + "[" * 150 + "]" * 150 + "}\n", "nested"),
    "over lines.jsonl": ('{"text": "]", "a":\n' + '[ "]"\n,' * 150, "nested"),
    "broken.jsonl": ('{"text": "a"}\n{"text":\n', "datasets cannot read it"),
    "broken.json": ('[{"text": "a"},', "datasets cannot read it"),
    "twice.jsonl": ('{"text": "a", "text": "b"}\n', "twice"),
    "wide.jsonl": (json.dumps(dict.fromkeys(map(str, range(30000)), 1)), "30,000 names"),
    "wide.csv": ("a," * 30000 + "\n", "30,001 names"),
    "broken.csv": ('text,a\n1,2,3\n"unclosed', "datasets cannot read it"),
    "broken.parquet": (b"PAR1" + b"\0" * 100 + b"PAR1", "datasets cannot read it"),
    "short.parquet": (b"PAR1", "datasets cannot read it"),
    "broken.jsonl.gz": (b"\x1f\x8b" + b"\0" * 50, "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode())[:-9], "cannot be read"),
    "empty.jsonl": ("", "is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_message(tmp_path, capfd, name):
    content, message = FILES[name]
    start = time.monotonic()
    file = write(tmp_path / name, content)
    # As every command has the libraries.
    with quiet_libraries(bars=False), pytest.raises(CheckpointError, match=message) as refused:
        load_rows(file, text="text")
    assert time.monotonic() - start < 10
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not capfd.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_rows(str(tmp_path / "t.jsonl"))


def test_long_lines_and_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(row_bytes, "_BLOCK", 64)
    monkeypatch.setattr(row_bytes, "_LINE", 1000)
    long = json.dumps({"text": "a" * 1001}) + "\n"
    with pytest.raises(CheckpointError, match="a line has more than"):
        load_rows(write(tmp_path / "t.jsonl", GOOD + long))
    assert len(load_rows(write(tmp_path / "t.json", f"[{long}, {long}]"))) == 2
    monkeypatch.setattr(row_bytes, "_FREE", 5000)
    bomb = gzip.compress(GOOD.encode() * 10**5)
    with pytest.raises(CheckpointError, match="when it is decompressed"):
        load_rows(write(tmp_path / "t.jsonl.gz", bomb))


@pytest.mark.parametrize("block", [1, 3, 7, 1 << 20])
def test_brackets_and_quotes_in_texts_are_no_nesting(tmp_path, monkeypatch, block):
    """However the blocks cut the file."""
    monkeypatch.setattr(row_bytes, "_BLOCK", block)
    texts = ["[{" * 300, '"[' * 200, '\\"[' * 200, "\\" * 301 + "[" * 300, "]}" * 300, "é[" * 200]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    assert load_rows(write(tmp_path / "t.jsonl", lines), text="text")["text"][:] == texts
    with pytest.raises(CheckpointError, match=r"line 7: .*nested"):
        load_rows(write(tmp_path / "deep.jsonl", lines + nested(101)))


def card(front, body=GOOD):
    return {"README.md": f"---\n{front}\n---\ntext\n", "a.jsonl": body}


def entry(pattern):
    return f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {pattern}"


OUTSIDE = (
    "http://127.0.0.1:9/x.jsonl",
    "https://example.com/x.jsonl",
    "hf://datasets/a/b/x.jsonl",
    "file:///etc/passwd",
    "zip://x.jsonl::http://127.0.0.1:9/x.zip",
    "/etc/passwd",
    "~/x.jsonl",
    "../x.jsonl",
    "a/../../x.jsonl",
    "[a.jsonl, http://127.0.0.1:9/x.jsonl]",
)


def folder(root, files):
    for name, content in files.items():
        write(root / name, content)
    return str(root)


@pytest.mark.parametrize("pattern", OUTSIDE)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_names_nothing_outside_of_its_folder(tmp_path, pattern, name):
    text = entry(pattern)
    files = {"a.jsonl": GOOD, name: f"---\n{text}\n---\n" if name == "README.md" else text}
    with pytest.raises(CheckpointError, match=r"which is not in the folder"):
        load_rows(folder(tmp_path / "data", files))


def test_a_card_chooses_among_the_files_of_its_folder(tmp_path):
    files = card(entry('"x*.jsonl"')) | {"x1.jsonl": GOOD, "x2.jsonl": GOOD}
    assert len(load_rows(folder(tmp_path / "chosen", files))) == 4
    several = "configs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n"
    with pytest.raises(ConfigError, match=r"several data sets \('a', 'b'\)"):
        load_rows(folder(tmp_path / "several", card(several)))
    chosen = several + "  data_files: a.jsonl\n  default: true\n"
    assert len(load_rows(folder(tmp_path / "default", card(chosen)))) == 2


def config(**settings):
    lines = "".join(f"\n  {key}: {value}" for key, value in settings.items())
    return f"---\nconfigs:\n- config_name: default{lines}\n---\n"


READ_AS = {  # what a card says, and its files, both of which hold the same two rows
    "folder": (config(data_dir="en"), {"en/train.jsonl": GOOD, "fr/train.jsonl": GOOD * 2}),
    "sign": (config(sep="';'"), {"train.csv": "text;n\nthe cat;1\na dog;2\n"}),
    "names": (config(names="[text, n]"), {"train.csv": "the cat,1\na dog,2\n"}),
    "tabs": (config(), {"train.tsv": "text\tn\nthe cat\t1\na dog\t2\n"}),
    "field": (
        config(field="rows"),
        {"train.json": '{"rows": [{"text": "the cat"}, {"text": "a dog"}]}'},
    ),
    "else": (config(features="[]", description="x", sample_by="word"), {"train.jsonl": GOOD}),
}


@pytest.mark.parametrize("name", READ_AS)
def test_a_card_says_how_its_rows_are_read(tmp_path, name):
    front, files = READ_AS[name]
    path = folder(tmp_path / "data", files | {"README.md": front})
    if name == "else":
        with pytest.raises(CheckpointError, match=r"its card reads the rows with 'features'"):
            load_rows(path)
    else:
        assert load_rows(path, text="text")["text"][:] == ["the cat", "a dog"]


@pytest.mark.parametrize("value", ["'(a+)+$'", "''", "[',']", "5"])
def test_a_separator_of_a_card_is_one_character(tmp_path, value):
    """A longer one is a regular expression for the reader."""
    path = folder(tmp_path / "data", {"README.md": config(sep=value), "a.csv": "text\nx\n"})
    with pytest.raises(CheckpointError, match=r"its card reads the rows with 'sep'"):
        load_rows(path)


CARDS = {
    "deep": ("[" * 10**4, "cannot be read"),
    "bomb": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
            for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "cannot be read",
    ),
    "shape": (
        "configs:\n- config_name: default\n  data_files:\n  - split: [1]\n",
        "cannot be listed",
    ),
    "none": (entry('"none*"'), "cannot be listed|holds no rows"),
    "number": ("configs: 5", None),
    "types": ("dataset_info:\n  features:\n  - name: text\n    dtype: image", None),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_may_hold_anything(tmp_path, name):
    front, message = CARDS[name]
    path = folder(tmp_path / "data", card(front) | {"dataset_infos.json": "[" * 10**5})
    if message is None:
        assert load_rows(path, text="text")["text"][:] == ["the cat", "a dog"]
    else:
        with pytest.raises(BmergeError, match=message):
            load_rows(path)


def test_files_of_a_folder_are_its_own(tmp_path):
    """Links inside of it and those of a Hub cache are."""
    outside = write(tmp_path / "secret.jsonl", GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jsonl").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"leads out of its folder, to .*secret\.jsonl"):
        load_rows(str(tmp_path / "out"))
    inside = folder(tmp_path / "in", {".files/a.jsonl": GOOD})
    (tmp_path / "in" / "a.jsonl").symlink_to(".files/a.jsonl")
    assert len(load_rows(inside)) == 2
    write(tmp_path / "datasets--org--d" / "blobs" / "1", GOOD)
    snapshot = tmp_path / "datasets--org--d" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.jsonl").symlink_to("../../blobs/1")
    assert len(load_rows(str(snapshot))) == 2


def test_what_else_lies_in_a_folder_is_left(tmp_path):
    """The rows are those of the usual format; code, pipes and archives are not touched."""
    files = {"a.jsonl": GOOD, "b.jsonl": GOOD, "c.csv": "text\nx\n", "data.py": "raise SystemExit"}
    path = folder(tmp_path / "data", files | {"x.tar": b"x", "x.pkl": b"x"})
    os.mkfifo(tmp_path / "data" / "d.jsonl")
    assert len(load_rows(path)) == 4
    with pytest.raises(CheckpointError, match=r"no split 'train', only 'test'"):
        load_rows(folder(tmp_path / "test only", {"test.jsonl": GOOD}))
    for files in ({"a.tar": b"x"}, {"a.pkl": b"x"}):
        with pytest.raises(CheckpointError, match=r"holds no rows|cannot be listed"):
            load_rows(folder(tmp_path / str(*files), files))


def test_values_that_are_files_are_not_opened(tmp_path):
    """A Parquet file may say that a column is of images, which are fetched when they are read."""
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = [{"bytes": None, "path": "http://127.0.0.1:9/x.png"}]
    table = pyarrow.table({"text": pyarrow.array(images, image), "label": ["a"]})
    features = {"text": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(said), tmp_path / "t.parquet")
    with pytest.raises(MismatchError, match="no column 'text'; it has label"):
        load_rows(str(tmp_path / "t.parquet"), text="text")
    assert load_rows(str(tmp_path / "t.parquet"), text="label")["label"][:] == ["a"]


def test_a_parquet_file_of_very_many_columns_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "_COLUMNS", 3)
    for count in (3, 4):
        table = pyarrow.table({"text": ["x"]} | {f"c{i}": ["x"] for i in range(1, count)})
        pyarrow.parquet.write_table(table, tmp_path / f"{count}.parquet")
    assert load_rows(str(tmp_path / "3.parquet"), text="text")["text"][:] == ["x"]
    with pytest.raises(CheckpointError, match=r"it has 4 columns, expected at most 3"):
        load_rows(str(tmp_path / "4.parquet"))


def test_bytes_of_a_parquet_file_that_are_no_text_are_one_message(tmp_path):
    values = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "t.parquet")
    with pytest.raises(CheckpointError, match=r"t\.parquet'.*column 'text' cannot be read"):
        load_rows(str(tmp_path / "t.parquet"), text="text")


def test_the_card_of_a_hub_data_set_is_read_before_its_rows(tmp_path, monkeypatch):
    """Rows are of the commit whose card was read."""
    revisions = []

    def load_dataset(repo, *, split, revision, features):
        revisions.append(revision)
        return datasets.Dataset.from_dict({"text": ["the cat"]})

    snapshot = tmp_path / "snapshots" / "abc"
    monkeypatch.setattr(rows, "resolve", lambda *_, **__: snapshot)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder(snapshot, card(entry("http://127.0.0.1:9/x.jsonl")))
    with pytest.raises(CheckpointError, match="which is not in the folder"):
        load_rows("org/data")
    folder(snapshot, card(entry("a.jsonl")))
    assert load_rows("org/data@v1")["text"][:] == ["the cat"]
    (snapshot / "README.md").unlink()
    assert load_rows("org/data")["text"][:] == ["the cat"]

    def missing(*_, **__):
        raise CheckpointError("offline")

    monkeypatch.setattr(rows, "resolve", missing)
    assert load_rows("org/data@v1")["text"][:] == ["the cat"]
    assert revisions == ["abc", "abc", "v1"]


def test_rows_of_a_cache_that_shares_its_blobs_are_read(tmp_path):
    """The Hub's client links a snapshot's file to a blob, and that to the store of all blobs."""
    store = tmp_path / "blobs" / "ab" / ("ab" * 32)
    repository = tmp_path / "datasets--org--d"
    blob, snapshot = repository / "blobs" / "hash", repository / "snapshots" / "c0ffee"
    for folder in (store.parent, blob.parent, snapshot):
        folder.mkdir(parents=True)
    store.write_text(GOOD)
    blob.symlink_to(store)
    (snapshot / "a.jsonl").symlink_to(blob)
    assert len(load_rows(str(snapshot))) == GOOD.count("\n")
    (snapshot / "a.jsonl").unlink()
    (snapshot / "a.jsonl").symlink_to(write(tmp_path / "elsewhere.jsonl", GOOD))
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load_rows(str(snapshot))
