"""Rows and models in, batches out: what is read, refused, and counted as an observation."""

import gzip
import json
import os

import pytest
import torch
import transformers

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models.encode import (
    IGNORED,
    Collate,
    batches,
    encode_rows,
    observations,
)
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.rows import load_rows
from tests.tiny_models import tiny_bert, tiny_gpt2

ROWS = [{"text": f"row {i}", "label": i % 3} for i in range(9)]


def written(folder):
    """The same rows in every format."""
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv").write_text(
        "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS)
    )
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    load_rows(str(folder / "a.jsonl")).to_parquet(folder / "a.parquet")
    (folder / "folder").mkdir()
    (folder / "folder" / "train.jsonl").write_text(lines)
    return ["a.jsonl", "a.json", "a.csv", "b.jsonl.gz", "a.parquet", "folder"]


def test_every_format_gives_the_same_rows(tmp_path):
    for name in written(tmp_path):
        assert load_rows(str(tmp_path / name), columns=["text", "label"]).to_list() == ROWS, name
    (tmp_path / "a.txt").write_text("".join(r["text"] + "\n" for r in ROWS))
    assert load_rows(str(tmp_path / "a.txt"))["text"][:] == [r["text"] for r in ROWS]


def test_rows_are_filtered_cut_and_repeated(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert len(load_rows([str(file), str(file)])) == 18
    assert set(load_rows(str(file), where={"label": 1})["label"]) == {1}
    assert set(load_rows(str(file), where={"label": [0, 2]})["label"]) == {0, 2}
    assert load_rows(str(file), where={"label": 2}, max_rows=2, columns=["text"]).to_list() == [
        {"text": "row 2"},
        {"text": "row 5"},
    ]


def test_unusable_data_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    (tmp_path / "a.xls").write_text("x")
    for refs, options, error, message in (
        (str(file), {"columns": ["body"]}, MismatchError, "no column 'body'; it has text, label"),
        (str(file), {"where": {"toxic": 1}}, MismatchError, "no column 'toxic'"),
        (str(file), {"where": {"label": 7}}, MismatchError, "no row of"),
        (str(tmp_path / "bad.jsonl"), {}, CheckpointError, "bad.jsonl"),
        (str(tmp_path / "a.xls"), {}, CheckpointError, "expected one of"),
        (str(tmp_path / "none.jsonl"), {}, CheckpointError, "no such file"),
        ([], {}, ConfigError, "no data"),
    ):
        with pytest.raises(error, match=message):
            load_rows(refs, **options)


def test_the_task_is_read_off_the_architecture(tmp_path):
    assert load_model(str(tiny_gpt2(tmp_path / "g"))).task == "causal-lm"
    assert load_model(str(tiny_bert(tmp_path / "b"))).task == "classification"
    assert not load_model(str(tmp_path / "g")).model.training


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tiny_gpt2(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 20)
    for ref in (tmp_path / "empty", tmp_path / "absent", broken, broken / "model.safetensors"):
        with pytest.raises(CheckpointError, match=ref.name):
            load_model(str(ref))


def test_a_document_runs_from_the_start_token_to_eos(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path)))
    words = loaded.tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    (example,) = encode_rows({"text": ["the cat sat"]}, loaded)
    assert example["input_ids"] == [
        loaded.start,
        *words,
        loaded.tokenizer.eos_token_id,
    ]
    assert observations([example], "causal-lm") == 4
    (cut,) = encode_rows({"text": ["the cat sat"]}, loaded, max_length=3)
    assert cut["input_ids"] == example["input_ids"][:3]


def test_packing_scores_every_token_once(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path)))
    texts = ["the cat sat on the mat .", "a dog ran", "good film"]
    one_by_one = [t for e in encode_rows({"text": texts}, loaded) for t in e["input_ids"][1:]]
    packed = encode_rows({"text": texts}, loaded, max_length=5, pack=True)
    assert [t for e in packed for t in e["input_ids"][1:]] == one_by_one
    assert max(len(e["input_ids"]) for e in packed) == 5
    assert observations(packed, "causal-lm") == len(one_by_one)


def test_no_text_exceeds_the_models_context(tmp_path):
    for make in (tiny_gpt2, tiny_bert):
        loaded = load_model(str(make(tmp_path / make.__name__)))
        (example,) = encode_rows({"text": ["cat " * 500]}, loaded)
        assert len(example["input_ids"]) == loaded.context == 64


