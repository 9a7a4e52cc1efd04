"""What `bmerge precision` looks at: rows with or without labels, the model's own texts, tokens."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
import transformers

from mergekit_bayes.curvature import ESTIMATORS
from mergekit_bayes.curvature.fisher_exact import exact_fisher_diagonal
from mergekit_bayes.curvature.table import LABELLED
from mergekit_bayes.errors import BmergeError, ConfigError
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import EstimatorName
from mergekit_bayes.precision.sources import random_tokens
from tests import tiny
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2

TEXTS = ["the cat sat .", "a good film", "dull tree", "dog ran on"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A language model, two classifiers and labelled rows."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "gpt2")
    tiny_bert(folder / "bert")
    tiny_bert(folder / "multi", labels=3, problem_type="multi_label_classification")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def estimate(world, model, output, **settings):
    """Tensors and record of one run; a `data` of the world is named without its folder."""
    if "data" in settings:
        settings["data"] = str(world / settings["data"])
    config = PrecisionConfig(model=str(world / model), output=str(output), **settings)
    report = run_precision(config, quiet=True)
    with open_posterior(str(world / model), precision=str(output)) as posterior:
        return tiny.read_precision(world / model, output), posterior.info, report


def test_the_setting_names_the_estimators_of_the_table():
    assert set(get_args(EstimatorName)) == {*ESTIMATORS, "adam"}  # which needs no data
    assert set(ESTIMATORS) > LABELLED


def test_the_estimator_that_is_named_is_run_and_recorded(world, tmp_path):
    found = {}
    for name in ESTIMATORS:
        tensors, info, report = estimate(
            world, "bert", tmp_path / f"{name}.safetensors", data="t.jsonl", estimator=name
        )
        assert (info.estimator, report.estimator, info.unit) == (name, name, "example")
        assert (info.observations, info.sampled) == (4, 4)
        found[name] = tensors["classifier.weight"]
    loaded = load_model(str(world / "bert"))
    steps = batches(encode_rows({"text": TEXTS}, loaded), 4, Collate(loaded.pad))
    exact = exact_fisher_diagonal(loaded.model, steps).total["classifier.weight"].numpy()
    np.testing.assert_allclose(found["fisher-exact"], exact, rtol=1e-4)
    assert found.pop("inputs").shape == (1, 16, 16)
    others = [value for name, value in found.items() if name != "fisher-exact"]
    assert not any(np.allclose(value, exact, rtol=1e-4) for value in others)


def test_labels_are_read_where_the_estimator_looks_at_them(world, tmp_path):
    """With other labels the empirical Fisher is another one, and nothing else is."""
    rows = [{"text": text, "label": 1 - i % 2} for i, text in enumerate(TEXTS)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("fisher", "fisher-empirical"):
        (first, _, _), (second, _, _) = (
            estimate(world, "bert", tmp_path / f"{name}{i}.safetensors", data=data, estimator=name)
            for i, data in enumerate(("t.jsonl", other))
        )
        is_same = np.array_equal(first["classifier.bias"], second["classifier.bias"])
        assert is_same == (name not in LABELLED)


def test_a_model_without_data_writes_its_own(world, tmp_path):
    """The texts that are kept give the same numbers as data; another seed gives other texts."""
    kept = tmp_path / "kept.jsonl"
    written, info, report = estimate(
        world,
        "gpt2",
        tmp_path / "a.safetensors",
        self_generated=5,
        keep_generated=str(kept),
        max_length=12,
        seed=3,
    )
    assert (report.source, report.rows, info.sampled) == ("self-generated", 5, 5)
    expected = {"source": "self-generated", "texts": 5, "temperature": 1, "top_p": 1}
    assert {name: info.training[name] for name in expected} == expected
    texts = [json.loads(line)["text"] for line in kept.read_text().splitlines()]
    assert len(set(texts)) > 1
    again, plain, _ = estimate(
        world, "gpt2", tmp_path / "b.safetensors", data=kept, max_length=12, seed=3
    )
    assert plain.observations == info.observations
    assert "source" not in plain.training
    for name, value in written.items():
        np.testing.assert_array_equal(again[name], value)
    estimate(
        world,
        "gpt2",
        tmp_path / "c.safetensors",
        self_generated=5,
        keep_generated=str(kept),
        max_length=12,
        seed=4,
        force=True,
    )
    assert [json.loads(line)["text"] for line in kept.read_text().splitlines()] != texts


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_rows_without_a_word_are_left_out_and_counted(world, tmp_path, model):
    rows = [{"text": text} for text in ("", *TEXTS, " ", "")]
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, info, report = estimate(world, model, tmp_path / "a.safetensors", data="t.jsonl")
    gaps = tmp_path / "gaps.jsonl"
    found, same, told = estimate(world, model, tmp_path / "b.safetensors", data=gaps)
    assert (told.rows, told.sampled, same.observations) == (4, 4, info.observations)
    assert told.notes == ("3 of 7 rows hold no word that is scored and were left out",)
    assert report.notes == ()
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value)


def test_texts_without_a_word_are_left_out_and_counted(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mergekit_bayes.precision.sources.write_texts", lambda *_, **__: ["", *TEXTS]
    )
    _, info, report = estimate(world, "gpt2", tmp_path / "a.safetensors", self_generated=5)
    assert (report.rows, info.training["texts"]) == (4, 4)
    assert report.notes == ("1 of 5 texts hold no word that is scored and were left out",)


def test_random_tokens_are_counted_and_recorded(world, tmp_path):
    _, info, report = estimate(
        world, "gpt2", tmp_path / "a.safetensors", random_tokens=35, max_length=11
    )
    assert (info.observations, info.unit, report.rows) == (35, "token", 4)
    assert (report.source, info.training["random_tokens"]) == ("random-tokens", 35)


def test_random_tokens_are_uniform_over_what_is_no_special_token(world):
    loaded = load_model(str(world / "gpt2"))
    rows = [row["input_ids"] for row in random_tokens(loaded, 9200, 47, seed=1)]
    assert {len(row) for row in rows} == {47}
    assert {row[0] for row in rows} == {loaded.start}
    counts = np.bincount([token for row in rows for token in row[1:]], minlength=27)
    assert (counts[:4] == 0).all()  # <s>, </s>, <pad> and <unk>
    assert len(counts) == 27
    assert np.square(counts[4:] - 400).sum() / 400 < 49  # chi^2, 22 degrees: p = 0.001
    assert rows != [row["input_ids"] for row in random_tokens(loaded, 9200, 47, seed=2)]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("gpt2", {}, "--data TEXT, or --from PATH. A causal language model"),
        ("gpt2", {"data": "t.txt", "random_tokens": 9}, "--data and --random-tokens: a precision"),
        ("gpt2", {"random_tokens": 9, "where": {"label": 1}}, "--where chooses rows of --data"),
        ("gpt2", {"random_tokens": 9, "estimator": "fisher-empirical"}, "nobody observed"),
        ("gpt2", {"data": "t.txt", "keep_generated": "k.jsonl"}, "--keep-generated keeps"),
        ("gpt2", {"self_generated": 2, "keep_generated": "out"}, "lies in the output"),
        ("gpt2", {"self_generated": 2, "keep_generated": "there"}, "'there' exists"),
        ("gpt2", {"self_generated": 0}, "self_generated: expected a whole number"),
        ("gpt2", {"random_tokens": 10**10}, "random_tokens: expected .* at most 1000000000"),
        ("gpt2", {"random_tokens": 9, "prior": float("inf")}, "prior: expected .* at most 1e"),
        ("gpt2", {"moments": "o", "observations": 10**400}, "observations: expected .* at most"),
        ("gpt2", {"random_tokens": 9, "estimator": "adam"}, "adam reads what a training has left"),
        ("bert", {"self_generated": 2}, "--self-generated is for causal language models"),
        ("bert", {"random_tokens": 9}, "--random-tokens is for causal language models"),
        ("bert", {"data": "t.txt", "estimator": "fisher-empirical"}, "no column 'label'.*looks at"),
        ("multi", {"data": "t.jsonl", "estimator": "fisher-empirical"}, "one label a row"),
        ("gpt2", {"data": "t.txt", "estimator": "fisher-exakt"}, "Did you mean 'fisher-exact'"),
    ],
)
def test_sources_that_do_not_fit_are_one_message(
    world, tmp_path, monkeypatch, model, settings, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("")
    with pytest.raises(BmergeError, match=message):
        estimate(world, model, "out", **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_the_exact_fisher_refuses_a_language_model_before_it_writes(world, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_bayes.curvature.fisher_exact._MOST", 26)
    monkeypatch.delattr("mergekit_bayes.precision.sources.write_texts")
    with pytest.raises(ConfigError, match="the model has 27 outputs"):
        estimate(world, "gpt2", tmp_path / "o", self_generated=2, estimator="fisher-exact")


SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "Qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 8}),
    "Mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_estimator_and_source_does_for_every_family(tmp_path, family):
    """On texts of the model itself all but IVON's h estimate one matrix without bias."""
    model_class, config_class, more = FAMILIES[family]
    tiny_gpt2(tmp_path / "m")
    torch.manual_seed(0)
    model_class(config_class(**SIZES, **more)).save_pretrained(tmp_path / "m")
    names = set(tiny.read(tmp_path / "m"))
    kept, sums = tmp_path / "kept.jsonl", {}
    common = {"batch_size": 1, "max_length": 16}
    for name in ("ggn", *(n for n in ESTIMATORS if n not in ("ggn", "inputs")), "random"):
        source = {"data": str(kept)}
        if name == "ggn":
            source = {"self_generated": 100, "keep_generated": str(kept)}
        elif name == "random":
            source = {"random_tokens": 600}
        if name == "fisher-exact":
            source["examples"] = 8  # each token takes 26 passes
        chosen = name if name in ESTIMATORS else "ggn"
        tensors, info, report = estimate(
            tmp_path, "m", tmp_path / f"{name}.safetensors", estimator=chosen, **common, **source
        )
        assert set(tensors) == names
        assert report.source == next(iter(source)).replace("_", "-")
        assert info.unit == "token"
        sums[name] = (
            sum(float(t.sum(dtype=np.float64)) for t in tensors.values()) / info.observations
        )
    for name in ("ggn", "fisher", "fisher-empirical"):
        assert sums[name] / sums["fisher-exact"] == pytest.approx(1, abs=0.35), sums
    assert 0.3 < sums["ivon"] / sums["fisher-exact"] < 30, sums
