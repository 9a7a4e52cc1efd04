"""Any bytes in any file beside the tensors end in one message or are ignored; never a traceback."""

import copy
import json
import multiprocessing
import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_bayes.checkpoint.side_files import MERGE_REPORT
from mergekit_bayes.checkpoint.tokenizers import read_tokens
from mergekit_bayes.configs import load_config
from mergekit_bayes.detox.steps import model_identity
from mergekit_bayes.documents import as_record, parse_json, read_record
from mergekit_bayes.errors import BmergeError, CheckpointError, PrecisionError
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.finetune.checkpoints import MARKER, mark_whole, open_checkpoints
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.lora import merge_adapters, open_adapter
from mergekit_bayes.lora.truncate import truncate_dense, truncate_product
from mergekit_bayes.merge import MergeConfig, MergeReport, run_merge
from mergekit_bayes.merge.partial import Partial
from mergekit_bayes.merge.report import MergedModel
from mergekit_bayes.merge.side_files import SideFiles
from mergekit_bayes.merge.tally import UnitTally
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.merged import refuse_fixed
from mergekit_bayes.models.skeleton import load_skeleton
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior.info import PosteriorInfo, parse_info
from mergekit_bayes.recipes import read_recipe
from scripts.fuzzing.documents import ODD, nodes
from tests import tiny
from tests.adapters import BASE, adapter, factors

ROWS = 7
SHAPES = {**BASE, "wte.weight": (ROWS, 4)}

# What a file may hold instead of what it should; the last ones are no files.
NASTY: tuple[bytes | Callable[[Path], object], ...] = (
    b"",
    b"\0" * 40,
    b"\n" * 50,
    b"[",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"- " * 100_000,
    b"a: &a [*a]",
    b"a: &a [x, x]\n" + b"".join(b"a%d: &a [*a, *a, *a]\n" % i for i in range(40)),
    b"[]",
    b"{}",
    b"null",
    b"true",
    b"1",
    b"-1.5",
    b"1e999",
    b"NaN",
    b'"x"',
    b"x: 1\n",
    b"1: 2",
    b"1" * 5000,
    b'{"a": ' + b"9" * 350 + b"}",
    b'{"a": 1, "a": 2}',
    b'{"a": "\\ud800"}',
    b'{"\xe9": 1}',
    '{"é": 1}'.encode("utf-16"),
    b"\xef\xbb\xbf{}",
    b"\x1b[2J\x1b]0;x\x07",
    "\N{GRINNING FACE}".encode() * 5,
    b"a b c d",
    b"YQ==",
    b"YQ== -1",
    b"YQ== 99999999999999999999999",
    b"\x0a\x80",
    b"\x0a\x00" * 1000,
    b"\x0a" + b"\xff" * 20,
    b"version https://git-lfs.github.com/spec/v1\noid x\nsize 1",
    os.mkfifo,
    Path.mkdir,
    lambda file: file.symlink_to("nowhere"),
    lambda file: file.symlink_to(file.name),
)


