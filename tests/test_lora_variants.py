"""Each variant of LoRA that PEFT writes is what PEFT computes with it in float64, or is refused."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests import tiny
from tests.adapters import base, factors, tensors_of, written

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INPUTS = torch.arange(11)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny models in float32: a Llama with biases, tied and not, and a GPT-2."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name, tied in (("tied", True), ("untied", False)):
        config = transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        model.save_pretrained(folder / name)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


def load(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def trained(folder, base_folder, seed=1, **settings):
    """An adapter in `folder`, with random values in place of all that PEFT would train."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load(base_folder, torch.float32), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def logits_of_peft(base_folder, adapter_folder, dtype):
    """What PEFT's model computes with the adapter, not folded, on a base of some dtype."""
    model = peft.PeftModel.from_pretrained(load(base_folder, dtype), adapter_folder).eval()
    with torch.no_grad():
        return model(INPUTS).logits.double()


def logits_folded(base_folder, adapter_folder, scratch, dtype):
    """What the base computes with the tensors of BASE+ADAPTER, on a base that stores a dtype."""
    wide = scratch / "wide"
    load(base_folder, dtype).save_pretrained(wide)
    with open_adapted(f"{wide}+{adapter_folder}") as opened:
        tensors = {n: torch.from_numpy(read_tensor(opened.mean, n)) for n in opened.mean.specs}
    model = load(base_folder)
    if HEAD in tensors and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(tensors[HEAD].double())
    result = model.load_state_dict({n: t.double() for n, t in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    with torch.no_grad():
        return model(INPUTS).logits


Q, QV = ["q_proj"], ["q_proj", "v_proj"]
TABLE, BOTH = ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head", "q_proj"]
TIED = {"ensure_weight_tying": True}
PATTERNS = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {r"layers\.0.*v_proj": 5, "v_proj": 9}}
VARIANTS = {
    "plain": {"target_modules": Q, "lora_alpha": 3},
    "gaussian": {"target_modules": Q, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": Q, "init_lora_weights": "orthogonal"},
    "eva": {"target_modules": Q, "init_lora_weights": "eva"},
    "mica": {"target_modules": Q, "init_lora_weights": "mica"},
    "no init": {"target_modules": Q, "init_lora_weights": False},
    "velora": {"target_modules": Q, "velora_config": peft.tuners.lora.config.VeloraConfig()},
    "rslora": {"target_modules": Q, "use_rslora": True, "lora_alpha": 3},
    "patterns": {"target_modules": QV, **PATTERNS},
    "patterns of rslora": {"target_modules": QV, "use_rslora": True, **PATTERNS},
    "patterns of a table": {
        "target_modules": TABLE,
        "rank_pattern": {"embed_tokens": 3},
        "alpha_pattern": {"embed_tokens": 5},
        "use_rslora": True,
    },
    "lora_bias": {"target_modules": QV, "lora_bias": True, "lora_alpha": 3},
    "bias all": {"target_modules": Q, "bias": "all"},
    "bias lora_only": {"target_modules": Q, "bias": "lora_only"},
    "lora_bias and bias": {"target_modules": Q, "bias": "lora_only", "lora_bias": True},
    "dora": {"target_modules": QV, "use_dora": True, "lora_alpha": 3},
    "dora of a table": {"target_modules": TABLE, "use_dora": True},
    "dora of a head": {"target_modules": BOTH, "use_dora": True},
    "dora of a tie": {"target_modules": TABLE, "use_dora": True, **TIED},
    "dora and rslora": {"target_modules": QV, "use_dora": True, "use_rslora": True, **PATTERNS},
    "embedding": {"target_modules": TABLE},
    "embedding and head": {"target_modules": BOTH},
    "head": {"target_modules": ["lm_head"]},
    "tied by embedding": {"target_modules": TABLE, **TIED},
    "tied by head": {"target_modules": ["lm_head", "q_proj"], **TIED},
    "whole embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "whole tied embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"], **TIED},
    "whole tied head": {"target_modules": Q, "modules_to_save": ["lm_head"], **TIED},
    "whole both": {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": Q, "trainable_token_indices": [7, 3]},
    "tied tokens": {"target_modules": Q, "trainable_token_indices": [7, 3], **TIED},
    "tokens by module": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [10]}},
    "tokens of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [3, 2]},
    },
    "other tokens of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [5]},
    },
    "tokens of the head": {"target_modules": Q, "trainable_token_indices": {"lm_head": [0]}},
    "tokens and dora": {"target_modules": Q, "trainable_token_indices": [1], "use_dora": True},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa", "lora_alpha": 3},
    "pissa and dora": {"target_modules": Q, "init_lora_weights": "pissa", "use_dora": True},
    "olora": {"target_modules": QV, "init_lora_weights": "olora", "lora_alpha": 3},
}
GPT2 = {
    "bias all": {"target_modules": ["c_attn"], "bias": "all"},
    "lora_bias": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    "square dora": {"target_modules": ["attn.c_proj"], "use_dora": True, "fan_in_fan_out": True},
    "table": {"target_modules": ["wte", "wpe"], "use_dora": True},
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
    found = logits_folded(bases / kind, folder, tmp_path, dtype)
    with torch.no_grad():
        assert (expected - load(bases / kind)(INPUTS).logits).abs().max() > 1e-3
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


def test_rows_of_an_embedding_are_those_of_a_head_that_the_base_stores_as_its_copy(tmp_path, bases):
    folder = trained(tmp_path / "a", bases / "tied", r=2, **VARIANTS["tokens"])
    copy = tmp_path / "copy"
    load(bases / "tied", torch.float32).save_pretrained(copy)
    stored = load_file(copy / "model.safetensors")
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, copy / "model.safetensors")
    with open_adapted(f"{copy}+{folder}") as opened:
        found = [read_tensor(opened.mean, name) for name in (EMBEDDING, HEAD)]
    np.testing.assert_array_equal(*found)
    assert (found[0] != stored[EMBEDDING].numpy()).any(1).nonzero()[0].tolist() == [3, 7]