def test_padding_changes_no_loss(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path)))
    examples = encode_rows({"text": ["the cat sat on the mat .", "a dog ran"]}, loaded)
    (batch,) = batches(examples, 2, Collate(2))
    assert (batch["attention_mask"] == 0).sum() == 4
    assert (batch["labels"] == IGNORED).sum() == 4 + 2  # and the first token of each row
    counts = [len(e["input_ids"]) - 1 for e in examples]
    apart = [loaded.model(**b).loss.item() for b in batches(examples, 1, Collate(2))]
    expected = sum(n * x for n, x in zip(counts, apart, strict=True)) / sum(counts)
    assert loaded.model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_labels_are_numbers_or_the_models_names(tmp_path):
    loaded = load_model(str(tiny_bert(tmp_path, names=["civil", "toxic"])))
    rows = {"text": ["a cat", "a dog"], "label": ["toxic", "civil"]}
    assert [e["labels"] for e in encode_rows(rows, loaded, label="label")] == [1, 0]
    assert [e["labels"] for e in encode_rows({**rows, "label": [0, 1]}, loaded, label="label")] == [
        0,
        1,
    ]
    for bad in ("rude", 2, -1, 0.5, None):
        with pytest.raises(MismatchError, match="civil, toxic"):
            encode_rows({**rows, "label": ["toxic", bad]}, loaded, label="label")


def test_a_tokenizer_without_bos_and_eos_cannot_start_a_document(tmp_path):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(CheckpointError, match="neither"):
        _ = Loaded(None, Bare(), "causal-lm", tmp_path).start
    loaded = load_model(str(tiny_gpt2(tmp_path / "g")))
    loaded.tokenizer.bos_token = loaded.tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="neither"):  # also where no row is left to encode
        encode_rows({"text": []}, loaded)


def test_a_loaded_model_says_what_running_it_needs(tmp_path):
    gpt2, bert = (
        load_model(str(tiny_gpt2(tmp_path / "g"))),
        load_model(str(tiny_bert(tmp_path / "b"))),
    )
    assert (gpt2.start, gpt2.context, gpt2.device.type) == (0, 64, "cpu")
    assert gpt2.pad == gpt2.tokenizer.pad_token_id
    bert.tokenizer.bos_token = bert.tokenizer.eos_token = None
    assert bert.context == 64
    assert "labels" in encode_rows({"text": ["a cat"], "label": [0]}, bert, label="label")[0]


def test_stacked_experts_get_the_names_and_shapes_of_the_saved_file(tmp_path):
    """transformers stacks in memory what a mixture-of-experts file holds apart."""
    from safetensors import safe_open

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    named = checkpoint_names(model, {n: p.detach() for n, p in model.named_parameters()})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(named) == set(file.keys())
        for name, value in named.items():
            assert torch.equal(file.get_tensor(name), value), name


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    path = tiny_gpt2(tmp_path / "m")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_model(str(path))


def test_a_file_that_is_not_what_its_name_says_is_named_before_transformers_words(tmp_path):
    folder = tiny_gpt2(tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a Git LFS pointer"):
        load_model(str(folder))


def test_an_encoder_decoder_is_refused_as_one(tmp_path):
    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match=r"is an encoder-decoder \(t5\).*can be merged"):
        load_model(str(tmp_path))


def test_another_number_of_labels_than_the_heads_is_refused(tmp_path):
    folder = tiny_bert(tmp_path / "m", labels=2)
    with pytest.raises(ConfigError, match="has a head for 2 labels already"):
        load_model(str(folder), "classification", num_labels=3)
    assert load_model(str(folder), "classification", num_labels=2).model.config.num_labels == 2


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_folder_of_a_model_is_refused_at_once(tmp_path, make):
    make(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m': cannot be listed \(Not a directory\)"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["RobertaFor", "MPNetFor", "LongformerFor", "XLNetFor"])
def test_a_text_as_long_as_the_context_is_read(tmp_path, name):
    """Some count positions from the padding index on, and XLNet's config says -1."""
    kind = getattr(transformers, f"{name}SequenceClassification")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "d_model": 16,
        "num_hidden_layers": 1,
        "n_layer": 1,
        "num_attention_heads": 2,
        "n_head": 2,
        "intermediate_size": 16,
        "d_inner": 16,
        "max_position_embeddings": 16,
        "attention_window": 4,
        "pad_token_id": 1,
    }
    known = kind.config_class().to_dict()
    model = kind(kind.config_class(**{k: v for k, v in sizes.items() if k in known})).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2(tmp_path / "gpt2"))
    tokenizer.model_max_length = 20
    loaded = Loaded(model, tokenizer, "classification", tmp_path)
    assert loaded.context == (20 if name == "XLNetFor" else 14)
    tokens = torch.full((1, loaded.context), 5)
    assert model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.shape == (1, 2)