def put(file: Path, content: bytes | Callable[[Path], object]) -> None:
    """Replace a file, or what lies in its place."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content(file)


def changed(good: object, count: int, seed: int) -> Iterator[bytes]:
    """The JSON of a document, each time with another value of it replaced by an odd one."""
    rng = random.Random(seed)
    cases = [(path, odd) for path in nodes(good) for odd in ODD]
    for path, odd in rng.sample(cases, min(count, len(cases))):
        document: Any = {"": copy.deepcopy(good)}
        inner = document
        for key in ("", *path)[:-1]:
            inner = inner[key]
        inner[("", *path)[-1]] = odd
        try:
            yield json.dumps(document[""]).encode()
        except ValueError:  # a number of more digits than Python writes
            continue


def ends_well(*commands: Callable[[], object]) -> None:
    """Run each command, which ends properly or in one message of the package."""
    for command in commands:
        with suppress(BmergeError):
            command()
        shutil.rmtree("out.partial", ignore_errors=True)


def sentencepiece(words: list[str]) -> bytes:
    """An encoded SentencePiece model with these pieces."""
    pieces = [b"\x0a" + bytes([len(word)]) + word.encode() + b"\x18\x01" for word in words]
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in pieces)


WORDS = [f"w{i}" for i in range(ROWS - 1)]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
CONFIG = {
    "architectures": ["OwnForSequenceClassification"],
    "eos_token_id": 1,
    "hidden_act": "gelu",
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "text_config": {"num_attention_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
OF_MODELS: dict[str, object] = {
    "config.json": CONFIG,
    "generation_config.json": {"eos_token_id": [1, 2]},
    "preprocessor_config.json": {"size": {"height": 2}},
    "modules.json": [{"idx": 0, "path": "1_Pooling"}],
    "chat_template.jinja": "{{ x }}",
    "tokenizer_config.json": {
        "eos_token": {"content": "w1"},
        "pad_token": "w0",
        "chat_template": "inline",
        "added_tokens_decoder": {"6": {"content": "<x>"}},
        "model_max_length": 10**30,
    },
    "special_tokens_map.json": {"eos_token": "w1"},
    "added_tokens.json": {"<x>": 6},
    "tokenizer.json": {
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 6, "content": "<x>", "special": True}],
    },
    "vocab.json": VOCABULARY,
    "vocab.txt": "\n".join(WORDS),
    "merges.txt": "a b",
    "x.tiktoken": "YQ== 0\nYg== 1",
    "tekken.json": {"vocab": [{"rank": 0, "token_bytes": "YQ=="}]},
    "tokenizer.model": sentencepiece(WORDS),
}
# The forms of a vocabulary, of which the first one that a folder has is read.
FORMS = ("tokenizer.json", "vocab.json", "vocab.txt", "x.tiktoken", "tokenizer.model")
ELSEWHERE = ("model.safetensors.index.json", "posterior/precision.index.json")


def encoded(content: object) -> bytes:
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "task")):
        tiny.write(f"{name}/model.safetensors", tiny.arrays(seed, SHAPES))
        for file, content in OF_MODELS.items():
            put(Path(name, file), encoded(content))
    for seed, name in enumerate(("adapter", "adapter2"), start=2):
        adapter(Path(name), factors(seed), rank_pattern={"q": 2}, alpha_pattern={"k": 4.0})


def plan() -> None:
    with plan_merge(MergeConfig(models=("task",), base="base", out="out", dtype="BF16")) as made:
        SideFiles(made).check()


def plan_adapted() -> None:
    plan_merge(MergeConfig(models=("base+adapter", "task"), base="base", out="out")).close()


def merge() -> None:
    run_merge(MergeConfig(models=("task",), base="base", out="out", dtype="BF16", force=True))
    run_inspect("out")


def merge_adapted() -> None:
    models = ("base+adapter", "task")
    run_merge(MergeConfig(models=models, base="base", out="out", force=True))


def with_only(file: str) -> None:
    """Leave a folder no vocabulary but the one that is to be read."""
    if file in FORMS or file == "added_tokens.json":
        keep = file if file in FORMS else "vocab.json"
        for form in FORMS:
            if form != keep:
                Path("task", form).unlink(missing_ok=True)


def test_the_good_files_are_merged(models: None) -> None:
    plan()
    plan_adapted()
    merge()
    merge_adapted()
    merge_adapters(("adapter", "adapter2"), Path("adapters"))


@pytest.mark.parametrize("file", [*OF_MODELS, *ELSEWHERE])
def test_a_models_side_file_may_hold_anything(models: None, file: str) -> None:
    with_only(file)
    for content in random.Random(file).sample(NASTY, 8):
        put(Path("task", file), content)
        ends_well(plan)


@pytest.mark.slow
@pytest.mark.parametrize("file", [*OF_MODELS, *ELSEWHERE])
def test_a_models_side_file_may_hold_anything_at_length(models: None, file: str) -> None:
    with_only(file)
    good = OF_MODELS.get(file)
    odd = changed(good, 150, seed=0) if isinstance(good, dict | list) else ()
    for content in (*NASTY, *odd):
        put(Path("task", file), content)
        ends_well(merge, lambda: run_inspect("task"))


def test_an_adapters_config_may_hold_anything(models: None) -> None:
    file = Path("adapter/adapter_config.json")
    good = json.loads(file.read_text())
    for content in (*random.Random(0).sample(NASTY, 12), *changed(good, 30, seed=0)):
        put(file, content)
        ends_well(plan_adapted)


@pytest.mark.slow
def test_an_adapters_config_may_hold_anything_at_length(models: None) -> None:
    file = Path("adapter/adapter_config.json")
    good = json.loads(file.read_text())
    for content in (*NASTY, *changed(good, 500, seed=0)):
        put(file, content)
        ends_well(
            merge_adapted,
            lambda: merge_adapters(("adapter", "adapter2"), Path("out"), force=True),
            lambda: run_inspect("adapter"),
        )


def test_a_change_beyond_float32_is_refused(models: None) -> None:
    adapter(Path("large"), factors(0), alpha=10**38)
    with pytest.raises(CheckpointError, match="lora_alpha not one up to 1e"):
        open_adapter("large")
    for side in (1e25, 1e30):
        with pytest.raises(CheckpointError, match="beyond float32"):
            truncate_product(np.full((4, 2), side), np.full((2, 4), side), 2)
    with pytest.raises(CheckpointError, match="beyond float32"):
        truncate_dense(np.full((4, 4), np.float32(np.inf)), 2)


def record() -> dict[str, Any]:
    """A record with every field of a posterior's."""
    mean = {"blocks": "b", "full": "f"}
    return {
        "format": 1,
        "estimator": "ggn",
        "unit": "token",
        "observations": 100.0,
        "ess": 50.0,
        "sampled": 10.0,
        "prior": {
            "kind": "base",
            "centre": "base",
            "precision": 1.0,
            "base": mean,
            "base_precision": mean,
            "base_count": 1.0,
        },
        "anchor": {"kind": "base", "precision": 1.0},
        "mean": mean,
        "base": mean,
        "tokenizer": "t",
        "dtype": "F32",
        "training": {"loss": "softmax cross-entropy", "steps": 3},
        "health": {"kappa": 2.0},
        "aliases": {"a": "b"},
        "terms": [{"label": "x", "mean": mean, "scale": 1.0, "gain": 2.0}],
        "merge": {"common_count": 100.0, "anchor": "h0", "uneven": False},
        "pool": "row",
        "predictive": {"prior": 5.0, "temperature": 0.5},
        "edits": [
            {
                "rows": [{"kind": "remove", "label": "r", "observations": 9, "sha256": "a"}],
                "removal": "npo",
                "memory": {"kind": "rows", "observations": 3, "sha256": "b"},
                "kappa": 2.0,
                "tau": 1.0,
                "prior": 1.5,
                "pool": "row",
                "steps": 3,
                "base": 100.0,
                "base_is_recorded": True,
                "start": mean,
                "start_precision": mean,
                "start_count": 1.0,
            }
        ],
    }