# What is not read: the setting, and what the message says.
REFUSED = {
    "kasa_config": ({"alpha": 1}, "kasa_config.*merge_and_unload"),
    "monteclora_config": ({"num_samples": 2}, "monteclora_config.*merge_and_unload"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora.*merge_and_unload"),
    "arrow_config": ({"top_k": 1}, "depends on the input"),
    "alora_invocation_tokens": ([1], "depends on the input"),
    "use_qalora": (True, "quantised base"),
    "layer_replication": ([[0, 1]], "layer_replication.*merge_and_unload"),
    "target_parameters": (["experts.up"], "target_parameters.*merge_and_unload"),
}
INITIALISATIONS = {
    "pissa_niter_16": "drawn at random.*path_initial_model_for_weight_conversion",
    "corda": "path_initial_model_for_weight_conversion",
    "lora_ga": "wrong base.*path_initial_model_for_weight_conversion",
    "loftq": "LoftQ quantised",
    "Novel": "not known here",
}
# Set to something else than PEFT's default, and without effect on what is stored.
WITHOUT_EFFECT = {
    "auto_mapping": {"base_model_class": "X"},
    "peft_version": "9.9",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.1,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "velora_config": {"scale": 2.0},
    "eva_config": {"rho": 2.0},
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {"scale": "unit"},
    "loftq_config": {"loftq_bits": 4},
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "qalora_group_size": 32,
}
# Read; other tests hold what they do.
READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("bias", "lora_bias", "use_dora", "trainable_token_indices", "init_lora_weights"),
}


def test_every_setting_of_the_installed_peft_is_read_refused_or_without_effect(tmp_path):
    made = tensors_of(factors(0))
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    # A field that a later PEFT adds is in none of these, and to be looked at.
    assert fields == {*READ, *REFUSED, *WITHOUT_EFFECT}
    for key, (value, message) in REFUSED.items():
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            open_adapter(str(written(tmp_path / key, made, **{key: value})))
    for name, message in INITIALISATIONS.items():
        with pytest.raises(ConfigError, match=f"init_lora_weights='{name}'.*{message}"):
            open_adapter(str(written(tmp_path / name, made, init_lora_weights=name)))
    folder = base(tmp_path / "base")
    quiet = written(tmp_path / "quiet", made, **WITHOUT_EFFECT)
    with open_adapted(f"{folder}+{quiet}") as opened:
        assert opened.mean.notes == ()


def test_a_setting_that_is_not_known_is_refused_where_it_switches_something_on(tmp_path):
    made, folder = tensors_of(factors(0)), base(tmp_path / "base")
    for i, value in enumerate((True, {"a": 1}, [1])):
        with pytest.raises(ConfigError, match=r"use_novel.*not known here.*take it out"):
            open_adapter(str(written(tmp_path / f"on{i}", made, use_novel=value)))
    for i, value in enumerate((False, None, {}, [], "")):
        ref = f"{folder}+{written(tmp_path / f'off{i}', made, use_novel=value)}"
        with open_adapted(ref) as opened:
            assert opened.mean.notes == ()
    with open_adapted(f"{folder}+{written(tmp_path / 'n', made, novel_size=3)}") as opened:
        assert "novel_size=3" in opened.mean.notes[0]


