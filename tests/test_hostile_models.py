"""A model folder may hold anything: it is loaded, or refused by one message, soon and in little
memory.
"""

import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mergekit_bayes.errors import BmergeError, CheckpointError, MismatchError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.evaluate.scorers import open_scorer
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.finetune.checkpoints import Checkpoint, refuse_broken
from mergekit_bayes.libraries import call, call_tokenizers
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import load_model
from tests.tiny_models import tiny_bert, tiny_gpt2

CLEAR = Path("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = tiny_gpt2(folder / "gpt2", width=8, layers=1)
    tiny_bert(folder / "bert")
    settings = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), settings)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder / "adapter")
    (folder / "t.jsonl").write_text('{"text": "the cat aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"}\n')
    (folder / "w.txt").write_text("bad\n")
    return folder


@pytest.fixture
def folders(built, tmp_path):
    """A copy of each folder, to be spoiled."""
    for name in ("gpt2", "bert", "adapter"):
        shutil.copytree(built / name, tmp_path / name)
    return tmp_path


def change(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | values).items() if v != "DEL"}))


def run(built, model):
    """All that runs a model and its tokenizer."""
    return run_evaluate(
        EvaluateConfig(
            model=str(model),
            perplexity={"t": str(built / "t.jsonl")},
            toxicity=str(built / "t.jsonl"),
            scorer=(f"words:{built / 'w.txt'}",),
            continuations=1,
            new_tokens=2,
            bootstrap=0,
        ),
        quiet=True,
    )