def test_a_posteriors_record_may_hold_anything() -> None:
    assert parse_info({"bmerge": json.dumps(record())}, Path()) is not None
    texts = [content.decode("latin-1") for content in NASTY if isinstance(content, bytes)]
    texts += [content.decode() for content in changed(record(), 400, seed=0)]
    for text in texts:
        ends_well(lambda text=text: parse_info({"bmerge": text}, Path("x")))


@pytest.mark.parametrize(
    ("path", "number"),
    [
        (("prior", "precision"), 1e39),
        (("prior", "precision"), -1.0),
        (("prior", "base_count"), 1e308),
        (("anchor", "precision"), float("nan")),
        (("terms", 0, "scale"), float("inf")),
        (("terms", 0, "gain"), -1e39),
        (("observations",), float("nan")),
        (("ess",), 10**300),
        (("merge", "common_count"), 1e300),
    ],
)
def test_a_number_that_no_merge_can_count_with_is_named(
    path: tuple[str | int, ...], number: float
) -> None:
    content: Any = record()
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = number
    with pytest.raises(PrecisionError, match=".".join(map(str, path))):
        parse_info({"bmerge": json.dumps(content)}, Path("x"))


def test_a_record_of_a_million_terms_is_refused_before_it_is_parsed() -> None:
    content = record()
    content["terms"] *= 100_000
    with pytest.raises(PrecisionError, match="characters, where at most"):
        parse_info({"bmerge": json.dumps(content)}, Path("x"))


@pytest.mark.parametrize("number", [ROWS, 10**9, 10**30])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_a_token_beyond_the_embedding_takes_no_memory(models: None, file: str, number: int) -> None:
    with_only(file)
    content = copy.deepcopy(OF_MODELS[file])
    vocabulary: Any = content
    if file == "tokenizer.json":
        vocabulary = vocabulary["model"]["vocab"]
    vocabulary["far"] = number
    put(Path("task", file), encoded(content))
    tracemalloc.start()
    try:
        with plan_merge(MergeConfig(models=("task",), base="base", out="out")) as made:
            notes = " ".join(made.notes)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    tokens = read_tokens(Path("task"))
    assert tokens is not None
    assert tokens.count == number + 1
    assert f"gives the token 'far' the number {number:,}, and the written embedding has" in notes