def delta(rows, columns=4):
    return {f"{PREFIX}m.table.token_adapter.trainable_tokens_delta": np.ones((rows, columns), "f4")}


MAGNITUDE = f"{PREFIX}m.q.lora_magnitude_vector"
Q_BIAS = f"{PREFIX}m.q.lora_B.bias"
BAD = [
    ({}, {"r": 3}, MismatchError, r"rank 3 \(r\)\."),
    ({}, {"rank_pattern": {"k": 2, "q": 4, ".": 5}}, MismatchError, "rank 4 .rank_pattern, 'q', "),
    ({}, {"use_dora": True}, CheckpointError, "has no magnitude beside it"),
    ({MAGNITUDE: np.ones(6, "f4")}, {}, ConfigError, "does not have use_dora"),
    ({MAGNITUDE: np.ones(5, "f4")}, {"use_dora": True}, MismatchError, "has 6 outputs"),
    ({MAGNITUDE: np.ones((2, 3), "f4")}, {"use_dora": True}, MismatchError, "has 6 outputs"),
    ({MAGNITUDE: np.ones(6, "i8")}, {"use_dora": True}, CheckpointError, "is I64"),
    ({}, {"lora_bias": True}, CheckpointError, "has no bias beside it"),
    ({Q_BIAS: np.ones(6, "f4")}, {}, ConfigError, "does not have lora_bias"),
    ({Q_BIAS: np.ones(6, "f4")}, {"lora_bias": True}, MismatchError, "does not hold: PEFT"),
    ({Q_BIAS: np.ones((0,), "f4")}, {"lora_bias": True}, MismatchError, "has 6 outputs"),
    ({}, {"bias": "some"}, ConfigError, "none, all or lora_only"),
    ({}, {"trainable_token_indices": [1]}, CheckpointError, "holds no trained rows"),
    (delta(1), {}, CheckpointError, "does not say of which tokens"),
    (delta(1), {"trainable_token_indices": {"lm_head": [1]}}, CheckpointError, "of which tokens"),
    (delta(2), {"trainable_token_indices": [1]}, MismatchError, "2 rows, and .* 1 tokens"),
    (delta(1), {"trainable_token_indices": [9]}, MismatchError, "replaces row 9 .* has 9"),
    (delta(1), {"trainable_token_indices": [10**30]}, MismatchError, "replaces row 10000"),
    (delta(1), {"trainable_token_indices": [-1]}, ConfigError, "-1 .* negative"),
    (delta(2), {"trainable_token_indices": [3, 3]}, ConfigError, "3 .* named twice"),
    (delta(1, 5), {"trainable_token_indices": [1]}, MismatchError, "rows of 5 columns"),
    (delta(1), {"trainable_token_indices": "m"}, ConfigError, "a list of token ids"),
    (delta(1), {"trainable_token_indices": [True]}, ConfigError, "a list of token ids"),
    (
        {f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 9), "f4")},
        {},
        CheckpointError,
        "no other factor .lora_embedding_B.",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 0), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {},
        CheckpointError,
        "no entries",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 4), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((9, 2), "f4"),
        },
        {},
        MismatchError,
        r"changes a weight of \[4, 9\], but",
    ),
    (
        {
            f"{PREFIX}m.q.lora_embedding_A": np.ones((2, 9), "f4"),
            f"{PREFIX}m.q.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {},
        ConfigError,
        "factors of a linear layer and of an embedding",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 9), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {"init_lora_weights": "pissa"},
        ConfigError,
        "linear layers only",
    ),
]


