"""Models that name their tensors differently: merged under the donor's names, or refused."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import find_renaming
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.inspect import run_inspect
from mergekit_bayes.lora import open_adapted
from mergekit_bayes.lora.layers import Factors
from tests import model_forms, tiny
from tests.adapters import adapter
from tests.model_forms import close, expect, load, merge, model

here = model_forms.here

TENSORS = {
    "h.0.norm.gamma": (4,),
    "h.0.norm.beta": (4,),
    "h.1.norm.gamma": (4,),
    "h.1.norm.beta": (4,),
    "h.0.fc.weight": (4, 3),
    "wte.weight": (5, 4),
}


def modern(name):
    return name.replace("gamma", "weight").replace("beta", "bias")


def write(name, shapes, seed=0):
    model(name, seed, mean=tiny.arrays(seed, shapes), precision=tiny.precisions(seed, shapes))


@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_a_merge_across_names_has_the_bits_of_one_under_the_same_names(weights):
    """Precisions follow their means, also where they have the names of another version."""
    base = model("base", 0, mean=tiny.arrays(0, TENSORS), precision=tiny.precisions(0, TENSORS))
    mean, precision = tiny.arrays(1, TENSORS), tiny.precisions(1, TENSORS)
    new = [{modern(n): x for n, x in side.items()} for side in (mean, precision)]
    model("old", 1, mean=mean, precision=precision)
    model("new", 1, mean=new[0], precision=new[1])
    model("mixed", 1, mean=mean, precision=new[1])
    merge("old", weights=weights, out="x.safetensors")
    expected = load("x.safetensors")
    close(expected, expect(base, [(mean, precision)], (1,))[0] if weights != "uniform" else mean)
    for name in ("new", "mixed"):
        report = merge(name, weights=weights, out=f"{name}-out.safetensors")
        found = load(f"{name}-out.safetensors")
        assert set(found) == set(TENSORS)
        for tensor, values in expected.items():
            np.testing.assert_array_equal(found[tensor], values)
        if name == "new":
            assert any(
                "4 tensors of 'new.safetensors' are matched under other names: "
                "norm.bias -> norm.beta (2), norm.weight -> norm.gamma (2)" in n
                for n in report.notes
            )


def test_inspect_compares_across_names_and_counts_the_precisions():
    write("a", TENSORS)
    mean = {modern(n): x for n, x in tiny.arrays(0, TENSORS).items()}
    model("b", 0, mean=mean, precision=tiny.precisions(0, TENSORS))
    report = run_inspect("a.safetensors", "b.safetensors")
    assert (report.comparison.rms, report.comparison.only_here) == (0, ())
    assert any("4 tensors of 'b.safetensors' are matched under other" in n for n in report.notes)
    precision = run_inspect("b.safetensors").precision
    assert (precision.covered, precision.unknown) == (1, ())


REFUSALS = {
    "experts stored one by one": (
        {"h.0.mlp.experts.gate_up_proj": (3, 8, 4), "h.0.mlp.experts.down_proj": (3, 4, 4)},
        {
            f"h.0.mlp.experts.{i}.{p}_proj.weight": (4, 4)
            for i in range(3)
            for p in ("gate", "up", "down")
        },
        r"'base\.safetensors' stores its experts stacked, 'a\.safetensors' one by one",
    ),
    "experts of another module name": (
        {
            f"h.0.block_sparse_moe.experts.{i}.{p}.weight": (4, 4)
            for i in range(3)
            for p in ("w1", "w2", "w3")
        },
        {"h.0.mlp.experts.gate_up_proj": (3, 8, 4), "h.0.mlp.experts.down_proj": (3, 4, 4)},
        r"'a\.safetensors' stores its experts stacked, 'base\.safetensors' one by one",
    ),
    "a fused projection": (
        {"h.0.attn.qkv.weight": (12, 4)},
        {f"h.0.attn.{p}.weight": (4, 4) for p in "qkv"},
        "Both hold 48 weights in them, which one stores fused and the other split",
    ),
    "projections under other words": (
        {f"h.0.attn.{p}.weight": (4, 4) for p in "qkv"},
        {f"h.0.attn.{p}.weight": (4, 4) for p in ("one", "two", "three")},
        "seem to be the same tensors under other names, but no rule tells which is which",
    ),
    "two towers that fit": (
        {f"m.{t}.h.0.attn.{p}.weight": (4, 4) for t in ("text", "image") for p in "qv"},
        {f"m.h.0.attn.{p}.weight": (4, 4) for p in "qv"},
        "would fit 'm.image.h.0.attn.q.weight' and 'm.text.h.0.attn.q.weight'",
    ),
    "another architecture": (
        {"h.0.attn.weight": (4, 4)},
        {"h.0.conv.weight": (3, 3)},
        "was this one fine-tuned from another base",
    ),
    "another head": (
        {"lm_head.out.weight": (5, 4)},
        {"score.weight": (2, 4)},
        re.escape(r"--only '^(?!(lm_head|score)(\.|$))' merges all but these"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_left_on_both_sides_is_refused_with_its_cause_and_without_on_missing(case):
    ours, theirs, cause = REFUSALS[case]
    common = {"h.0.w.weight": (4, 4)}
    write("base", common | ours)
    write("a", common | theirs, 1)
    for base in ("base", None):
        with pytest.raises(MismatchError, match=cause) as caught:
            merge(*(("a",) if base else ("base", "a")), base=base, weights="uniform")
        text = str(caught.value)
        assert "on-missing" not in text
        assert all(
            f"'{next(iter(n for n in side if n in text))}'" in text for side in (ours, theirs)
        )
    # The flag, if it is given all the same, is told with what it leaves.
    report = merge("a", weights="uniform", on_missing="base")
    assert any(
        n.startswith("WARNING: ") and f"{len(ours):,} of 'base.safetensors' stay as they are" in n
        for n in report.notes
    )


def test_the_way_that_other_heads_are_shown_merges_what_both_have():
    write("base", {"h.0.w.weight": (4, 4), "lm_head.out.weight": (5, 4)})
    write("a", {"h.0.w.weight": (4, 4), "score.weight": (2, 4)}, 1)
    with pytest.raises(MismatchError) as caught:
        merge("a", weights="uniform")
    only = re.search(r"--only '(\S+)'", str(caught.value)).group(1)
    report = merge("a", weights="uniform", only=only)
    found, base, a = load("x.safetensors"), load("base.safetensors"), load("a.safetensors")
    np.testing.assert_allclose(found["h.0.w.weight"], a["h.0.w.weight"], rtol=1e-6)
    np.testing.assert_array_equal(found["lm_head.out.weight"], base["lm_head.out.weight"])
    assert not any("WARNING" in note for note in report.notes)


def test_one_side_that_is_longer_is_still_asked_for_with_the_flag():
    write("base", TENSORS | {"mtp.fc.weight": (4, 4)})
    write("a", {modern(n): s for n, s in TENSORS.items()}, 1)
    with pytest.raises(MismatchError, match=r"'mtp\.fc\.weight' .*is in .*--on-missing base"):
        merge("a", weights="uniform")


def test_words_are_not_replaced_between_two_types_of_models(tmp_path):
    names = [f"layer.{i}.{p}.weight" for i in range(2) for p in ("q", "k", "out.dense")]
    for name, types in (("same", ("bert", "bert")), ("other", ("bert", "electra"))):
        for folder, prefix, kind in zip(("base", "a"), ("one", "two"), types, strict=True):
            tensors = {f"{prefix}.{n}": np.ones((4, 4), np.float32) for n in names}
            tiny.write(tmp_path / name / folder / "model.safetensors", tensors)
            (tmp_path / name / folder / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = {"weights": "uniform", "out": "out"}
    report = merge(str(tmp_path / "same/a"), base=str(tmp_path / "same/base"), **settings)
    assert any("two.* -> one.* (6)" in note for note in report.notes)
    with pytest.raises(MismatchError, match=r"of type electra and .* of type bert"):
        merge(str(tmp_path / "other/a"), base=str(tmp_path / "other/base"), **settings)


def vision_language(seed):
    torch.manual_seed(seed)
    text = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20}
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "image_size": 8}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
        | text,
        vision_config={"model_type": "clip_vision_model", "num_attention_heads": 2, "patch_size": 4}
        | vision,
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_a_vision_language_model_of_two_versions_merges_and_loads():
    base, tuned = vision_language(0), vision_language(1)
    base.save_pretrained("base")  # under the names from before 4.52
    tuned.save_pretrained("tuned", save_original_format=False)
    assert set(load_file("base/model.safetensors")).isdisjoint(load_file("tuned/model.safetensors"))
    for one, other in (("base", "tuned"), ("tuned", "base")):
        merge(other, base=one, weights="uniform", out=f"{one}-out")
        assert set(load(f"{one}-out")) == set(load(one))
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(f"{one}-out")
        expected = (tuned if one == "base" else base).state_dict()
        for name, values in loaded.state_dict().items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)


def test_a_vision_language_adapter_finds_its_layers_under_the_other_names(tmp_path):
    """Adapters from before 4.52 on bases of today, and the other way round."""
    model = vision_language(0)
    for folder, is_old in (("old", True), ("new", False)):
        model.save_pretrained(folder, save_original_format=is_old)
    suffix = "layers.1.self_attn.q_proj"
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8), (8, 2)))
    for folder, module in (
        ("new", f"language_model.model.{suffix}"),
        ("old", f"model.language_model.{suffix}"),
    ):
        place = tmp_path / f"on-{folder}"
        adapter(place, {module: Factors(a, b)})
        with open_adapted(f"{folder}+{place}") as opened:
            delta = {
                n: not np.array_equal(tiny.read_tensor(opened.mean, n), values)
                for n, values in load(folder).items()
            }
        assert [n for n, is_changed in delta.items() if is_changed] == [
            n for n in delta if "language_model" in n and n.endswith(f"{suffix}.weight")
        ]


def test_experts_of_two_versions_are_refused_and_the_way_out_of_the_message_works():
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    base, tuned = (transformers.MixtralForCausalLM(config) for _ in range(2))
    base.save_pretrained("base")
    tuned.save_pretrained("tuned", save_original_format=False)
    with pytest.raises(
        MismatchError, match="'tuned' stores its experts stacked, 'base' one by one"
    ) as caught:
        merge("tuned", base="base", weights="uniform", out="out")
    assert "save_pretrained(..., save_original_format=False)" in str(caught.value)
    loaded = transformers.MixtralForCausalLM.from_pretrained("base")
    loaded.save_pretrained("alike", save_original_format=False)
    merge("tuned", base="alike", weights="uniform", out="out")
    found = transformers.MixtralForCausalLM.from_pretrained("out").state_dict()
    for name, values in tuned.state_dict().items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


ARCHITECTURES = {
    "LlavaForConditionalGeneration": {},
    "Gemma3ForConditionalGeneration": {},
    "Qwen2_5_VLForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "ViTModel": {},
    "GPTNeoXForCausalLM": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_names_of_transformers_are_paired_as_it_renames_them(name):
    """The whole default architecture, without its weights, in memory and as it is stored."""
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, name)
    with torch.device("meta"):
        made = kind(kind.config_class(**ARCHITECTURES[name]))
        memory = {n: torch.empty(p.shape) for n, p in made.state_dict().items()}
    names = {id(tensor): n for n, tensor in memory.items()}
    disk = dict(revert_weight_conversion(made, dict(memory)))
    truth = {stored: names[id(tensor)] for stored, tensor in disk.items()}
    changed = {stored: n for stored, n in truth.items() if stored != n}
    assert changed
    assert find_renaming(memory, disk, scope=Scope.REPLACED).names == changed
    back = {n: stored for stored, n in changed.items()}
    assert find_renaming(disk, memory, scope=Scope.REPLACED).names == back


def test_an_adapter_that_fits_two_towers_is_refused_with_both(tmp_path):
    names = [f"model.{t}.layers.0.attn.{p}.weight" for t in ("text", "vision") for p in "qv"]
    tiny.write("base/model.safetensors", {n: np.ones((4, 4), np.float32) for n in names})
    factor = np.ones((1, 4), np.float32)
    made = {f"layers.0.attn.{p}": Factors(factor, factor.T) for p in "qv"}
    adapter(tmp_path / "a", made)
    with pytest.raises(
        MismatchError,
        match=r"may adapt 'model.text.layers.0.attn.q.weight' or 'model.vision.layers.0.attn.q",
    ):
        open_adapted(f"base+{tmp_path / 'a'}")


def test_models_of_two_types_are_told_as_that(tmp_path):
    """Both sides have left-overs, and saving them again would not help."""
    for name, kind in (("one", "llama"), ("two", "gpt2")):
        tensors = {f"{name}.{i}.weight": np.ones((3, 3 + i), np.float32) for i in range(3)}
        tiny.write(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(MismatchError, match=r"of type gpt2 and .* of type llama") as error:
        merge(str(tmp_path / "one"), str(tmp_path / "two"), base=None, weights="uniform", out="x")
    assert "save_pretrained" not in str(error.value)
