"""A change extracted as an adapter: in PEFT the tuned model, and the base again when unloaded."""

import json
import shlex
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.extract import ExtractConfig, run_extract
from mergekit_bayes.hub import make_card
from mergekit_bayes.lora import open_model
from mergekit_bayes.lora.opening import refuse_other_base
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import pushing, tiny
from tests.tiny_models import WORDS, give_posterior, tiny_bert, tiny_gpt2

hub = pushing.hub
ROWS = torch.tensor([[4, 5, 6, 7, 8], [9, 4, 11, 5, 12]])
RANK = 3


def tiny_llama(folder, kind="Llama", **more):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        **more,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


MAKERS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "qwen2": lambda folder: tiny_llama(folder, "Qwen2", tie_word_embeddings=True),
    "bert": tiny_bert,
}


def load(folder, kind):
    auto = transformers.AutoModelForSequenceClassification
    return (auto if kind == "bert" else transformers.AutoModelForCausalLM).from_pretrained(folder)


def is_vocabulary(name):
    return any(word in name for word in ("wte", "wpe", "embed", "lm_head"))


def tune(base, kind, folder, *, embeddings=False, vectors=False):
    """A model whose matrices differ from the base's by products of rank 3, and vectors freely."""
    model = load(base, kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.dim() == 2 and (embeddings or not is_vocabulary(name)):
                rows, columns = values.shape
                change = torch.randn(rows, RANK) @ torch.randn(RANK, columns)
                values += 0.1 * change
            elif vectors and values.dim() == 1:
                values += 0.1 * torch.randn_like(values)
    model.save_pretrained(folder)
    for file in Path(base).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def world(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            MAKERS[kind](root / "base")
            tune(root / "base", kind, root / "tuned")
            tune(root / "base", kind, root / "all", embeddings=True, vectors=True)
            made[kind] = root
        return made[kind]

    return world


@torch.no_grad()
def logits(model):
    return model.eval()(ROWS).logits


def extract(root, name, out, **more):
    config = ExtractConfig(model=str(root / name), base=str(root / "base"), out=str(out), **more)
    return run_extract(config)


def loaded(root, kind, out):
    """The base with the adapter in PEFT, which must find every tensor of it."""
    model = load(root / "base", kind)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    return peft.PeftModel.from_pretrained(model, out), before


def is_base(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def folded(root, out):
    with open_model(f"{root / 'base'}+{out}") as model:
        return {
            name: np.asarray(values, np.float64)
            for name, values in tiny.read_all(model.mean).items()
        }


def stored(folder):
    with SafetensorsSource(checkpoint_files(folder)) as source:
        return tiny.read_all(source)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_change_of_low_rank_comes_back_exactly(worlds, tmp_path, kind):
    root, out = worlds(kind), tmp_path / "out"
    report = extract(root, "tuned", out)
    assert {layer.rank for layer in report.layers.values()} == {RANK}
    assert report.lost_norm < 1e-5 * report.norm
    assert not any(other.why.startswith("no more") for other in report.others.values())
    model, before = loaded(root, kind, out)
    expected = logits(load(root / "tuned", kind))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "base")
    assert config["task_type"] == ("SEQ_CLS" if kind == "bert" else "CAUSAL_LM")
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    if kind == "bert":
        model.delete_adapter("default")  # PEFT stores a classifier whole
    assert is_base(model.unload(), before)
    tuned = stored(root / "tuned")
    for name, values in folded(root, out).items():
        np.testing.assert_allclose(values, tuned[name], atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_embeddings_and_heads_by_flag(worlds, tmp_path, kind):
    """Tied ones once: the head follows the embedding."""
    root = worlds(kind)
    plain = extract(root, "all", tmp_path / "plain")
    left_out = {n for n, o in plain.others.items() if "--embeddings" in o.why}
    assert left_out
    assert all(map(is_vocabulary, left_out))
    report = extract(root, "all", tmp_path / "out", embeddings=True)
    kinds = {layer.kind for layer in report.layers.values()}
    assert kinds == {"linear layer", "embedding"} | ({"head"} if kind == "llama" else set())
    assert any("ensure_weight_tying" in note for note in report.notes) is (kind != "llama")
    model, before = loaded(root, kind, tmp_path / "out")
    expected = load(root / "all", kind)
    with torch.no_grad():  # but for vectors, which are left out
        for name, values in expected.named_parameters():
            if values.dim() == 1:
                values.copy_(before[name])
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-3, rtol=1e-3)
    assert is_base(model.unload(), before)
    tuned = stored(root / "all")
    for name, values in folded(root, tmp_path / "out").items():
        if values.ndim == 2:
            np.testing.assert_allclose(values, tuned[name], atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_rest_by_flag_makes_the_tuned_model(worlds, tmp_path, kind):
    """Biases beside the factors, norms whole; PEFT keeps what is whole until it is deleted."""
    root, out = worlds(kind), tmp_path / "out"
    tune(root / "base", kind, tmp_path / "t", vectors=True)
    config = ExtractConfig(
        model=str(tmp_path / "t"), base=str(root / "base"), out=str(out), rest=True
    )
    report = run_extract(config)
    assert report.lost_norm < 1e-4 * report.norm
    assert all(other.stored for other in report.others.values())
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["lora_bias"] is True
    assert written["bias"] == "none"
    model, before = loaded(root, kind, out)
    expected = logits(load(tmp_path / "t", kind))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    tuned = stored(tmp_path / "t")
    for name, values in folded(root, out).items():
        np.testing.assert_allclose(values, tuned[name], atol=2e-5)
    assert any("delete_adapter" in note for note in report.notes)
    model.delete_adapter("default")
    assert is_base(model.unload(), before)


def test_biases_that_not_every_layer_has_are_left_out_by_name(worlds, tmp_path):
    report = extract(worlds("qwen2"), "all", tmp_path / "out", rest=True)
    biases = {n: o for n, o in report.others.items() if n.endswith("_proj.bias")}
    assert len(biases) == 6
    assert all("lora_bias" in other.why and not other.stored for other in biases.values())
    norms = [o for n, o in report.others.items() if "norm" in n]
    assert norms
    assert all(other.stored for other in norms)
    model, _ = loaded(worlds("qwen2"), "qwen2", tmp_path / "out")
    assert torch.isfinite(logits(model)).all()


def test_biases_beside_adapted_embeddings_are_left_out_with_their_share(worlds, tmp_path):
    root = worlds("gpt2")
    report = extract(root, "all", tmp_path / "out", rest=True, embeddings=True)
    biases = {n: o for n, o in report.others.items() if not o.stored}
    assert all(n.endswith(".bias") and "embeddings" in o.why for n, o in biases.items())
    (note,) = (n for n in report.notes if "left out" in n)
    share = sum(o.change for o in biases.values()) / report.change
    assert note.startswith(f"{len(biases)} changed tensors are left out with {share:.2%} of the ")
    assert "without --embeddings" in note


def test_a_removal_ships_as_an_adapter_and_is_undone_by_unloading(worlds, tmp_path):
    """`--scale -1` of a task with its precision: weighed, loaded, folded, and unloaded."""
    root, removed, out = worlds("gpt2"), tmp_path / "removed", tmp_path / "out"
    for name in ("base", "all"):
        if not (root / name / "posterior").exists():
            give_posterior(root / name)
    run_merge(
        MergeConfig(
            models=(str(root / "all"),),
            base=str(root / "base"),
            scale=(-1.0,),
            weights="precision",
            out=str(removed),
        )
    )
    done = CliRunner().invoke(
        app,
        [
            *("extract", str(removed), "--base", str(root / "base"), "-o", str(out)),
            *("--rank", "4", "--weights", "precision", "--json"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["unit"] == "nats"
    assert 0 < report["lost"] < report["change"]
    assert all(layer["sweeps"] > 0 for layer in report["layers"].values())
    model, before = loaded(root, "gpt2", out)
    twin = load(root / "base", "gpt2")
    values = folded(root, out)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(torch.as_tensor(values[name]))
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(load(root / "base", "gpt2")), atol=1e-2)
    assert is_base(model.unload(), before)


def test_the_report_counts_what_the_adapter_lacks_in_nats(worlds, tmp_path):
    """The numbers against the fold: 1/2 sum S (tuned - folded)^2 over all that has a precision."""
    root = tmp_path
    tiny_gpt2(root / "base", seed=3)
    tune(root / "base", "gpt2", root / "all", embeddings=True, vectors=True)
    precision = give_posterior(root / "all")
    report = extract(root, "all", root / "out", rank=2)
    uniform = extract(root, "all", root / "uniform", rank=2, weights="uniform")
    tuned, base = stored(root / "all"), stored(root / "base")

    def loss(values):
        return 0.5 * sum(
            float(np.sum(precision[n] * (tuned[n].astype(np.float64) - values[n]) ** 2))
            for n in precision
        )

    assert report.change == pytest.approx(loss(base), rel=1e-3)
    assert report.lost == pytest.approx(loss(folded(root, root / "out")), rel=1e-3)
    assert report.lost < loss(folded(root, root / "uniform"))
    (note,) = (note for note in report.notes if "bmerge evaluate" in note)
    (root / "texts.txt").write_text("alpha beta gamma")
    names = {"ADAPTER": str(root / "out"), "TEXTS": str(root / "texts.txt")}
    words = note.partition("`bmerge ")[2].partition("`")[0].split()
    done = CliRunner().invoke(app, [names.get(word, word) for word in words])
    assert done.exit_code == 0, done.output
    assert uniform.unit == "half the squared change"
    assert uniform.precision_identity is None
    norm = sum(float(np.sum((tuned[n].astype(np.float64) - base[n]) ** 2)) for n in tuned)
    assert report.norm == pytest.approx(norm**0.5, rel=1e-4)


def test_layers_of_other_ranks_each_get_their_own_in_peft(tmp_path):
    """A rank for each module by patterns, and the scaling 1 for all of them."""
    tiny_gpt2(tmp_path / "base", layers=12)
    model = load(tmp_path / "base", "gpt2")
    torch.manual_seed(0)
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            values = block.attn.c_attn.weight
            values += torch.randn(values.shape[0], 1 + i % 5) @ torch.randn(1 + i % 5, 48)
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, "tuned", tmp_path / "out")
    assert [layer.rank for layer in report.layers.values()] == [
        1 + int(module.split(".")[2]) % 5 for module in report.layers
    ]
    adapted, _ = loaded(tmp_path, "gpt2", tmp_path / "out")
    scalings = {m.scaling["default"] for m in adapted.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}
    torch.testing.assert_close(logits(adapted), logits(model), atol=1e-3, rtol=1e-3)


def test_names_that_lack_the_prefix_of_the_model_get_it(worlds, tmp_path):
    """GPT-2's own checkpoint names `h.0...`, its module is `transformer.h.0...`."""
    root = worlds("gpt2")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        bare = {n.removeprefix("transformer."): t for n, t in stored(root / name).items()}
        tiny.write(tmp_path / name / "model.safetensors", bare)
        config = (root / name / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
    report = extract(tmp_path, "tuned", tmp_path / "out")
    assert all(module.startswith("transformer.h.") for module in report.layers)
    model, _ = loaded(tmp_path, "gpt2", tmp_path / "out")
    expected = logits(load(root / "tuned", "gpt2"))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    other = ExtractConfig(
        model=str(root / "tuned"), base=str(tmp_path / "base"), out=str(tmp_path / "other")
    )
    assert run_extract(other).layers.keys() == report.layers.keys()


def test_an_adapter_knows_its_base(worlds, tmp_path):
    root, out = worlds("gpt2"), tmp_path / "out"
    extract(root, "tuned", out)
    with open_model(f"{root / 'base'}+{out}") as model:
        refuse_other_base(model)
    elsewhere = f"{root / 'all'}+{out}"
    with open_model(elsewhere) as other, pytest.raises(MismatchError, match="base"):
        refuse_other_base(other)
    config = ExtractConfig(model=elsewhere, base=str(root / "base"), out=str(tmp_path / "b"))
    with pytest.raises(MismatchError, match=r"in the dtype that it had\.$"):
        run_extract(config)


@pytest.mark.parametrize("base", ["base", "./base", "base/model.safetensors", "base+first"])
def test_peft_finds_the_base_from_any_folder(worlds, tmp_path, monkeypatch, base):
    """A relative path and a file are written as the full path of the folder."""
    root = worlds("gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(root / "base")
    extract(root, "tuned", tmp_path / "first", rank=1)
    run_extract(ExtractConfig(model=str(root / "tuned"), base=base, out="out", rank=2))
    monkeypatch.chdir(root)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = str((root / "base").resolve())
    if base == "base+first":
        expected += f"+{tmp_path / 'first'}"
    assert config["base_model_name_or_path"] == expected
    if "+" not in base:
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_model_with_an_adapter_is_extracted_as_one(worlds, tmp_path):
    root = worlds("gpt2")
    extract(root, "tuned", tmp_path / "first", rank=2)
    config = ExtractConfig(
        model=f"{root / 'base'}+{tmp_path / 'first'}",
        base=str(root / "base"),
        out=str(tmp_path / "again"),
    )
    report = run_extract(config)
    assert {layer.rank for layer in report.layers.values()} == {2}
    first, again = folded(root, tmp_path / "first"), folded(root, tmp_path / "again")
    for name in first:
        np.testing.assert_allclose(again[name], first[name], atol=1e-5)


def test_a_folder_tells_how_it_was_made_and_so_does_its_card(worlds, tmp_path):
    root, out = worlds("gpt2"), tmp_path / "out"
    report = extract(root, "tuned", out, rank=2, tolerance=0.9)
    settings = yaml.safe_load((out / "extract.yaml").read_text())
    assert settings["rank"] == 2
    assert settings["identities"][str(root / "base")] == report.base_identity.blocks
    assert json.loads((out / "extract_report.json").read_text())["norm"] == report.norm
    assert (out / "tokenizer.json").exists() is (root / "tuned" / "tokenizer.json").exists()
    assert not (out / "config.json").exists()
    assert not (out / "factors").exists()
    extract(root, "tuned", tmp_path / "again", rank=2, tolerance=0.9)
    for name in ("adapter_model.safetensors", "adapter_config.json", "extract.yaml"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first, line, *_ = (out / "extract.yaml").read_text().splitlines()
    assert first == "# A record, which no command reads."
    words = shlex.split(line.removeprefix("# bmerge "))
    line_again = [str(tmp_path / "by_line") if word == "OUT" else word for word in words]
    assert CliRunner().invoke(app, line_again).exit_code == 0
    written = (tmp_path / "by_line" / "adapter_model.safetensors").read_bytes()
    assert written == (out / "adapter_model.safetensors").read_bytes()
    card = make_card(out, repo="org/removal").text
    assert "bmerge merge base+org/removal -o whole " in card
    assert "bmerge extract tuned --base base --rank=2 --tolerance=0.9 --sweeps=8 " in card
    assert report.summary[0] in card
    assert "took the change of `tuned` from its base" in card
    assert "8 layers, of rank" in card
    assert "`model.unload()` gives the base back, bit for bit" in card
    assert "fine-tuned" not in card
    assert str(root) not in card


def test_an_adapter_is_pushed_without_an_output_of_its_own(hub, worlds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, before = worlds("llama"), set(tmp_path.iterdir())
    words = ["extract", str(root / "tuned"), "--base", str(root / "base"), "--rank", "2"]
    done = CliRunner().invoke(app, [*words, "--push-to", "org/edit", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["push"]["changed"] is True
    there = hub.repos["org/edit"].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "extract_report.json"} <= set(there)
    assert b"took the change of `tuned`" in there["README.md"]
    assert set(tmp_path.iterdir()) == before
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "-o" in done.stderr


def test_factors_in_another_format(worlds, tmp_path):
    root = worlds("llama")
    report = extract(root, "tuned", tmp_path / "out", dtype="BF16")
    with SafetensorsSource([tmp_path / "out" / "adapter_model.safetensors"]) as source:
        assert {spec.dtype for spec in source.specs.values()} == {"BF16"}
    assert 1e-4 < report.lost_norm / report.norm < 1e-2
    tuned, values = stored(root / "tuned"), folded(root, tmp_path / "out")
    distance = sum(float(np.sum((values[n] - tuned[n]) ** 2)) for n in tuned) ** 0.5
    assert report.lost_norm == pytest.approx(distance, rel=1e-2)