@pytest.mark.parametrize(("extra", "settings", "kind", "message"), BAD)
def test_what_does_not_belong_together_is_told_by_its_cause(
    tmp_path, extra, settings, kind, message
):
    tensors = {"m.table.weight": (9, 4), "m.q.weight": (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    made = tensors_of(factors(0, layers={"m.q": (6, 4)}))
    folder = written(tmp_path / "a", made | extra, **settings)
    with pytest.raises(kind, match=f"(?s){message}"):
        open_adapted(f"{tmp_path / 'base'}+{folder}")


def test_values_that_cannot_be_used_are_told_when_they_are_read(tmp_path):
    tensors = {"m.q.weight": (6, 4), "m.q.bias": (6,)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    made = tensors_of(factors(0, layers={"m.q": (6, 4)}))
    infinite = np.full(6, np.inf, np.float32)
    for name, key, tensor in ((MAGNITUDE, "use_dora", "weight"), (Q_BIAS, "lora_bias", "bias")):
        folder = written(tmp_path / key, made | {name: infinite}, **{key: True})
        with (
            open_adapted(f"{tmp_path / 'base'}+{folder}") as opened,
            pytest.raises(CheckpointError, match="entries that are not finite"),
        ):
            read_tensor(opened.mean, f"m.q.{tensor}")
    tiny.write(tmp_path / "zero/model.safetensors", {"m.q.weight": np.zeros((6, 4), np.float32)})
    still = {name: np.zeros_like(values) for name, values in made.items()}
    folder = written(tmp_path / "still", still | {MAGNITUDE: np.ones(6, "f4")}, use_dora=True)
    with (
        open_adapted(f"{tmp_path / 'zero'}+{folder}") as opened,
        pytest.raises(CheckpointError, match="by which DoRA divides"),
    ):
        read_tensor(opened.mean, "m.q.weight")


@pytest.mark.parametrize("name", ["tied by embedding", "whole tied embedding"])
def test_an_embedding_and_a_head_that_are_kept_tied_and_were_trained_apart_are_refused(
    tmp_path, bases, name
):
    folder = trained(tmp_path / "a", bases / "tied", r=2, **VARIANTS[name])
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    changed = next(n for n in stored if "lm_head" in n and "base_layer" not in n)
    stored[changed] = stored[changed] + 1
    save_file(stored, file)
    with pytest.raises(CheckpointError, match="trained apart"):
        open_adapted(f"{bases / 'tied'}+{folder}")


def test_a_refused_variant_ends_the_command_with_one_message(tmp_path):
    folder = written(tmp_path / "a", tensors_of(factors(0)), kasa_config={"alpha": 1.0})
    ref = f"{base(tmp_path / 'base')}+{folder}"
    words = ["merge", ref, "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "kasa_config" in result.stderr
    assert "Traceback" not in result.output


def changes(base_folder, adapter_folder):
    """What an adapter adds to each tensor of its base, in float64; heads included."""
    with open_adapted(f"{base_folder}+{adapter_folder}") as opened:
        found = {n: read_tensor(opened.mean, n).astype(np.float64) for n in opened.mean.specs}
    plain = {n: t.double().numpy() for n, t in load(base_folder).state_dict().items()}
    return {name: values - plain[name] for name, values in found.items()}


def test_equal_biases_are_kept_in_a_merge_of_adapters_alone(tmp_path, bases):
    folder = trained(tmp_path / "a", bases / "untied", r=2, **VARIANTS["bias all"])
    merge_adapters([str(folder)] * 2, tmp_path / "out", scales=(0.5,))
    computed = [
        logits_of_peft(bases / "untied", path, torch.float32) for path in (folder, tmp_path / "out")
    ]
    np.testing.assert_allclose(*computed, atol=1e-5)
    other = trained(tmp_path / "b", bases / "untied", r=2, seed=2, **VARIANTS["bias all"])
    with pytest.raises(MismatchError, match=r"hold it whole \(modules_to_save, or bias\)"):
        merge_adapters([str(folder), str(other)], tmp_path / "no")


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
    found = logits_folded(bases / "untied", tmp_path / "out", tmp_path, torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-4)


LINEAR = {
    "lora_bias": ("untied", {"target_modules": QV, "lora_bias": True}),
    "embedding": ("untied", {"target_modules": TABLE}),
    "embedding and head": ("tied", {"target_modules": BOTH}),
    "tied": ("tied", {"target_modules": TABLE, **TIED}),
    "patterns": ("untied", {"target_modules": QV, "use_rslora": True, **PATTERNS}),
    "convolution": ("gpt2", {"target_modules": ["c_attn", "wpe"]}),
}


@pytest.mark.parametrize("space", ["product", "concat"])
@pytest.mark.parametrize("name", LINEAR)
def test_adapters_merged_alone_are_the_sum_of_their_changes_and_load_in_peft(
    tmp_path, bases, name, space
):
    kind, settings = LINEAR[name]
    folders = [
        trained(tmp_path / str(i), bases / kind, seed=i, **{"r": 2, "lora_alpha": 3 + i} | settings)
        for i in range(2)
    ]
    scales = (0.5, -0.3)
    options = {"rank": 4} if space == "product" else {}
    merge_adapters(
        [str(f) for f in folders], tmp_path / "out", scales=scales, space=space, **options
    )
    parts = [changes(bases / kind, folder) for folder in folders]
    for tensor, found in changes(bases / kind, tmp_path / "out").items():
        expected = sum(c * part[tensor] for c, part in zip(scales, parts, strict=True))
        np.testing.assert_allclose(found, expected, atol=5e-6, err_msg=tensor)
    computed = logits_of_peft(bases / kind, tmp_path / "out", torch.float32)
    folded = logits_folded(bases / kind, tmp_path / "out", tmp_path, torch.float32)
    np.testing.assert_allclose(computed, folded, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", "magnitudes .use_dora."),
        ("tokens", "rows of trained tokens"),
        ("pissa", "began with pissa"),
        ("olora", "began with olora"),
    ],
)
def test_what_does_not_add_up_without_the_base_is_not_merged_alone(tmp_path, bases, name, message):
    folder = str(trained(tmp_path / "a", bases / "untied", **{"r": 2, **VARIANTS[name]}))
    with pytest.raises(ConfigError, match=rf"(?s){message}.*bmerge merge BASE\+.* -o OUT"):
        merge_adapters([folder, folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_and_embeddings_are_not_merged_alone_into_what_peft_does_not_load(tmp_path, bases):
    folders = [
        str(trained(tmp_path / "a", bases / "untied", r=2, target_modules=QV, lora_bias=True)),
        str(trained(tmp_path / "b", bases / "untied", r=2, target_modules=TABLE)),
    ]
    file = tmp_path / "b/adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "base_layer" not in n}, file)
    with pytest.raises(ConfigError, match="PEFT loads no adapter of both"):
        merge_adapters(folders, tmp_path / "out")


def test_a_bias_has_the_precision_of_its_scaled_factor_and_is_weighed_by_it(tmp_path):
    shapes = {"m.q.weight": (6, 4), "m.q.bias": (6,)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, shapes))
    biases, precisions = tiny.arrays(3, {"x": (2, 6)})["x"], np.float32([[4.0], [9.0]])
    folders, alphas = [], (3, 1)
    for i in range(2):
        made = factors(i, layers={"m.q": (6, 4)})
        settings = {"r": 2, "lora_alpha": alphas[i], "lora_bias": True}
        folder = written(tmp_path / str(i), tensors_of(made) | {Q_BIAS: biases[i]}, **settings)
        stored = {n: np.ones_like(t) for n, t in tensors_of(made).items()}
        stored[Q_BIAS] = np.full(6, precisions[i, 0], np.float32)
        with SafetensorsSource(checkpoint_files(folder)) as source:
            record = PosteriorInfo(
                estimator="ggn", unit="token", observations=10.0, ess=10.0, mean=identify(source)
            )
        save_posterior(folder, stored, record)
        folders.append(str(folder))
    scales = np.array(alphas)[:, None] / 2
    for folder, scale, precision in zip(folders, scales, precisions, strict=True):
        with open_adapted(f"{tmp_path / 'base'}+{folder}") as opened:
            found = read_tensor(opened.precision, "m.q.bias")
            np.testing.assert_allclose(found, np.full(6, precision / scale**2), rtol=1e-6)
            assert opened.precision.where("m.q.bias").startswith(folder)
    merge_adapters(folders, tmp_path / "out", weights="precision")
    amounts = precisions / scales**2
    expected = (amounts * scales * biases).sum(0) / amounts.sum(0)
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    np.testing.assert_allclose(merged[Q_BIAS], expected, rtol=1e-5)


def test_what_has_magnitudes_or_trained_rows_has_no_precision_and_a_note_says_so(tmp_path):
    tensors = {"m.q.weight": (6, 4), "m.k.weight": (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    made = tensors_of(factors(0, layers={"m.q": (6, 4)})) | {MAGNITUDE: np.ones(6, np.float32)}
    folder = written(tmp_path / "a", made, use_dora=True)
    with SafetensorsSource(checkpoint_files(folder)) as source:
        record = PosteriorInfo(
            estimator="ggn", unit="token", observations=10.0, ess=10.0, mean=identify(source)
        )
    save_posterior(folder, {n: np.ones_like(t) for n, t in made.items()}, record)
    with open_adapted(f"{tmp_path / 'base'}+{folder}") as opened:
        assert not opened.precision.specs
        assert any("magnitudes (DoRA)" in note for note in opened.mean.notes)
