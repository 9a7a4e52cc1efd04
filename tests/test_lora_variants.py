"""Each variant of LoRA that PEFT writes is what PEFT computes with it in float64."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.lora import open_adapted
from tests import tiny
from tests.lora_variants import (
    BOTH,
    EMBEDDING,
    HEAD,
    INPUTS,
    QV,
    TABLE,
    TIED,
    VARIANTS,
    load,
    logits,
    logits_folded,
    logits_of_peft,
    make_bases,
    peft,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


GPT2 = {
    "bias all": {"target_modules": ["c_attn"], "bias": "all"},
    "lora_bias": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    "square dora": {"target_modules": ["attn.c_proj"], "use_dora": True, "fan_in_fan_out": True},
    "square beside a head": {"target_modules": ["attn.c_proj", "lm_head"]},
    "head and all": {"target_modules": ["attn.c_proj", "c_fc", "lm_head"]},
    "table": {"target_modules": ["wte", "wpe"], "use_dora": True},
    "table that PEFT ties to nothing": {"target_modules": ["c_attn", "wte"], **TIED},
    "whole table tied to nothing": {
        "target_modules": ["c_attn"],
        "modules_to_save": ["wte"],
        **TIED,
    },
    "square olora": {
        "target_modules": ["attn.c_proj"],
        "init_lora_weights": "olora",
        "use_rslora": True,
        "fan_in_fan_out": True,
    },
    "pissa": {
        "target_modules": ["c_attn", "c_proj"],
        "init_lora_weights": "pissa",
        "fan_in_fan_out": True,
    },
}
OF_TIES = ("embedding", "head", "tied", "whole", "tokens", "dora of", "table")
AS_WELL = ("embedding", "tokens", "tokens of both", "dora of a table", "whole tied embedding")
CASES = [
    *(("tied" if any(w in n for w in OF_TIES) else "untied", n, v) for n, v in VARIANTS.items()),
    *(("untied", name, VARIANTS[name]) for name in AS_WELL),
    *(("gpt2", name, settings) for name, settings in GPT2.items()),
    ("untied", "both that nothing ties", {"target_modules": BOTH, **TIED}),
    ("untied", "head of pissa", {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}),
]


@pytest.mark.parametrize(
    ("kind", "settings"), [pytest.param(k, v, id=f"{k}-{n}") for k, n, v in CASES]
)
def test_a_variant_folded_into_its_base_is_what_peft_computes(tmp_path, bases, kind, settings):
    folder = trained(tmp_path / "a", bases / kind, **{"r": 2, **settings})
    is_narrow = settings.get("init_lora_weights") in ("pissa", "olora", "mica")
    dtype = torch.float32 if is_narrow else torch.float64  # in which PEFT has the initialisation
    expected = logits_of_peft(bases / kind, folder, dtype)
    found = logits_folded(bases / kind, folder, dtype)
    assert (expected - logits(load(bases / kind))).abs().max() > 1e-3
    # PEFT stores what is below an adapted head, here in float32, in which the head then is.
    has_head = any(
        "lm_head.base_layer" in n for n in load_file(folder / "adapter_model.safetensors")
    )
    np.testing.assert_allclose(
        found, expected, atol=2e-5 if is_narrow else 1e-6 if has_head else 1e-11
    )


def folded_by_peft(net, folder, **settings):
    """What PEFT's fold makes of a module of any kind with a trained adapter, which is stored."""
    before = net.state_dict()
    save_file({n: t.contiguous() for n, t in before.items()}, folder / "model.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(**settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5).copy_(parameter.float())
    model.save_pretrained(folder / "a")
    return {n: t.numpy() for n, t in model.merge_and_unload().state_dict().items()}


class Convolutions(torch.nn.Module):
    """Convolutions of each number of axes, and a table."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv1d(4, 6, 3), torch.nn.Conv2d(6, 5, (3, 2))
        self.three, self.table = torch.nn.Conv3d(2, 3, 2), torch.nn.Embedding(9, 4)
        self.square = torch.nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str
)
def test_layers_of_every_kind_are_what_peft_folds(tmp_path, settings):
    modules = ["one", "two", "three", "square", *(["table"] if "use_dora" in settings else [])]
    patterns = {"rank_pattern": {"two": 3}, "alpha_pattern": {"one": 5}}
    torch.manual_seed(0)
    expected = folded_by_peft(
        Convolutions().double(), tmp_path, r=2, target_modules=modules, **patterns, **settings
    )
    with open_adapted(f"{tmp_path / 'model.safetensors'}+{tmp_path / 'a'}") as opened:
        assert len(opened.mean.changed) == (5 if "use_dora" in settings else 8)
        for name, values in expected.items():
            found = read_tensor(opened.mean, name)
            np.testing.assert_allclose(found, values, atol=1e-12, err_msg=name)


def test_every_kind_of_change_has_the_same_bits_whatever_is_read_of_it(tmp_path, bases):
    made = {
        "dora": ("untied", {"target_modules": TABLE, "use_dora": True}),
        "bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
        "tokens": ("untied", VARIANTS["tokens"]),
        "pissa": ("untied", VARIANTS["pissa"]),
        "olora": ("untied", VARIANTS["olora"]),
    }
    rng = np.random.default_rng(0)
    for name, (kind, settings) in made.items():
        folder = trained(tmp_path / name, bases / kind, **{"r": 2, **settings})
        ref = f"{bases / kind}+{folder}"
        with open_adapted(ref) as opened, open_adapted(ref) as again:
            mean = opened.mean
            assert mean.changed
            for tensor in mean.changed:
                size = mean.specs[tensor].nbytes
                whole = np.empty(size, np.uint8)
                mean.read_bytes(tensor, 0, whole.data)
                for _ in range(20):
                    start, stop = np.sort(rng.integers(0, size + 1, 2))
                    part = np.empty(stop - start, np.uint8)
                    again.mean.read_bytes(tensor, int(start), part.data)
                    np.testing.assert_array_equal(part, whole[start:stop])
        with open_adapted(ref) as opened, ThreadPoolExecutor(4) as pool:
            hashes = pool.map(lambda _, mean=opened.mean: identity(mean, full=True), range(6))
            assert len(set(hashes)) == 1


@pytest.mark.parametrize("prefix", ["", "model."])
def test_rows_of_an_embedding_are_those_of_a_head_that_the_base_stores_as_its_copy(
    tmp_path, bases, prefix
):
    folder = trained(tmp_path / "a", bases / "tied", r=2, **VARIANTS["tokens"])
    copy = tmp_path / "copy"
    load(bases / "tied", torch.float32).save_pretrained(copy)
    stored = load_file(copy / "model.safetensors")
    copies = stored | {HEAD: stored[EMBEDDING].clone()}
    bare = {name.removeprefix(prefix): values for name, values in copies.items()}
    save_file(bare, copy / "model.safetensors")
    with open_adapted(f"{copy}+{folder}") as opened:
        found = [read_tensor(opened.mean, name) for name in (EMBEDDING.removeprefix(prefix), HEAD)]
    np.testing.assert_array_equal(*found)
    assert (found[0] != stored[EMBEDDING].numpy()).any(1).nonzero()[0].tolist() == [1, 3, 7, 9]


def test_rows_and_factors_of_a_table_are_found_under_another_prefix(tmp_path, bases):
    stored = load_file(bases / "gpt2/model.safetensors")
    bare = {n.removeprefix("transformer."): t.numpy() for n, t in stored.items()}
    tiny.write(tmp_path / "bare/model.safetensors", bare)
    for name, settings in (
        ("rows", {"target_modules": ["c_attn"], "trainable_token_indices": [2, 5]}),
        ("table", {"target_modules": ["c_attn", "wte"], "lora_alpha": 3}),
        ("bias", {"target_modules": ["c_attn"], "lora_bias": True}),
    ):
        folder = trained(tmp_path / name, bases / "gpt2", r=2, **settings)
        with (
            open_adapted(f"{bases / 'gpt2'}+{folder}") as expected,
            open_adapted(f"{tmp_path / 'bare'}+{folder}") as found,
        ):
            assert len(found.mean.changed) == len(expected.mean.changed) == 2
            for tensor in found.mean.changed:
                values = read_tensor(expected.mean, f"transformer.{tensor}")
                np.testing.assert_array_equal(read_tensor(found.mean, tensor), values)


@pytest.mark.parametrize("method", ["pissa_niter_4", "olora"])
def test_the_conversion_that_a_refusal_names_gives_the_trained_model(tmp_path, bases, method):
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": QV}
    config = peft.LoraConfig(init_lora_weights=method, **settings)
    model = peft.get_peft_model(load(bases / "untied", torch.float32), config).eval()
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        expected = model(INPUTS).logits
    model.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    found = logits_folded(bases / "untied", tmp_path / "out", torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-4)
