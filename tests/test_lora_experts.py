"""Adapters of experts, of parameters themselves and of fused weights are what PEFT folds."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter
from mergekit_bayes.lora.dense import VARIANCE_FLOOR
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests.adapters import peft_adapter, written
from tests.reference import lora as twin
from tests.tiny_models import tiny_mixtral

COMMON = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = "model.layers.0.block_sparse_moe.experts."
STACK = "model.layers.0.mlp.experts."
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, **COMMON),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_experts=4, moe_intermediate_size=6, num_experts_per_tok=2, head_dim=4, **COMMON
    ),
    # Stored stacked as (experts, d_in, d_out); PEFT takes A for the columns all the same.
    "llama4": lambda: transformers.Llama4TextConfig(
        num_local_experts=4, intermediate_size_mlp=12, head_dim=4, **COMMON
    ),
    # Stored likewise, and taken by PEFT as transposed; `down_proj` is square.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**COMMON, "intermediate_size": 8},
        num_local_experts=4,
        head_dim=4,
        num_experts_per_tok=2,
    ),
    "phi3": lambda: transformers.Phi3Config(**{**COMMON, "num_key_value_heads": 1}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    "llama": lambda: transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 2}),
}
KIND = transformers.AutoModelForCausalLM
DOWN = {"target_parameters": ["mlp.experts.down_proj"]}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def a_base(folder, kind):
    """A random model of one of the MODELS, as transformers writes it."""
    torch.manual_seed(0)
    KIND.from_config(MODELS[kind]()).save_pretrained(folder)
    return folder


def folded(base, adapter, out):
    """The tensors that PEFT's fold in float64 has, under the names on disk."""
    peft = pytest.importorskip("peft")
    model = KIND.from_pretrained(base, dtype=torch.float64)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return {name: t.numpy() for name, t in load_file(out / "model.safetensors").items()}


def equals(base, adapter, expected, *, atol=1e-6):
    """The adapted base has these tensors; returns the names of those that the adapter changes."""
    stored = load_file(base / "model.safetensors")
    changed = []
    with open_adapted(f"{base}+{adapter}") as opened:
        assert set(opened.mean.specs) == set(expected)
        for name, values in expected.items():
            found = read_tensor(opened.mean, name)
            np.testing.assert_allclose(found, values, rtol=1e-6, atol=atol, err_msg=name)
            changed += [name] * (not np.array_equal(found, stored[name].numpy()))
        assert set(changed) == set(opened.mean.adapted)
        return changed