def test_a_name_of_a_tensor_that_no_model_has_is_refused(tmp_path: Path) -> None:
    long = {f"{'a.' * 5000}{i}": np.zeros((2, 2), np.float32) for i in range(2)}
    file = tiny.write(tmp_path / "a.safetensors", long)
    with pytest.raises(CheckpointError, match=r"a name of 10,001 characters, 'a\.a"):
        run_inspect(str(file))


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    adapter(one, factors(0), base_model_name_or_path=str(other))
    adapter(other, factors(1), base_model_name_or_path=str(one))
    with pytest.raises(CheckpointError, match="leads back to this adapter"):
        model_identity(str(one))


@pytest.mark.parametrize("named", [None, ""])
@pytest.mark.parametrize("reads", [model_identity, load_model, refuse_fixed, load_skeleton])
def test_an_adapter_that_names_no_base_is_told_where_one_is_needed(
    tmp_path: Path, reads: Callable[[str], object], named: str | None
) -> None:
    adapter(tmp_path / "a", factors(0), base_model_name_or_path=named, task_type="CAUSAL_LM")
    with pytest.raises(BmergeError, match=r"a/adapter_config\.json: base_model_name_or_path is"):
        reads(str(tmp_path / "a"))


def test_infinite_numbers_of_a_merge_are_read_back() -> None:
    models = (MergedModel(ref="a", role="task", scale=1.0, identity="i", ratio=float("inf")),)
    numbers: dict[str, Any] = {"largest_multiplier": float("inf"), "guarded_share": 0.5}
    fields: dict[str, Any] = dict.fromkeys(MergeReport.model_fields, None) | {"models": models}
    report = MergeReport.model_construct(**fields).model_copy(update=numbers)
    text = report.model_dump_json(exclude_none=True)
    content = parse_json(text)
    assert isinstance(content, dict)
    assert content["largest_multiplier"] == "Infinity"
    assert as_record(MergedModel, content["models"][0]) == models[0]


def marker() -> dict[str, object]:
    return {"format": 1, "step": 3, "loss": 1.0, "settings": {"lr": 0.1}, "files": {"a": 1}}


