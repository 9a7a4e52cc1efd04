"""Adapters are read under every name that PEFT and training give their tensors."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny
from tests.adapters import BASE, adapter, base, factors, precise, tensors_of, written
from tests.tiny_models import tiny_gpt2

PREFIX = "base_model.model."


def change(ref):
    """All tensors of an adapted base."""
    with open_adapted(ref) as opened:
        return {name: read_tensor(opened.mean, name) for name in opened.mean.specs}


SPELLINGS = {
    "a raw state dict": lambda n: n.replace(".weight", ".default.weight"),
    "an adapter's own name": lambda n: n.replace(".weight", ".my-task.weight"),
    "no prefix": lambda n: n.removeprefix(PREFIX),
    "data parallel": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled below": lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": lambda n: n.replace(".q.", "._fsdp_wrapped_module.q."),
    "checkpointed": lambda n: (
        n.replace("m.", "m._checkpoint_wrapped_module.", 1) if n.startswith(f"{PREFIX}m.k") else n
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_factors_are_read_under_every_name_that_training_gives_them(tmp_path, spelling):
    folder, made = base(tmp_path / "base"), factors(0)
    adapter(tmp_path / "a", made)
    spelled = {SPELLINGS[spelling](name): t for name, t in tensors_of(made).items()}
    assert set(spelled) != set(tensors_of(made))
    written(tmp_path / "b", spelled)
    expected, found = (change(f"{folder}+{tmp_path / name}") for name in "ab")
    assert set(found) == set(expected) == set(BASE)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_one_file_with_two_adapters_or_one_tensor_twice_is_refused(tmp_path):
    plain = tensors_of(factors(0))
    two = {n.replace(".weight", f".{a}.weight"): t for n, t in plain.items() for a in "xy"}
    two = {n: t for n, t in two.items() if ("m.q" in n) == (".x." in n)}
    with pytest.raises(ConfigError, match=r"holds several adapters \(x, y\)"):
        open_adapter(str(written(tmp_path / "a", two)))
    twice = plain | {n.removeprefix(PREFIX): 2 * t for n, t in plain.items()}
    with pytest.raises(CheckpointError, match="are one tensor of the model"):
        open_adapter(str(written(tmp_path / "b", twice)))


def test_whole_modules_of_a_raw_state_dict_replace_and_the_originals_are_told(tmp_path):
    folder, bias = base(tmp_path / "base"), np.float32([1, 2, 3, 4, 5])
    saved = {
        f"{PREFIX}m.out.modules_to_save.default.bias": bias,
        f"{PREFIX}m.out.original_module.bias": np.zeros(5, np.float32),
    }
    ref = f"{folder}+{written(tmp_path / 'a', tensors_of(factors(0)) | saved)}"
    np.testing.assert_array_equal(change(ref)["m.out.bias"], bias)
    with open_adapted(ref) as opened:
        assert "the base's own copies" in opened.mean.notes[0]
    report = merge_adapters([str(tmp_path / "a")], tmp_path / "out")
    assert "the base's own copies" in report.notes[0]


@pytest.mark.parametrize(
    ("factor", "saved"),
    [
        ("lora_{}.weight", "out.modules_to_save.bias"),
        ("lora_{}.weight", "out.modules_to_save.default.bias"),
        ("lora_{}.mine.weight", "out.modules_to_save.mine.bias"),
        ("lora_{}.mine.weight", "modules_to_save.out.bias"),
    ],
)
def test_whole_modules_are_read_with_and_without_the_adapters_name(tmp_path, factor, saved):
    folder, bias = base(tmp_path / "base"), np.float32([1, 2, 3, 4, 5])
    stored = {
        re.sub(r"lora_([AB])\.weight", lambda m: factor.format(m[1]), name): t
        for name, t in tensors_of(factors(0)).items()
    }
    ref = f"{folder}+{written(tmp_path / 'a', stored | {f'{PREFIX}m.{saved}': bias})}"
    np.testing.assert_array_equal(change(ref)["m.out.bias"], bias)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 1)])
def test_factors_of_a_convolution_fold_as_their_composition(tmp_path, kernel):
    shape = (5, 4, *kernel)
    rng = np.random.default_rng(0)
    a = np.float32(rng.normal(size=(2, 4, *kernel)))
    b = np.float32(rng.normal(size=(5, 2, *(1 for _ in kernel))))
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(9, BASE | {"m.c.weight": shape}))
    stored = tensors_of(factors(0)) | {
        f"{PREFIX}m.c.lora_A.weight": a,
        f"{PREFIX}m.c.lora_B.weight": b,
    }
    folder = written(tmp_path / "a", stored, target_modules=["c", "q", "k", "wide"])
    # A x-convolution with A and then one with B, of kernel 1, is one with their product.
    expected = 1.5 * np.einsum("or,ri...->oi...", b.reshape(5, 2), a)
    found = change(f"{tmp_path / 'base'}+{folder}")["m.c.weight"]
    weight = tiny.arrays(9, BASE | {"m.c.weight": shape})["m.c.weight"]
    np.testing.assert_allclose(found - weight, expected, atol=2e-6)
    report = merge_adapters([str(folder), str(folder)], tmp_path / "sum", rank=4)
    assert report.layers["m.c"].error < 1e-6
    found = change(f"{tmp_path / 'base'}+{tmp_path / 'sum'}")["m.c.weight"]
    np.testing.assert_allclose(found - weight, 2 * expected, atol=4e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 3), (5, 2, 3)), r"whose B has the kernel 1"),
        (((2, 4, 3), (5, 2)), r"whose B has the kernel 1"),
        (((2, 4, 3), (6, 1, 1)), r"convolution with groups"),
    ],
)
def test_a_convolution_that_is_no_product_of_two_matrices_is_refused(tmp_path, shapes, message):
    odd = {
        f"{PREFIX}m.c.lora_{side}.weight": np.ones(shape, np.float32)
        for side, shape in zip("AB", shapes, strict=True)
    }
    with pytest.raises(ConfigError, match=message):
        open_adapter(str(written(tmp_path / "a", tensors_of(factors(0)) | odd)))


def test_factors_that_nothing_names_are_left_out_and_those_that_the_base_has_applied(tmp_path):
    folder, made = base(tmp_path / "base"), factors(0)
    extra = {f"m.other.{n}": f for n, f in factors(1, layers={"x": (3, 3)}).items()}
    adapter(tmp_path / "a", made | extra, target_modules=["q", "wide"])
    with open_adapted(f"{folder}+{tmp_path / 'a'}") as opened:
        left_out, applied = opened.mean.notes
        assert "'m.other.x.weight', which neither its target_modules name" in left_out
        assert "'m.k.weight', which its target_modules do not name: applied" in applied
        assert set(opened.mean.adapted) == {"m.q.weight", "m.k.weight", "m.wide.weight"}
    # A module that the config names is missing: the base is another model.
    adapter(tmp_path / "b", made | extra, target_modules=["q", "x"])
    with pytest.raises(MismatchError, match=r"'m\.other\.x\.weight', which .* does not hold"):
        open_adapted(f"{folder}+{tmp_path / 'b'}")
    adapter(tmp_path / "c", extra, target_modules=["q"])
    with pytest.raises(MismatchError, match="trained on another model"):
        open_adapted(f"{folder}+{tmp_path / 'c'}")


VOCABULARY = {"model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4)}


@pytest.mark.parametrize("rows", [6, 8, 5])
@pytest.mark.parametrize("below", [False, True])
def test_an_embedding_that_was_stored_whole_is_the_adapters_with_all_its_rows(
    tmp_path, rows, below
):
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(9, BASE | VOCABULARY))
    (tmp_path / "base/config.json").write_text('{"vocab_size": 6}')
    whole = tiny.arrays(5, dict.fromkeys(VOCABULARY, (rows, 4)))
    stored = tensors_of(factors(0)) | {PREFIX + n: t for n, t in whole.items()}
    expected = dict(whole)
    if below:  # the head itself is adapted, too
        stored[f"{PREFIX}lm_head.base_layer.weight"] = stored.pop(f"{PREFIX}lm_head.weight")
        a, b = np.float32(np.ones((2, 4))), np.float32(np.arange(2 * rows).reshape(rows, 2))
        stored |= {f"{PREFIX}lm_head.lora_A.weight": a, f"{PREFIX}lm_head.lora_B.weight": b}
        expected["lm_head.weight"] = whole["lm_head.weight"] + 1.5 * b @ a
    folder = written(tmp_path / "a", stored)
    (folder / "tokenizer_config.json").write_text("{}")
    ref = f"{tmp_path / 'base'}+{folder}"
    found = change(ref)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    with open_adapted(ref) as opened:
        assert len(opened.mean.notes) == (0 if rows == 6 else 2)
        assert all("its tokenizer is in" in note for note in opened.mean.notes)
    config = MergeConfig(
        models=(ref,), base=str(tmp_path / "base"), vocab="common", out=str(tmp_path / "out")
    )
    run_merge(config)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == max(rows, 6)
    # And as the first of several adapters that agree in it.
    merge_adapters([str(folder), str(folder)], tmp_path / "sum", scales=(0.5,), space="concat")
    twice = change(f"{tmp_path / 'base'}+{tmp_path / 'sum'}")
    for name, values in expected.items():
        np.testing.assert_allclose(twice[name], values, rtol=1e-5, err_msg=name)


def test_convolutions_and_an_adapted_head_are_what_peft_merges(tmp_path):
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Conv1d(4, 6, 3), torch.nn.Conv2d(6, 5, (3, 2))
            self.square, self.lm_head = torch.nn.Conv2d(4, 4, 1), torch.nn.Linear(5, 7)

    torch.manual_seed(0)
    net = Net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base/model.safetensors")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    modules = ["one", "two", "square", "lm_head"]
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=modules))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "a")
    merged = model.merge_and_unload().state_dict()
    for name, values in change(f"{tmp_path / 'base'}+{tmp_path / 'a'}").items():
        assert torch.equal(merged[name], before[name]) == name.endswith(".bias")
        np.testing.assert_allclose(values, merged[name].numpy(), atol=1e-6, err_msg=name)


def test_what_peft_stores_after_resizing_is_what_peft_merges(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = tiny_gpt2(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    merged = {n: t.numpy() for n, t in model.merge_and_unload().state_dict().items()}
    for name, values in change(f"{folder}+{tmp_path / 'a'}").items():
        np.testing.assert_allclose(values, merged[name], atol=2e-6, err_msg=name)


def test_the_precision_of_a_convolution_is_that_of_its_product(tmp_path):
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(9, BASE | {"m.c.weight": (5, 12)}))
    flat = factors(3, layers={"m.c": (5, 12)})
    adapter(tmp_path / "flat", flat, precision=precise(flat, 1))
    shutil.copytree(tmp_path / "base", tmp_path / "conv_base")
    (tmp_path / "conv_base/model.safetensors").unlink()
    tiny.write(
        tmp_path / "conv_base/model.safetensors", tiny.arrays(9, BASE | {"m.c.weight": (5, 4, 3)})
    )
    shaped = {m: type(f)(f.a.reshape(2, 4, 3), f.b.reshape(5, 2, 1)) for m, f in flat.items()}
    spread = {
        m: type(f)(f.a.reshape(2, 4, 3), f.b.reshape(5, 2, 1)) for m, f in precise(flat, 1).items()
    }
    adapter(tmp_path / "conv", shaped, precision=spread)
    with (
        open_adapted(f"{tmp_path / 'base'}+{tmp_path / 'flat'}") as one,
        open_adapted(f"{tmp_path / 'conv_base'}+{tmp_path / 'conv'}") as other,
    ):
        np.testing.assert_array_equal(
            read_tensor(one.precision, "m.c.weight").reshape(5, 4, 3),
            read_tensor(other.precision, "m.c.weight"),
        )
