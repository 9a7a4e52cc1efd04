"""Adapters on their base merge like the models that they are folded into."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.posterior import PosteriorInfo, identify, open_posterior, save_posterior
from tests import model_forms
from tests.model_forms import CLASSES, close, expect, load, merge, model, opened, save
from tests.reference import lora as lora_twin

here = model_forms.here
world = model_forms.world
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def lora(folder, base, seed, modules, rank, alpha, observations):
    """An adapter as PEFT writes it, with a posterior.

    Returns the exact changes and their precision for 100 observations.
    """
    rng = np.random.default_rng(seed)
    tensors, kept, result = {}, {}, {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        pair, precision = {}, {}
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = pair[side] = np.float32(0.3 * rng.normal(size=shape))
            kept[name] = precision[side] = np.float32(np.exp(rng.uniform(3, 6, shape)))
        variances = [observations / 100 / (np.float64(precision[side]) + DELTA_0) for side in "AB"]
        scaling = alpha / rank
        spread = lora_twin.variance(pair["A"], pair["B"], *variances, scaling)
        result[f"{module}.weight"] = (
            lora_twin.change(pair["A"], pair["B"], scaling),
            1 / (spread + 1e-20),
        )
    path = Path(folder)
    save(path / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    with SafetensorsSource(checkpoint_files(path)) as source:
        info = PosteriorInfo(
            estimator="ggn",
            unit="token",
            observations=observations,
            ess=observations,
            mean=identify(source),
        )
    save_posterior(path, kept, info, force=True)
    return result


@pytest.fixture
def adapters(world):
    """Two adapters of different rank and layers, from 50 and 400 observations; the base has 100."""
    Path("base").symlink_to(world / "qwen-base")
    base = opened("base")
    changes = lora("a", base[0], 1, [Q], 2, 3, 50.0), lora("b", base[0], 2, [Q, DOWN], 3, 5, 400.0)
    tasks = [
        (
            {n: x + c[n][0] if n in c else x for n, x in base[0].items()},
            {n: c[n][1] if n in c else 0 for n in base[0]},
        )
        for c in changes
    ]
    return base, tasks


def test_adapters_on_their_base_merge_like_the_folded_models(adapters):
    base, tasks = adapters
    for names, folded, scales in ((["a"], tasks[:1], (0.8,)), (["a", "b"], tasks, (0.8, -0.3))):
        merge(*(f"base+{n}" for n in names), weights="uniform", out="x", scale=scales)
        exact = {
            n: m0 + sum(s * (m[n] - m0) for s, (m, _) in zip(scales, folded, strict=True))
            for n, m0 in base[0].items()
        }
        close(load("x"), exact, rtol=1e-5, atol=1e-6)
    CLASSES["qwen"].from_pretrained("x")
    merge("base+a", "base+b", base=None, weights="uniform", out="x")
    close(
        load("x"),
        {n: (x + tasks[1][0][n]) / 2 for n, x in tasks[0][0].items()},
        rtol=1e-5,
        atol=1e-6,
    )


def test_an_adapter_on_its_base_alone_is_folded_in_without_naming_the_base_again(adapters):
    base, tasks = adapters
    for scale in ((1.0,), (-0.5,)):
        alone = merge("base+b", base=None, weights="uniform", out="x", scale=scale)
        merge("base+b", base="base", weights="uniform", out="y", scale=scale)
        assert Path("x/model.safetensors").read_bytes() == Path("y/model.safetensors").read_bytes()
        assert [m.role for m in alone.models] == ["base", "task"]
        exact = {n: m0 + scale[0] * (tasks[1][0][n] - m0) for n, m0 in base[0].items()}
        close(load("x"), exact, rtol=1e-5, atol=1e-6)
    recipe = yaml.safe_load(Path("x/merge_recipe.yaml").read_text())
    assert (recipe["models"], recipe["base"]) == (["base+b"], "base")
    assert merge("base+b", base=None, out="z").method == "gradient_matching"
    for method in ("average", "precision_average"):
        with pytest.raises(ConfigError, match="BASE\\+ADAPTER and a method that takes a base"):
            merge("base+b", base=None, weights="uniform", method=method, out="w")


def test_an_adapter_is_not_merged_on_another_base_than_it_records(adapters):
    base, _ = adapters
    with (
        SafetensorsSource(checkpoint_files(Path("a"))) as a,
        SafetensorsSource(checkpoint_files(Path("base"))) as b,
    ):
        info = PosteriorInfo(
            estimator="ggn", unit="token", observations=50.0, mean=identify(a), base=identify(b)
        )
        kept = {name: np.ones(spec.shape, np.float32) for name, spec in a.specs.items()}
    save_posterior(Path("a"), kept, info, force=True)
    save("other/model.safetensors", {n: np.float32(x + 1) for n, x in base[0].items()})
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if Path("base", name).exists():
            Path("other", name).write_bytes(Path("base", name).read_bytes())
    merge("base+a", base=None, weights="uniform", out="x")
    for weights in ("uniform", "precision"):
        with pytest.raises(MismatchError, match=r"made on other weights.*--on-base apply"):
            merge("other+a", base=None, weights=weights, out="y")
    report = merge("other+a", base=None, weights="uniform", out="y", on_base="apply")
    assert any("made on other weights" in note for note in report.notes)


def test_adapters_weigh_by_the_precision_of_their_products_counted_like_the_base(adapters):
    base, tasks = adapters
    report = merge("base+a", "base+b", out="x", scale=(1.0, 0.5))
    mean, precision = expect(base, tasks, (1.0, 0.5))
    close(load("x"), mean, rtol=1e-4, atol=1e-5)
    close(opened("x")[1], precision, rtol=1e-4)
    assert [m.count for m in report.models] == [100, 100, 100]
    assert [m.observations for m in report.models] == [100, 50, 400]
    assert {m.estimator for m in report.models} == {"ggn"}
    assert report.merged_tensors == 2
    assert set(report.copied.values()) == {"no task changed it"}
    assert open_posterior("x").info.observations == 150
    # Twice the count is half the variance of either factor; a count of its own is what its
    # author saw.
    for settings, counts in (
        ({"observations": {"base+a": "2x"}}, [100, 200, 100]),
        ({"observations": {"base+a": "70"}}, [100, 70, 100]),
        ({"counts": "recorded"}, [100, 50, 400]),
    ):
        report = merge("base+a", "base+b", out="y", **settings)
        assert [m.count for m in report.models] == counts
        again = [
            lora(n, base[0], i + 1, m, r, s, o * 100 / c)
            for i, (n, m, r, s, o, c) in enumerate(
                zip(
                    ("c", "d"),
                    ([Q], [Q, DOWN]),
                    (2, 3),
                    (3, 5),
                    (50.0, 400.0),
                    counts[1:],
                    strict=True,
                )
            )
        ]
        weighed = [
            (m, {n: c[n][1] if n in c else 0 for n in base[0]})
            for (m, _), c in zip(tasks, again, strict=True)
        ]
        close(load("y"), expect(base, weighed, (1, 1))[0], rtol=1e-4, atol=1e-5)


def test_a_merge_of_adapters_can_be_undone(adapters):
    merge("base+a", "base+b", out="ab")
    report = merge("ab", "base+b", scale=(1.0, -1.0), out="undone")
    merge("base+a", out="a_only")
    assert report.guarded_share == 0
    assert any("undoes a term" in note for note in report.notes)
    assert not any("rounded back" in note for note in report.notes)
    close(load("undone"), load("a_only"), rtol=1e-4, atol=1e-5)
    close(opened("undone")[1], opened("a_only")[1], rtol=1e-4)
    # Counted otherwise than in the merge, it is no undoing.
    assert (
        merge("ab", "base+b", scale=(1.0, -1.0), observations={"base+b": "2x"}, out="z").guard
        == 0.2
    )


def test_an_adapter_of_another_estimator_does_not_add_to_the_bases(adapters):
    stored = load_file("a/posterior/precision.posterior")
    with SafetensorsSource([Path("a/adapter_model.safetensors")]) as source:
        info = PosteriorInfo(
            estimator="ivon", unit="token", observations=50, ess=50, mean=identify(source)
        )
    save_file(stored, "a/posterior/precision.posterior", info.to_metadata())
    with pytest.raises(PrecisionError, match=r"different kinds .*'base\+a' (has )?ivon per token"):
        merge("base+a", out="x")


def test_an_output_never_takes_the_place_of_an_input(adapters):
    Path("nested").mkdir()
    Path("a").rename("nested/a")
    model("m", 0)
    save(
        "far/precision.safetensors",
        load("base.safetensors") if Path("base.safetensors").exists() else load("base"),
    )
    for settings, out in (
        ({}, "nested/a"),
        ({}, "nested"),
        ({}, "base"),
        ({"base": "base/model.safetensors"}, "base/model.safetensors"),
        (
            {"precision": {"base+nested/a": "nested/a"}, "weights": "precision"},
            "nested/a/posterior",
        ),
    ):
        with pytest.raises(CheckpointError, match="would overwrite"):
            merge("base+nested/a", **({"weights": "uniform"} | settings), out=out)
        assert Path("nested/a/adapter_model.safetensors").exists()
        assert Path("base/model.safetensors").exists()