def test_a_checkpoints_marker_may_hold_anything(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    put(folder / "a", b"x")
    mark_whole(folder, 3, {"lr": 0.1}, 1.0)
    found = open_checkpoints(tmp_path, resume=True, force=False)
    assert found is not None
    assert (found.step, found.settings) == (3, {"lr": 0.1})
    for content in (*NASTY, *changed(marker(), 100, seed=0)):
        put(folder / MARKER, content)
        ends_well(lambda: open_checkpoints(tmp_path, resume=True, force=False))


def test_the_files_of_an_unfinished_merge_may_hold_anything(tmp_path: Path) -> None:
    tally = UnitTally(stored=[1.0], replaced=[2]).to_json()
    header = {"plan": "p", "sync": True, "boot": "", "host": "h"}
    lines = [header, {"unit": 0, "tally": tally}, {"synced": True}]
    journal = tmp_path / "out.partial" / "journal-1-of-1.jsonl"
    partial = Partial(journal.parent, "p")
    put(journal, b"\n".join(map(encoded, lines)))
    assert list(partial.journals.done()) == [0]
    for i, line in enumerate(lines):
        for content in changed(line, 100, seed=i):
            put(journal, b"\n".join([*map(encoded, lines[:i]), content]))
            ends_well(partial.journals.done)
    for content in NASTY:
        put(journal, content)
        ends_well(partial.journals.done)
        for name in ("plan.json", "whole.json"):
            put(partial.folder / name, content)
            assert not partial.is_publishing
            put(partial.folder / name, b"{}")


def evaluation() -> Mapping[str, object]:
    """The report of an evaluation and the lines of its files."""
    number = {"value": 1.0, "low": 0.5, "high": 1.5}
    names = ("loss", "token", "word", "byte", "bits_per_byte")
    perplexity = {
        "protocol": "rolling",
        "window": 8,
        "stride": 8,
        "documents": 1,
        "tokens": 4,
        "words": 2,
        "bytes": 9,
        "nats": 2.0,
        **dict.fromkeys(names, number),
    }
    toxicity = {
        **dict.fromkeys(("mean", "share", "expected_max", "any_toxic"), number),
        "threshold": 0.5,
        "n_prompts": 1,
        "n_continuations": 1,
    }
    return {
        "report.json": {
            "model": "m",
            "model_identity": "i",
            "settings": {"seed": 0},
            "perplexity": {"t": perplexity},
            "toxicity": {"s": toxicity},
        },
        "documents.jsonl": {"set": "t", "document": 0, "nats": 2.0, "tokens": 4},
        "continuations.jsonl": {"prompt": "p", "continuation": "c", "scores": {"s": 0.7}},
    }


def test_the_files_of_an_evaluation_may_hold_anything(tmp_path: Path) -> None:
    good = evaluation()
    for name, content in good.items():
        put(tmp_path / name, encoded(content))
    assert read_report(tmp_path).toxicity["s"].prompt_share == (1.0,)
    for i, (name, content) in enumerate(good.items()):
        for bad in (*NASTY, *changed(content, 100, seed=i)):
            put(tmp_path / name, bad)
            ends_well(lambda: read_report(tmp_path))
        put(tmp_path / name, encoded(content))


def test_the_report_of_a_merge_may_hold_anything(models: None) -> None:
    merge()
    file = Path("out", MERGE_REPORT)
    good = json.loads(file.read_text())
    for bad in (*NASTY, *changed(good, 100, seed=0)):
        put(file, bad)
        ends_well(lambda: read_record(MergeReport, file))


def test_a_recipe_may_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    good: dict[str, object] = {
        "models": ["a", "b"],
        "base": "c",
        "scale": [1.0, "a:attn=0.5"],
        "only": "attn",
        "isotropic": {"a": 1.0},
        "identities": {"a": "x"},
        "out": "o",
    }
    for bad in (*NASTY, *changed(good, 150, seed=0)):
        put(file, bad)
        ends_well(lambda: load_config(MergeConfig, file), lambda: read_recipe(file))


def test_a_posterior_info_is_a_record_of_every_field() -> None:
    assert record().keys() == PosteriorInfo.model_fields.keys()


LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lines": ("vocab.txt", lambda: b"\n" * (30 << 20)),
    "wide": ("vocab.txt", lambda: "\N{GRINNING FACE}".encode() + b"a" * (31 << 20)),
    "pieces": ("tokenizer.model", lambda: b"\x0a\x00" * (30 << 20)),
    "long integer": ("tokenizer.model", lambda: b"\x0a" + b"\xff" * (60 << 20)),
    "fields": ("tokenizer.model", lambda: b"\x0a\x80\x80\x80\x10" + b"\x08\x00" * (1 << 24)),
    "ranks": ("x.tiktoken", lambda: b"YWJj 1\n" * (4 << 20)),
    "long token": ("x.tiktoken", lambda: b"YWJj" * (8 << 20) + b" 0\n"),
    "numbers": ("vocab.json", lambda: b'{"a":[' + b"1," * (5 << 20) + b"1]}"),
    "names": ("tokenizer_config.json", lambda: encoded({f"a{i}": i for i in range(900_000)})),
    "keys": ("config.json", lambda: encoded({f"a{i}_heads": i for i in range(500_000)})),
    "text": ("chat_template.jinja", lambda: b"x" * (120 << 20)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_a_large_file_takes_ten_seconds_and_500_mib_at_most(models: None, case: str) -> None:
    file, content = LARGE[case]
    with_only(file)
    put(Path("task", file), content())
    plan_alone = multiprocessing.get_context("fork").Process(target=measured_plan)
    plan_alone.start()
    plan_alone.join(30)
    if plan_alone.is_alive():
        plan_alone.kill()
    assert plan_alone.exitcode == 0


def measured_plan() -> None:
    """Plan in a process of its own, within its own processor time and resident memory."""
    peak, start = Path("/proc/self/clear_refs"), time.process_time()
    peak.write_text("5")  # forget the peak that was inherited
    before = resident_peak()
    ends_well(plan)
    assert time.process_time() - start < 10
    assert resident_peak() - before < 500 << 10


def resident_peak() -> int:
    """The peak of resident memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