@pytest.mark.parametrize(
    ("kind", "changed", "config"),
    [
        ("mixtral", 12, {"target_parameters": BOTH}),
        (
            "mixtral",
            14,
            {  # as PEFT converts the configs of older transformers
                "target_modules": ["q_proj"],
                "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
                "rank_pattern": {r".*\.gate_up_proj": 4},
                "alpha_pattern": {r".*\.down_proj": 7},
                "use_rslora": True,
            },
        ),
        ("mixtral", 4, {"target_parameters": BOTH[1:]}),
        ("mixtral", 1, {"target_parameters": ["gate.weight"]}),
        ("qwen3_moe", 8, {"target_parameters": BOTH[:1], "rank_pattern": {"gate_up_proj": 3}}),
        (
            "llama4",
            2,
            {"target_parameters": [n.replace("mlp", "feed_forward") for n in BOTH]},
        ),
        ("gpt_oss", 4, {"target_parameters": [*BOTH, "gate_up_proj_bias", "router.weight"]}),
        ("gpt2", 2, {"target_parameters": ["c_attn.weight", "attn.c_proj.weight"]}),
        ("gpt2", 2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("phi3", 2, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("gpt_neox", 1, {"target_modules": ["query_key_value"]}),
        ("llama", 1, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (
            "llama",
            1,
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": 1,
                "layers_pattern": "layers",
            },
        ),
        (
            "llama",
            2,
            {"target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*\.1\..*"},
        ),
    ],
)
def test_an_adapted_base_is_what_peft_folds(tmp_path, kind, changed, config):
    base = a_base(tmp_path / "base", kind)
    config = {"target_modules": []} | config
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    assert len(equals(base, tmp_path / "a", expected)) == changed


def single_expert_adapter(folder, only="", **config):
    """An adapter of an older transformers, whose experts are modules of their own."""
    shapes = {f"{EXPERTS}{e}.{w}": (12, 8) for e in range(4) for w in ("w1", "w3")}
    shapes |= {f"{EXPERTS}{e}.w2": (8, 12) for e in range(4)}
    shapes |= {"model.layers.0.block_sparse_moe.gate": (4, 8)}
    rng, tensors = np.random.default_rng(0), {}
    for module, (rows, columns) in shapes.items():
        pair = rng.normal(size=(2, columns)), rng.normal(size=(rows, 2))
        for side, values in zip("AB", pair, strict=True):
            if only in module:
                name = f"base_model.model.{module}.lora_{side}.weight"
                tensors[name] = values.astype(np.float32)
    targets = ["w1", "w2", "w3", "gate"]
    return written(folder, tensors, target_modules=targets, task_type="CAUSAL_LM", **config)


def stacked(tensors):
    """The tensors of a Mixtral as memory has them."""
    tensors = {name: np.asarray(t) for name, t in tensors.items()}
    found = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    found = {name: t for name, t in found.items() if ".experts." not in name}
    gates, ups, downs = (
        [tensors[f"{EXPERTS}{e}.{w}.weight"] for e in range(4)] for w in ("w1", "w3", "w2")
    )
    up = [np.concatenate(pair) for pair in zip(gates, ups, strict=True)]
    return found | {f"{STACK}gate_up_proj": np.stack(up), f"{STACK}down_proj": np.stack(downs)}


def stacked_base(folder, base):
    """The same base with its experts stacked in the file."""
    shutil.copytree(base, folder)
    tensors = stacked(load_file(base / "model.safetensors"))
    made = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("only", "scaling"), [("", 1.5), ("experts.2.w1", 3 / 2**0.5), ("w2", 1.5), ("gate", 1.5)]
)
def test_adapters_of_single_experts_fit_both_kinds_of_bases(tmp_path, only, scaling):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a", only, use_rslora=scaling != 1.5)
    expected = {n: t.numpy() for n, t in load_file(base / "model.safetensors").items()}
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in [name for name in factors if "lora_A" in name]:
        product = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
        weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        expected[weight] = expected[weight] + scaling * product.numpy()
    equals(base, tmp_path / "a", expected)
    equals(stacked_base(tmp_path / "stacked", base), tmp_path / "a", stacked(expected))


def test_adapters_of_single_experts_are_what_peft_converts(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a")
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    assert len(equals(base, tmp_path / "a", expected)) == 13


def test_adapters_of_stacks_fit_a_base_that_stores_them(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": [*BOTH, "gate.weight"]}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = stacked(folded(base, tmp_path / "a", tmp_path / "folded"))
    changed = equals(stacked_base(tmp_path / "stacked", base), tmp_path / "a", expected)
    assert len(changed) == 3


@pytest.mark.parametrize("modules", [["q_proj", "up_proj"], ["k_proj"], ["q_proj", "v_proj"]])
def test_adapters_of_a_split_phi3_fit_the_fused_one(tmp_path, modules):
    base = a_base(tmp_path / "base", "phi3")
    rows = {"q_proj": (0, 8), "k_proj": (8, 4), "v_proj": (12, 4), "up_proj": (12, 12)}
    expected = {n: t.numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng, tensors = np.random.default_rng(0), {}
    for module in modules:
        start, size = rows[module]
        block, fused = ("mlp", "gate_up") if module == "up_proj" else ("self_attn", "qkv")
        a, b = rng.normal(size=(2, 8)), rng.normal(size=(size, 2))
        for side, values in (("A", a), ("B", b)):
            name = f"base_model.model.model.layers.0.{block}.{module}.lora_{side}.weight"
            tensors[name] = values.astype(np.float32)
        name = f"model.layers.0.{block}.{fused}_proj.weight"
        expected[name] = expected[name].copy()
        expected[name][start : start + size] += 1.5 * b @ a
    written(tmp_path / "a", tensors, target_modules=modules)
    equals(base, tmp_path / "a", expected)


def give_precision(folder, seed=0, counted=1.0):
    """Give an adapter of rank 2 a precision; returns the mean and variance of every stack.

    The variance is that of `counted` times the 100 observations on record.
    """
    with open_adapter(str(folder)) as adapter:
        specs = adapter.posterior.mean.specs
        rng = np.random.default_rng(seed)
        precision = {n: np.exp(rng.uniform(0, 4, s.shape)).astype("f4") for n, s in specs.items()}
        counts = {"unit": "token", "observations": 100.0, "ess": 100.0}
        info = PosteriorInfo(estimator="ggn", mean=identify(adapter.posterior.mean), **counts)
        layers = adapter.layers
    save_posterior(folder, precision, info)
    factors = load_file(folder / "adapter_model.safetensors")
    moments = {}
    for name, layer in layers.items():
        a, b = factors[layer.a].double().numpy(), factors[layer.b].double().numpy()
        va, vb = (1 / counted / precision[side].astype("f8") for side in (layer.a, layer.b))
        pairs = [
            (a[2 * e : 2 * e + 2], b[:, e::4], va[2 * e : 2 * e + 2], vb[:, e::4], 1.5)
            for e in range(4)
        ]
        mean = np.stack([1.5 * b @ a for a, b, *_ in pairs])
        moments[name] = mean, np.stack([twin.variance(*pair) for pair in pairs])
    return moments


@pytest.mark.parametrize("is_stacked", [False, True])
def test_entries_of_experts_do_not_depend_on_the_chunk_and_have_their_precision(
    tmp_path, is_stacked
):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": BOTH}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    moments = give_precision(tmp_path / "a", counted=0.25)
    expected = {name: variance for name, (_, variance) in moments.items()}
    rng = np.random.default_rng(1)
    if is_stacked:
        base = stacked_base(tmp_path / "stacked", base)
    else:
        up, down = expected[f"{STACK}gate_up_proj"], expected[f"{STACK}down_proj"]
        expected = {
            f"{EXPERTS}{e}.{w}.weight": values
            for e in range(4)
            for w, values in (("w1", up[e, :12]), ("w3", up[e, 12:]), ("w2", down[e]))
        }
    with open_adapted(f"{base}+{tmp_path / 'a'}") as opened:
        assert set(opened.precision.specs) == set(expected)
        name = next(iter(expected))
        recorded = read_tensor(opened.precision, name)
        precision = opened.precision.counted(25.0)
        assert (read_tensor(precision, name) < recorded).all()
        for name, variance in expected.items():
            found = read_tensor(precision, name)
            np.testing.assert_allclose(found, 1 / (variance + VARIANCE_FLOOR), rtol=1e-5)
        for source in (opened.mean, precision):
            for name in expected:
                whole = np.empty(source.specs[name].nbytes, np.uint8)
                source.read_bytes(name, 0, whole.data)
                for _ in range(20):
                    start, stop = np.sort(rng.integers(0, whole.size + 1, 2))
                    part = np.empty(stop - start, np.uint8)
                    source.read_bytes(name, int(start), part.data)
                    np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize(
    ("space", "rank"), [("product", 4), ("concat", None), ("core", 4), ("product", None)]
)
def test_merged_adapters_of_experts_are_the_sum_of_their_changes_in_peft(tmp_path, space, rank):
    base = tiny_mixtral(tmp_path / "base")
    first = {"target_modules": ["q_proj"], "target_parameters": BOTH[1:]}
    second = {"target_modules": [], "target_parameters": [*BOTH, "gate.weight"]}
    peft_adapter(tmp_path / "a", base, 1, r=1, lora_alpha=3, **first)
    peft_adapter(tmp_path / "b", base, 2, r=2, lora_alpha=3, use_rslora=True, **second)
    stored = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    expected = dict(stored)
    for name, scale in (("a", 0.5), ("b", -2.0)):
        one = folded(base, tmp_path / name, tmp_path / f"folded-{name}")
        expected = {n: t + scale * (one[n] - stored[n]) for n, t in expected.items()}
    report = merge_adapters(
        [str(tmp_path / "a"), str(tmp_path / "b")],
        tmp_path / "m",
        scales=[0.5, -2.0],
        space=space,
        rank=rank,
    )
    assert report.rank == rank or report.rank == {"concat": 3, "product": 2}[space]
    found = folded(base, tmp_path / "m", tmp_path / "folded")
    with open_adapted(f"{base}+{tmp_path / 'm'}") as opened:
        for name, values in found.items():
            np.testing.assert_allclose(read_tensor(opened.mean, name), values, atol=1e-6)
    if report.rank > 2:
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
        assert report.largest_error < 1e-6
    else:
        singles = {n: t for n, t in expected.items() if ".w2." in n}
        lost = np.sqrt(sum(np.sum((found[n] - t) ** 2) for n, t in singles.items()))
        norm = np.sqrt(sum(np.sum((t - stored[n]) ** 2) for n, t in singles.items()))
        layer = report.layers[f"{STACK}down_proj"]
        np.testing.assert_allclose([layer.error, layer.norm], [lost / norm, norm], rtol=1e-4)


def test_experts_of_adapters_are_averaged_by_their_precision(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": BOTH[1:]}
    shares, moments = (0.3, 0.7), []
    for seed in (1, 2):
        peft_adapter(tmp_path / f"{seed}", base, seed, r=2, lora_alpha=3, **config)
        moments.append(give_precision(tmp_path / f"{seed}", seed)[f"{STACK}down_proj"])
    weights = [c / variance for c, (_, variance) in zip(shares, moments, strict=True)]
    merged = sum(w * mean for w, (mean, _) in zip(weights, moments, strict=True)) / sum(weights)
    refs = [str(tmp_path / "1"), str(tmp_path / "2")]
    merge_adapters(refs, tmp_path / "m", scales=shares, weights="precision", rank=8)
    with open_adapter(str(tmp_path / "m")) as adapter:
        layer = adapter.layers[f"{STACK}down_proj"]
        for expert in range(4):
            a, b = adapter.factors(layer._replace(expert=expert))
            np.testing.assert_allclose(b @ a, merged[expert], atol=1e-5)


def test_factors_of_the_other_order_are_told_by_their_shapes(tmp_path):
    """PEFT before 0.19.1 takes A for the rows of an ordinary stack, whose shape says so."""
    base = tiny_mixtral(tmp_path / "base")
    expected = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype("f4") for shape in ((8, 24), (8, 8)))
    name = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    written(tmp_path / "a", tensors, target_parameters=BOTH[:1])
    for e in range(4):
        change = 1.5 * (b[:, e::4].astype("f8") @ a[2 * e : 2 * e + 2]).T
        for word, rows in (("w1", slice(12)), ("w3", slice(12, None))):
            expected[f"{EXPERTS}{e}.{word}.weight"] += change[rows]
    assert len(equals(base, tmp_path / "a", expected)) == 8


@pytest.mark.parametrize("layout", ["grouped_by_expert", "rank_major"])
def test_the_columns_of_b_are_read_as_unsloth_records_them(tmp_path, layout):
    base = tiny_mixtral(tmp_path / "base")
    expected = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype("f4") for shape in ((8, 12), (8, 8)))
    for e in range(4):
        columns = slice(2 * e, 2 * e + 2) if "grouped" in layout else slice(e, None, 4)
        change = 1.5 * b[:, columns].astype("f8") @ a[2 * e : 2 * e + 2]
        expected[f"{EXPERTS}{e}.w2.weight"] += change
    name = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    mapping = {"auto_mapping": {"unsloth_fixed": True}}
    config = {"target_modules": [], "task_type": "CAUSAL_LM", **DOWN, **mapping}
    written(tmp_path / "a", tensors, lora_B_layout=layout, **config)
    equals(base, tmp_path / "a", expected)
    merge_adapters([str(tmp_path / "a")], tmp_path / "m")
    equals(base, tmp_path / "m", expected)
    merged = folded(base, tmp_path / "m", tmp_path / "folded")
    name = f"{EXPERTS}3.w2.weight"
    np.testing.assert_allclose(merged[name], expected[name], atol=1e-6)
    written(tmp_path / "b", tensors, **config)
    with pytest.raises(ConfigError, match="Unsloth changed it in September 2026"):
        open_adapter(str(tmp_path / "b"))


def test_all_linear_modules_are_told_from_the_parameters_beside_them(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **config)
    expected = folded(base, tmp_path / "a", tmp_path / "folded")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    written(tmp_path / "b", tensors, **config | {"target_modules": "all-linear"})
    assert len(equals(base, tmp_path / "b", expected)) == 13


def test_an_adapter_of_repeated_layers_fits_a_base_that_was_written_out_with_them(tmp_path):
    base = a_base(tmp_path / "base", "llama")
    repeated = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [0, 2]]}
    trained = peft_adapter(tmp_path / "a", base, r=2, lora_alpha=3, **repeated).double()
    with pytest.raises(ConfigError, match=r"passthrough.*take layer_replication out"):
        open_adapter(str(tmp_path / "a"))
    tensors = load_file(base / "model.safetensors")
    again = {n.replace(".0.", ".2.").replace(".1.", ".3."): t.clone() for n, t in tensors.items()}
    longer = tmp_path / "longer"
    shutil.copytree(base, longer)
    save_file(again | tensors, longer / "model.safetensors", {"format": "pt"})
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    written(tmp_path / "b", factors, target_modules=["q_proj", "down_proj"])
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 4})
    model = transformers.LlamaForCausalLM(config).double()
    with open_adapted(f"{longer}+{tmp_path / 'b'}") as opened:
        found = {n: torch.from_numpy(read_tensor(opened.mean, n)) for n in opened.mean.specs}
    model.load_state_dict(found)
    tokens = torch.arange(6)[None]
    logits, expected = (m.eval()(tokens, use_cache=False).logits for m in (model, trained))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    unfolded = trained.merge_and_unload()(tokens, use_cache=False).logits
    assert not torch.allclose(unfolded, expected, atol=1e-3)  # PEFT's fold is another model