def memory():
    """MiB at this process' peak since `CLEAR` was written; 0 where there is no /proc."""
    if not CLEAR.exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def bounded(function):
    """Run it; it gives a result or a message, in 10 seconds and 500 MiB."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    before, start = memory(), time.monotonic()
    try:
        result = function()
    except BmergeError as error:
        result = str(error)
    assert time.monotonic() - start < 10
    assert memory() - before < 500
    assert not isinstance(result, str) or "\n" not in result
    return result


LARGE = {  # by architecture; every one is refused
    "gpt2": [
        {"n_layer": 10**9},
        {"n_layer": 60_000},
        {"n_layer": 0},
        {"n_layer": -1},
        {"n_embd": 10**7},
        {"n_positions": 10**9},
        {"n_positions": 10**6},
        {"vocab_size": 10**12},
        {"vocab_size": 10**8},
        {"n_head": 3},
        {"n_head": -1},
        {"n_inner": 10**9},
        {"n_layer": "x"},
        {"n_embd": None},
        {"vocab_size": []},
        {"architectures": [1], "model_type": 5},
        {"num_labels": 10**9},
        {"chunk_size_feed_forward": 3},
        {"transformers_weights": "../x.safetensors"},
        {"configuration_files": ["config.1.0.json"]},
        {"model_type": "llama", "num_hidden_layers": 10**5, "num_attention_heads": 2},
        {"model_type": "qwen2", "num_hidden_layers": 10**9},
        {
            "model_type": "distilbert",
            "sinusoidal_pos_embds": True,
            "max_position_embeddings": 10**9,
        },
    ],
    "bert": [
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": 10**9},
        {"max_position_embeddings": 1},
        {"hidden_size": 10**7},
        {"num_attention_heads": -1},
        {"type_vocab_size": 10**12},
        {"chunk_size_feed_forward": 3},
        {"pad_token_id": 10**9},
        {"attention_window": [10**9, 4]},
    ],
}


@pytest.mark.parametrize(
    ("kind", "values"), [(k, v) for k, each in LARGE.items() for v in each], ids=str
)
def test_a_config_that_its_tensors_do_not_bear_out_is_refused(built, folders, kind, values):
    change(folders / kind / "config.json", **values)

    def load():
        loaded = load_model(str(folders / kind))
        loaded.move_to("cpu")
        return loaded

    message = bounded(load)
    assert isinstance(message, str), "it was loaded"
    assert str(folders / kind) in message


def test_a_tensor_of_another_shape_is_named(folders):
    change(folders / "gpt2" / "config.json", vocab_size=26)
    with pytest.raises(
        CheckpointError, match=r"wte\.weight' is \(27, 8\) in the file, and \(26, 8\)"
    ):
        load_model(str(folders / "gpt2"))


VALUES = (10**9, 10**12, 10**30, -1, 0, 3, None, "x", [], {}, True, 1.5, "DEL")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_any_value_of_any_key_is_run_or_refused(built, folders, name):
    good = json.loads((folders / "gpt2" / name).read_text())
    for key in good:
        for value in VALUES:
            (folders / "gpt2" / name).write_text(json.dumps(good))
            change(folders / "gpt2" / name, **{key: value})
            bounded(lambda: run(built, folders / "gpt2"))


def replaced(part, value):
    """Change one part of `tokenizer.json`."""

    def do(folder):
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content[part] = content[part] | value if part == "model" else value
        file.write_text(json.dumps(content))

    return do


def regex(pattern):
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


VOCABULARY = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
TOKENIZERS = {  # with a word of the message
    "id": (replaced("model", {"vocab": VOCABULARY | {"the": 10**6}}), "1,000,000.*27 rows"),
    "own id": (replaced("model", {"vocab": {"<s>": 10**6, "a": 1}}), "bos_token.*27 rows"),
    "no vocabulary": (replaced("model", {"vocab": {}}), "no tokenizer, or an empty"),
    "no unknown": (replaced("model", {"unk_token": "z"}), "Missing"),
    "negative": (replaced("model", {"vocab": {"a": -1}}), "u32"),
    "broken regex": (replaced("normalizer", regex("(")), "Oniguruma"),
    "slow regex": (replaced("normalizer", regex("(a+)+$")), "retry-limit"),
    "long replacement": (
        replaced("normalizer", {"type": "Prepend", "prepend": "a" * 10**5}),
        "100,000 times as long",
    ),
    "map that ends the process": (
        replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        "shorter than it says",
    ),
    "panic": (
        replaced("model", {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}),
        "tokenizer",
    ),
    "other type": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer"),
    "deep": (lambda f: (f / "tokenizer.json").write_text('{"a":' * 10**5), "tokenizer"),
    "bytes": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\0"), "tokenizer"),
    "pipe": (lambda f: os.mkfifo(f / "chat_template.jinja"), "not a regular file"),
    "pipe of merges": (lambda f: os.mkfifo(f / "merges.txt"), "not a regular file"),
    "deep settings": (lambda f: (f / "tokenizer_config.json").write_text("[" * 10**5), "deeply"),
    "long number": (
        lambda f: (f / "tokenizer_config.json").write_text(f'{{"model_max_length": {"9" * 401}}}'),
        "digits",
    ),
    "empty unknown": (lambda f: change(f / "tokenizer_config.json", unk_token=""), "Recursion"),
    "stop": (lambda f: change(f / "generation_config.json", eos_token_id="x"), "eos_token_id"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_broken_tokenizer_is_one_message(built, folders, capfd, name):
    spoil, message = TOKENIZERS[name]
    spoil(folders / "gpt2")
    with pytest.raises(CheckpointError, match=message):
        bounded_raise(lambda: run(built, folders / "gpt2"))
    assert "panicked" not in capfd.readouterr().err


def bounded_raise(function):
    result = bounded(function)
    if isinstance(result, str):
        raise CheckpointError(result)


ADAPTERS = {
    "rank": ({"r": 10**9}, "'r' is 1000000000"),
    "ranks": ({"rank_pattern": {"c_attn": 10**9}}, "'c_attn' is 1000000000"),
    "hybrid rank": ({"peft_type": "GRALORA", "hybrid_r": 10**6}, "'hybrid_r' is 1000000"),
    "copies": ({"layer_replication": [[0, 1]] * 1000}, "layer_replication has 2,000"),
    "layers": ({"layers_to_transform": 10**9, "num_layers": 10**9}, "1000000000"),
    "steps": ({"init_lora_weights": "pissa_niter_999999999"}, "init_lora_weights"),
    "module": ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "megatron_core"),
    "shadow": ({"peft_type": "SHADOW", "shadow_model": "org/model"}, "shadow_model"),
    "experts": ({"peft_type": "XLORA", "adapters": {"0": "org/adapter"}}, "adapters"),
    "tokens": (
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "org/model"},
        "tokenizer_name_or_path",
    ),
    "kind": ({"peft_type": "x"}, "adapter_config.json"),
    "base": ({"base_model_name_or_path": None}, "None"),
    "pattern": ({"target_modules": "(a+)+(.*.*.*)*c_attn"}, "regular expression"),
    "no pattern": ({"target_modules": "("}, "regular expression"),
    "pattern of ranks": ({"rank_pattern": {"(.*)*(.*)*x": 1}}, "regular expression"),
    "alpha": ({"lora_alpha": "x"}, "peft"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_its_tensors_do_not_bear_out_is_refused(folders, name):
    values, message = ADAPTERS[name]
    change(folders / "adapter" / "adapter_config.json", **values)
    with pytest.raises(BmergeError, match=message):
        bounded_raise(lambda: load_model(str(folders / "adapter")))


def test_no_connection_is_made_for_a_folder_on_disk(folders, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("gpt2", "bert", "adapter"):
        load_model(str(folders / name))
    (folders / "gpt2" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        load_model(str(folders / "gpt2"))


def test_tokens_beyond_the_embedding_are_refused_with_both_numbers(folders):
    loaded = load_model(str(folders / "gpt2"))
    loaded.tokenizer.add_tokens(["zebra"])
    with pytest.raises(CheckpointError, match=r"token 27, but the model's embedding has 27 rows"):
        encode_rows({"text": ["the zebra"]}, loaded)
    assert encode_rows({"text": ["the cat"]}, loaded)


def test_a_model_that_fails_on_some_texts_is_one_message(built, folders):
    """A tokenizer may say that texts are longer, or of more types, than the model has rows for."""
    text = "the cat " * 100
    change(folders / "bert" / "tokenizer_config.json", model_max_length=10**6)
    scorer = open_scorer(f"model:{folders / 'bert'}#LABEL_0=softmax")
    assert scorer.score([text]) == scorer.score([text[:-50]])  # both cut at the context
    step = {"Sequence": {"id": "A", "type_id": 7}}
    template = {"type": "TemplateProcessing", "single": [step], "pair": [step, step]}
    change(folders / "bert" / "tokenizer.json", post_processor=template | {"special_tokens": {}})
    names = ["input_ids", "token_type_ids", "attention_mask"]
    change(folders / "bert" / "tokenizer_config.json", model_input_names=names)
    with pytest.raises(CheckpointError, match=r"the model cannot be run \(.*index out of range"):
        open_scorer(f"model:{folders / 'bert'}#LABEL_0=softmax").score([text])


def test_only_the_library_is_wrapped():
    """Ctrl-C and an exit pass, and errors of this package keep their class."""
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error):
            call("x", raising(error()))
    with pytest.raises(BmergeError, match=r"^own$"):
        call("x", raising(BmergeError("own")))
    for error in (RecursionError("deep"), MemoryError(), KeyError("k"), OSError(2, "no file")):
        with pytest.raises(CheckpointError, match=r"^what "):
            call("what", raising(error))
    with pytest.raises(CheckpointError, match=r"\(one\\x1b\[2J\)\. Do this\.$"):
        call("what", raising(ValueError("one\x1b[2J\ntwo")), "Do this.")


def raising(error):
    def function():
        raise error

    return function


def test_what_is_written_during_a_call_is_shown_unless_it_panics(capfd):
    panic = type("PanicException", (BaseException,), {})

    def write(error=None):
        os.write(2, b"stack backtrace")
        if error:
            raise error

    call_tokenizers("x", write)
    assert capfd.readouterr().err == "stack backtrace"
    with pytest.raises(CheckpointError):
        call_tokenizers("x", lambda: write(ValueError("x")))
    assert capfd.readouterr().err == "stack backtrace"
    with pytest.raises(CheckpointError, match="PanicException: index"):
        call_tokenizers("x", lambda: write(panic("index")))
    assert not capfd.readouterr().err


def test_a_tokenizer_runs_where_no_disk_can_be_written(monkeypatch):
    def read_only(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert call_tokenizers("x", lambda: 1) == 1


def test_a_fine_tune_tries_the_model_and_bounds_a_new_head(built, folders):
    change(folders / "gpt2" / "config.json", n_head=-1)
    config = FinetuneConfig(
        model=str(folders / "gpt2"),
        data=str(built / "t.jsonl"),
        output=str(folders / "out"),
        max_steps=1,
    )
    with pytest.raises(CheckpointError, match="cannot be run"):
        run_finetune(config, quiet=True)
    change(folders / "bert" / "config.json", architectures=["BertModel"])
    (folders / "l.jsonl").write_text('{"text": "the cat", "label": 1000000000}\n')
    config = FinetuneConfig(
        model=str(folders / "bert"),
        data=str(folders / "l.jsonl"),
        output=str(folders / "out"),
        max_steps=1,
        task="classification",
    )
    with pytest.raises(MismatchError, match=r"label 1,000,000,000 in column 'label'"):
        run_finetune(config, quiet=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_broken_checkpoint_is_refused_before_it_is_resumed(tmp_path, name):
    (tmp_path / "trainer_state.json").write_text("{}")
    torch.save({"state": torch.ones(2)}, tmp_path / "optimizer.pt")
    torch.save({"numpy": np.zeros(2, np.uint32)}, tmp_path / "rng_state.pth")
    checkpoint = Checkpoint(tmp_path, 1, {}, 0.0)
    refuse_broken(checkpoint)
    (tmp_path / name).write_bytes(b"\x80\x02" + b"c" * 50)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read .* before it"):
        refuse_broken(checkpoint)


def test_numbers_of_published_configs_are_accepted(folders):
    """Sentinels and keys that transformers does not use are nobody's fault."""
    honest = {
        "num_nextn_predict_layers": 0,
        "num_kv_shared_layers": -1,
        "rope_theta": 10**12,
        "num_parameters": 70 * 10**9,
        "tokenizer_model_max_length": int(1e30),
        "max_sequence_length": 10_485_760,
        "sliding_window": None,
        "label_smoothing": 0.1,
        "extra": {"vocab_size": 10**6},
        "auto_map": {},
        "attn_implementation": "eager",
    }
    change(folders / "gpt2" / "config.json", **honest)
    load_model(str(folders / "gpt2")).move_to("cpu")


WORD_LISTS = {
    "pipe": (os.mkfifo, "not a regular file"),
    "utf16": (lambda f: f.write_bytes("bad".encode("utf-16")), "not UTF-8 but UTF-16"),
    "latin": (lambda f: f.write_bytes(b"caf\xe9"), "not UTF-8"),
    "large": (lambda f: f.write_text("bad\n" * 300_000), "1,200,000 bytes, where at most"),
    "folder": (Path.mkdir, "Is a directory"),
    "empty": (lambda f: f.write_text("\n \n"), "the word list is empty"),
}


@pytest.mark.parametrize("name", WORD_LISTS)
def test_a_word_list_that_cannot_be_read_is_one_message(tmp_path, name):
    make, message = WORD_LISTS[name]
    make(tmp_path / "list.txt")
    with pytest.raises(BmergeError, match=message) as refused:
        open_scorer(f"words:{tmp_path / 'list.txt'}")
    assert "list.txt" in str(refused.value)