def stack_factors(count=4, rank=2, module="mlp.experts", rows=8, columns=12, more=()):
    """Factors of one stack (`down_proj` of the tiny Mixtral), and of others by shape."""
    name = f"base_model.model.model.layers.0.{module}"
    tensors = {
        f"{name}.lora_A.weight": np.ones((count * rank, columns), np.float32),
        f"{name}.lora_B.weight": np.ones((rows, count * rank), np.float32),
    }
    for other, (of_b, of_a) in dict(more).items():
        tensors[f"base_model.model.{other}.lora_A.weight"] = np.ones(of_a, np.float32)
        tensors[f"base_model.model.{other}.lora_B.weight"] = np.ones(of_b, np.float32)
    return tensors


INNER = {"model.layers.0.mlp.experts.base_layer": ((24, 8), (8, 8))}


@pytest.mark.parametrize(
    ("tensors", "config", "kind", "message"),
    [
        (stack_factors(3), DOWN, MismatchError, r"those of 3 experts of rank 2, .* base has 4"),
        (stack_factors(7, 1), DOWN, MismatchError, r"gives it rank 2 \(r\), of each expert"),
        (stack_factors(rows=10), DOWN, MismatchError, r"\[4, 10, 12\], but .* is \[4, 8, 12\]"),
        (stack_factors(more=INNER), DOWN, MismatchError, "factors of 2 parameters .* names 1 "),
        (stack_factors(), {"target_parameters": "down"}, ConfigError, "a list of parameter names"),
        (
            stack_factors(),
            {"target_parameters": ["down_proj", "gate_up_proj"]},
            ConfigError,
            r"factors of 1 of its parameters, and .* names 2",
        ),
        (
            stack_factors(more=INNER),
            {"target_parameters": ["experts.down_proj", "experts.other"]},
            ConfigError,
            "not known for 'other'",
        ),
        (
            {n: t for n, t in stack_factors(more=INNER).items() if "base_layer" in n},
            DOWN,
            MismatchError,
            "and not those of 'model.layers.0.mlp.experts', which PEFT wraps",
        ),
        (stack_factors(module="mlp.mixture"), DOWN, MismatchError, "two files do not belong"),
        (
            stack_factors(module="mlp.mixture"),
            {"target_parameters": ["mixture.down_proj"]},
            MismatchError,
            "a stack of 4 experts, and the base has these neither stacked nor one by one",
        ),
        (
            stack_factors(more={"model.layers.0.self_attn.qkv_proj": ((24, 2), (2, 8))}),
            {**DOWN, "target_modules": ["qkv_proj"]},
            MismatchError,
            r"base has 'model.layers.0.self_attn.[kqv]_proj.weight': it stores fused",
        ),
        (
            stack_factors(
                more={
                    "model.layers.0.attn": ((24, 2), (2, 8)),
                    "model.layers.0.attn.base_layer.out_proj": ((8, 2), (2, 8)),
                }
            ),
            {**DOWN, "target_modules": ["attn"]},
            ConfigError,
            "MultiheadAttention as a whole, of which PEFT adds .* twice",
        ),
        (
            stack_factors(more={"model.layers.0.mlp.base_layer.experts": ((8, 8), (8, 12))}),
            DOWN,
            CheckpointError,
            "are for one weight of the model",
        ),
        (
            stack_factors(module="self_attn.q_proj", count=1, columns=8)
            | {
                "base_model.model.model.layers.0.mlp.experts.modules_to_save.down_proj": np.ones(
                    (4, 8, 12), np.float32
                )
            },
            {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
            ConfigError,
            r"replaces 'model.layers.0.mlp.experts.down_proj'.* stores in pieces",
        ),
        (
            stack_factors(more={"model.layers.0.mlp.experts.down_projs.0": ((8, 2), (2, 12))}),
            {**DOWN, "target_modules": ["down_projs.0"]},
            MismatchError,
            "experts of a gpt-oss that was quantised for training",
        ),
        (stack_factors(), {**DOWN, "layer_replication": [[0, 1]]}, ConfigError, "layer_repl"),
        (stack_factors(), {**DOWN, "init_lora_weights": "olora"}, ConfigError, "no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cause(tmp_path, tensors, config, kind, message):
    base = tiny_mixtral(tmp_path / "base")
    written(tmp_path / "a", tensors, **config)
    with pytest.raises(kind, match=f"(?s){message}"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_experts_that_are_square_alone_are_refused(tmp_path):
    base = a_base(tmp_path / "base", "gpt_oss")
    written(tmp_path / "a", stack_factors(columns=8), **DOWN)
    with pytest.raises(ConfigError, match="whose experts are square, and no other experts"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


@pytest.mark.parametrize("change", ["lacks one", "has another shape"])
def test_a_base_whose_experts_do_not_fit_together_is_refused(tmp_path, change):
    base = tiny_mixtral(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = f"{EXPERTS}2.w2.weight"
    if change == "lacks one":
        del tensors[name]
    else:
        tensors[name] = torch.ones(8, 13)
    save_file(tensors, base / "model.safetensors")
    written(tmp_path / "a", stack_factors(), **DOWN)
    with pytest.raises(MismatchError, match="neither stacked nor one by one"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_split_projections_of_a_model_that_fuses_them_otherwise_are_refused(tmp_path):
    base = a_base(tmp_path / "base", "gpt_neox")
    made = {"gpt_neox.layers.0.attention.query": ((8, 2), (2, 8))}
    tensors = {n: t for n, t in stack_factors(more=made).items() if "query" in n}
    written(tmp_path / "a", tensors, target_modules=["query"])
    with pytest.raises(MismatchError, match=r"base has '[\w.]+query_key_value\.\w+': it stores f"):
        open_adapted(f"{base}+{tmp_path / 'a'}")


def test_dora_of_single_experts_on_a_stacked_base_is_refused(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    single_expert_adapter(tmp_path / "a", "w2")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    magnitudes = {
        n.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)
        for n in tensors
        if "lora_A" in n
    }
    stacks = stacked_base(tmp_path / "stacked", base)
    written(tmp_path / "d", tensors | magnitudes, target_modules=["w2"], use_dora=True)
    open_adapted(f"{base}+{tmp_path / 'd'}").close()
    with pytest.raises(ConfigError, match=r"use_dora, which needs .* in one piece"):
        open_adapted(f"{stacks}+{tmp_path / 'd'}")


def test_adapters_of_peft_before_and_after_a_change_of_order_are_told_so(tmp_path):
    written(tmp_path / "a", stack_factors(), **DOWN)
    written(tmp_path / "b", stack_factors(rows=12, columns=8), **DOWN)
    refs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(MismatchError, match=r"another order in PEFT before 0\.19\.1\. Fold"):
        merge_adapters(refs, tmp_path / "m")


@pytest.mark.parametrize(
    ("space", "message"),
    [("factor", "does not merge stacked experts"), ("product", "adapts single experts")],
)
def test_merges_of_experts_that_have_no_meaning_are_refused(tmp_path, space, message):
    written(tmp_path / "a", stack_factors(), **DOWN)
    if space == "factor":
        written(tmp_path / "b", stack_factors(), **DOWN)
    else:
        single_expert_adapter(tmp_path / "b")
    refs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(BmergeError, match=message):
        merge_adapters(refs, tmp_path / "m", space=space)


def test_factors_of_experts_without_their_config_are_told_to_be_factors(tmp_path):
    folder = written(tmp_path / "a", stack_factors(more=INNER))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds factors, whose scale is in the adapter_conf"):
        open_adapter(str(folder))
