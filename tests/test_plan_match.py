"""Tied heads, buffers, missing tensors and vocabularies are matched by stated rules."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.errors import (
    BmergeError,
    CheckpointError,
    ConfigError,
    MismatchError,
    PrecisionError,
)
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.plan import plan_merge
from tests import model_forms, tiny
from tests.model_forms import CLASSES, SHAPES, close, expect, load, merge, model

here = model_forms.here
world = model_forms.world
TIED = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.weight": (4, 4)}
HEAD = "lm_head.weight"


def test_a_head_tied_in_a_task_and_not_in_the_base_takes_the_embedding():
    base = model(
        "base",
        0,
        mean=tiny.arrays(0, TIED | {HEAD: (6, 4)}),
        precision=tiny.precisions(0, TIED | {HEAD: (6, 4)}),
    )
    a = model("a", 1, mean=tiny.arrays(1, TIED), precision=tiny.precisions(1, TIED))
    b = model("b", 2, mean=tiny.arrays(2, TIED), precision=tiny.precisions(2, TIED))
    report = merge("a", "b")
    full = [
        ({**m, HEAD: m["model.embed_tokens.weight"]}, {**p, HEAD: p["model.embed_tokens.weight"]})
        for m, p in (a, b)
    ]
    mean, precision = expect(base, full, (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), precision)
    tie = "'{}.safetensors' ties it to 'model.embed_tokens.weight'"
    assert report.ruled == {HEAD: f"{tie.format('a')}; {tie.format('b')}"}


def test_a_head_of_a_tasks_own_is_written_where_the_base_ties_it():
    base = model("base", 0, mean=tiny.arrays(0, TIED), precision=tiny.precisions(0, TIED))
    own = TIED | {HEAD: (6, 4)}
    a = model("a", 1, mean=tiny.arrays(1, own), precision=tiny.precisions(1, own))
    embedding = "model.embed_tokens.weight"
    untied = tuple({**part, HEAD: part[embedding]} for part in base)
    mean, precision = expect(untied, [a], (1,))
    for rule in ("error", "base", "skip"):  # nothing is missing
        report = merge("a", on_missing=rule)
        assert report.left_out == {}
        assert report.ruled == {HEAD: f"'base.safetensors' ties it to '{embedding}'"}
        close(load("x.safetensors"), mean)
        close(load("x.posterior"), precision)
    # Where the task has no share in it, the base's tie is kept.
    for settings in ({"only": "layers"}, {"scale": ("a.safetensors:embed|head=0",)}):
        assert merge("a", **settings).left_out == {HEAD: "only 'a.safetensors' has it"}
        assert set(load("x.safetensors")) == set(TIED)
    tied = tiny.arrays(1, TIED)
    model(
        "a",
        1,
        mean=tied | {HEAD: tied["model.embed_tokens.weight"].copy()},
        precision=tiny.precisions(1, TIED),
    )
    report = merge("a")
    assert report.left_out == {HEAD: "tied to the input embedding in 'a.safetensors'"}
    assert set(load("x.safetensors")) == set(TIED)


def test_real_models_tied_and_not_merge_and_load(world):
    """One architecture, tied in one folder and untied in the other, in both roles."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.from_pretrained(world / "qwen-base")
    config.tie_word_embeddings = True
    transformers.Qwen2ForCausalLM(config).save_pretrained("tied")
    merge("tied", base=str(world / "qwen-base"), weights="uniform", out="x", scale=(0.5,))
    found = CLASSES["qwen"].from_pretrained("x").state_dict()
    base, tied = load(world / "qwen-base"), load("tied")
    assert HEAD not in tied
    expected = base[HEAD] + 0.5 * (tied["model.embed_tokens.weight"] - base[HEAD])
    np.testing.assert_allclose(found[HEAD].numpy(), expected, rtol=1e-5, atol=1e-7)
    assert json.loads(Path("x/config.json").read_text())["tie_word_embeddings"] is False
    report = merge(str(world / "qwen-a"), base="tied", weights="uniform", out="y", scale=(0.5,))
    assert any("config.json says tie_word_embeddings false" in note for note in report.notes)
    assert json.loads(Path("y/config.json").read_text())["tie_word_embeddings"] is False
    found, task = CLASSES["qwen"].from_pretrained("y").state_dict(), load(world / "qwen-a")
    for name in ("model.embed_tokens.weight", HEAD):
        expected = (tied["model.embed_tokens.weight"] + task[name]) / 2
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_buffers_and_integers_are_the_bases_whatever_the_tasks_hold():
    base = {n: torch.as_tensor(a) for n, a in tiny.arrays(0, SHAPES).items()}
    kept = {
        "h.0.attn.bias": torch.ones(1, 1, 3, 3),
        "rotary.inv_freq": torch.rand(4),
        "ids": torch.arange(5),
        "steps": torch.tensor(7, dtype=torch.int32),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(3).to(torch.uint8),
    }
    save_file(base | kept, "base.safetensors")
    other = {
        "rotary.inv_freq": torch.zeros(4),
        "ids": torch.zeros(9, dtype=torch.int64),
        "more": torch.arange(2),
    }
    save_file({n: t + 1 for n, t in base.items()} | other, "a.safetensors")
    report = merge("a", weights="uniform", dtype="BF16")
    found = load_file("x.safetensors")
    for name, values in kept.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)
        assert "not a parameter" in report.copied[name]
    assert set(found) == set(base) | set(kept)
    assert report.left_out == {"more": "not a parameter; only 'a.safetensors' has it"}


def test_a_missing_tensor_is_an_error_or_unchanged_or_left_out():
    base, b = model("base", 0), model("b", 2)
    lacking = {n: s for n, s in SHAPES.items() if n != "h.0.conv"}
    a = model("a", 1, mean=tiny.arrays(1, lacking), precision=tiny.precisions(1, lacking))
    with pytest.raises(
        MismatchError,
        match=r"'h\.0\.conv' \(1 such\) is in 'base\.safetensors' but not in 'a\.safetensors'.*"
        r"--on-missing base .*--on-missing skip",
    ):
        merge("a", "b")
    with pytest.raises(
        ConfigError, match="--on-missing base takes the base's values: name it with --base"
    ):
        merge("a", "b", base=None, on_missing="base")
    report = merge("a", "b", on_missing="base")
    assert report.ruled == {"h.0.conv": "'a.safetensors' has none and counts as unchanged"}
    unchanged = (
        {**a[0], "h.0.conv": base[0]["h.0.conv"]},
        {**a[1], "h.0.conv": np.zeros((3, 2, 2))},
    )
    mean, precision = expect(base, (unchanged, b), (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), precision)
    sums = [sum(float(s.sum()) for s in p.values()) for _, p in (base, a, b)]
    assert [m.ratio for m in report.models[1:]] == pytest.approx(
        [s / sums[0] for s in sums[1:]], rel=1e-5
    )
    report = merge("a", "b", on_missing="skip")
    assert report.left_out == {"h.0.conv": "'a.safetensors' has none"}
    del mean["h.0.conv"]
    close(load("x.safetensors"), mean)
    report = merge("a", on_missing="base")
    assert report.copied == {"h.0.conv": "all scales are zero"}
    np.testing.assert_array_equal(load("x.safetensors")["h.0.conv"], base[0]["h.0.conv"])


@pytest.mark.parametrize("pool", [None, "tensor"])
def test_a_missing_tensor_counts_as_unchanged_also_beside_one_number_for_the_base(pool):
    base, b = model("base", 0), model("b", 2)
    lacking = {n: s for n, s in SHAPES.items() if n != "h.0.conv"}
    a = model("a", 1, mean=tiny.arrays(1, lacking), precision=tiny.precisions(1, lacking))
    merge("a", "b", on_missing="base", isotropic={"base.safetensors": 2.0}, pool=pool)
    base = (base[0], dict.fromkeys(SHAPES, 2.0))
    unchanged = (
        {**a[0], "h.0.conv": base[0]["h.0.conv"]},
        {**a[1], "h.0.conv": np.zeros((3, 2, 2))},
    )
    tasks = [
        (m, {n: np.full(SHAPES[n], s.mean()) if pool else s for n, s in p.items()})
        for m, p in (unchanged, b)
    ]
    mean, precision = expect(base, tasks, (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), precision)


def test_an_extra_tensor_is_an_error_or_left_out():
    base = model("base", 0)
    more = SHAPES | {"extra.conv": (2, 2), "extra.bias": (2,)}
    a = model("a", 1, mean=tiny.arrays(1, more), precision=tiny.precisions(1, more))
    with pytest.raises(
        MismatchError, match=r"'extra\.bias' \(2 such\) is in 'a\.safetensors'.*--on-missing base"
    ):
        merge("a")
    for rule in ("base", "skip"):
        assert merge("a", on_missing=rule).left_out == dict.fromkeys(
            ("extra.conv", "extra.bias"), "only 'a.safetensors' has it"
        )
        close(load("x.safetensors"), expect(base, [a], (1,))[0])
    # Without a base the first model's names are written, and only skipping is left.
    with pytest.raises(MismatchError, match="--on-missing skip leaves it out"):
        merge("base", "a", base=None, weights="uniform")
    assert set(
        load(merge("a", "base", base=None, weights="uniform", on_missing="skip").path)
    ) == set(SHAPES)


@pytest.mark.parametrize("longer", [5, 9])
def test_vocabularies_of_different_length_follow_the_rule(longer):
    names = ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.w"]
    own = {names[0]: (7, 4), names[1]: (7, 4), names[2]: (7,), names[3]: (3, 3)}
    theirs = own | {names[0]: (longer, 4), names[1]: (longer, 4), names[2]: (longer,)}
    base, b = (
        model(n, i, mean=tiny.arrays(i, own), precision=tiny.precisions(i, own))
        for n, i in (("base", 0), ("b", 2))
    )
    a = model("a", 1, mean=tiny.arrays(1, theirs), precision=tiny.precisions(1, theirs))
    with pytest.raises(
        MismatchError,
        match=rf"is \[7\] in 'base.*\[{longer}\] in 'a\.s.*--vocab common .*--vocab base",
    ):
        merge("a", "b")
    report = merge("a", "b", vocab="base")
    assert set(report.copied) == set(names[:3])
    assert f"vocabularies differ (7, {longer}, 7 rows); --vocab base" in report.copied[names[0]]
    found, kept = load("x.safetensors"), load("x.posterior")
    for name in names[:3]:
        np.testing.assert_array_equal(found[name], base[0][name])
        np.testing.assert_allclose(kept[name], base[1][name], rtol=1e-6)
    report = merge("a", "b", vocab="common")
    assert set(report.ruled) == set(names[:3])
    assert (
        f"{longer} of 7 rows are merged, the others are 'base.safetensors''s own"
        if longer < 7
        else f"the first 7 rows of {longer} are merged; rows 7 to 8 are those of 'a.safetensors'"
    ) in report.ruled[names[0]]
    rows = min(7, longer)
    cut = [
        tuple({n: x if n == "model.w" else x[:rows] for n, x in side.items()} for side in post)
        for post in (base, a, b)
    ]
    mean, precision = expect(cut[0], cut[1:], (1, 1))
    found, kept = load("x.safetensors"), load("x.posterior")
    close({n: x if n == "model.w" else x[:rows] for n, x in found.items()}, mean)
    close({n: x if n == "model.w" else x[:rows] for n, x in kept.items()}, precision)
    owner = base if longer < 7 else a  # of the rows that not all models have
    for name in names[:3]:
        np.testing.assert_array_equal(found[name][rows:], owner[0][name][rows:])
        np.testing.assert_allclose(kept[name][rows:], owner[1][name][rows:], rtol=1e-6)
        assert found[name].shape == (max(7, longer), *own[name][1:])


@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_rows_that_the_donor_lacks_are_those_of_the_longest_model_that_is_added(weights):
    def sized(name, seed, rows):
        shapes = {"model.embed_tokens.weight": (rows, 4), "model.w": (3, 3)}
        tensors, precisions = tiny.arrays(seed, shapes), tiny.precisions(seed, shapes)
        return model(name, seed, mean=tensors, precision=precisions)[0]["model.embed_tokens.weight"]

    sizes = {"base": 5, "a": 7, "b": 9, "c": 9}
    made = {name: sized(name, i, rows) for i, (name, rows) in enumerate(sizes.items())}
    cases = {
        "abc": ((1, 1, 1), "b"),
        "acb": ((1, 1, 1), "c"),
        "ab": ((1, 0), "a"),  # b's rows are not asked for
        "ba": ((-1, 1), "a"),  # and b is removed here
        "bc": ((-1, 0), None),
    }
    for models, (scales, owner) in cases.items():
        merge(*models, scale=scales, weights=weights, vocab="common", dtype="F64")
        found = load("x.safetensors")["model.embed_tokens.weight"]
        expected = made[owner or "base"][5:]
        np.testing.assert_array_equal(found[5:], expected, err_msg=models)
    tensors, precisions = (
        make(1, {"model.embed_tokens.weight": (7, 4), "model.w": (3, 3)})
        for make in (tiny.arrays, tiny.precisions)
    )
    tensors["model.embed_tokens.weight"][6, 1] = np.nan
    model("n", 1, mean=tensors, precision=precisions)
    for on_bad in ("error", "base"):
        with pytest.raises(CheckpointError, match=r"n\.safetensors: .*is nan at flat index 25"):
            merge("n", weights=weights, vocab="common", on_bad=on_bad)
    # Without a base the order of the models decides no row's fate.
    shapes = []
    for models in ("ab", "ba"):
        merge(*models, base=None, weights="uniform", vocab="common")
        shapes.append(load("x.safetensors")["model.embed_tokens.weight"].shape)
    assert shapes == [(9, 4), (9, 4)]
    merge("a", "b", weights="uniform", vocab="base")
    np.testing.assert_array_equal(load("x.safetensors")["model.embed_tokens.weight"], made["base"])


def test_only_vocabularies_may_differ_in_length():
    model("base", 0)
    theirs = SHAPES | {"h.0.attn.weight": (3, 5)}
    model("a", 1, mean=tiny.arrays(1, theirs), precision=tiny.precisions(1, theirs))
    for rule in ("error", "common", "base"):
        with pytest.raises(
            MismatchError,
            match=r"'h\.0\.attn\.weight' is \[4, 5\] in .* but \[3, 5\] .*architecture",
        ):
            merge("a", vocab=rule)


def test_the_plan_lists_what_the_rules_decide_before_anything_is_written():
    lacking = {n: s for n, s in SHAPES.items() if n != "h.0.conv"} | {
        "wte.weight": (5, 4),
        "extra": (2,),
    }
    model("base", 0)
    model("a", 1, mean=tiny.arrays(1, lacking), precision=tiny.precisions(1, lacking))
    config = MergeConfig(
        models=("a.safetensors",),
        base="base.safetensors",
        weights="precision",
        vocab="common",
        on_missing="base",
        out="x.safetensors",
    )
    plan = plan_merge(config)
    plan.close()
    assert (set(plan.decisions), set(plan.left_out)) == ({"h.0.conv", "wte.weight"}, {"extra"})
    assert not Path("x.safetensors").exists()
    report = run_merge(config)
    assert (report.ruled, report.left_out) == (plan.decisions, plan.left_out)


def test_a_precision_of_the_wrong_shape_is_named_also_where_it_is_only_copied():
    wrong = tiny.precisions(0, SHAPES) | {"h.0.attn.weight": np.ones((5, 4), np.float32)}
    model("base", 0, precision=wrong)
    model("a", 1)
    for only in (None, "wte"):
        with pytest.raises(
            PrecisionError,
            match=r"'h\.0\.attn\.weight' in base\.posterior.*\[5, 4\], expected F32 or BF",
        ):
            merge("a", only=only)


def test_heads_may_differ_where_they_are_not_merged():
    head = {"score.weight": np.float32([[1, 2], [3, 4]])}
    model(
        "base", 0, mean=tiny.arrays(0, SHAPES) | head, precision=tiny.precisions(0, SHAPES) | head
    )
    model("a", 1, mean=tiny.arrays(1, SHAPES) | head, precision=tiny.precisions(1, SHAPES) | head)
    other = {
        "score.weight": np.float32([[1, 2], [3, 4], [5, 6]]),
        "pooler.weight": np.float32([[1]]),
    }
    model("b", 2, mean=tiny.arrays(2, SHAPES) | other, precision=tiny.precisions(2, SHAPES) | other)
    with pytest.raises(MismatchError, match=r"'pooler\.weight'"):
        merge("a", "b", weights="uniform")
    for weights in ("uniform", "precision"):
        report = merge("a", "b", weights=weights, only=r"^h\.|wte")
        assert report.left_out["pooler.weight"] == "only 'b.safetensors' has it"
        np.testing.assert_array_equal(load("x.safetensors")["score.weight"], head["score.weight"])
        merge("a", "b", weights=weights, on_missing="base", scale=("b.safetensors:score=0",))
        np.testing.assert_allclose(
            load("x.safetensors")["score.weight"], head["score.weight"], rtol=1e-6
        )
    with pytest.raises(MismatchError, match=r"'score\.weight' is \[2, 2\].*--only chooses"):
        merge("a", "b", weights="uniform", on_missing="base")


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "lm_head.bias",
        "output.weight",
        "transformer.output_layer.weight",
        "proj_out.weight",
        "backbone.embeddings.weight",
        "generator_lm_head.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "lm_head.decoder.weight",
    ],
)
def test_embeddings_and_heads_of_the_field_are_known(name):
    assert is_vocabulary(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.weight",
        "encoder.layer.0.output.weight",
        "h.0.mlp.proj_out.bias.x",
        "embeddings.LayerNorm.weight",
        "bert.embeddings.position_embeddings.weight",
    ],
)
def test_other_tensors_are_no_vocabularies(name):
    assert not is_vocabulary(name)


def test_a_head_that_the_base_lacks_is_told_as_that():
    """Its change cannot be added, and the flag drops what was trained."""
    model("base", 0, mean=tiny.arrays(0, TIED))
    model("a", 1, mean=tiny.arrays(1, TIED | {"score.weight": (2, 4)}))
    with pytest.raises(MismatchError) as error:
        merge("a", weights="uniform")
    assert "no such output layer" in str(error.value)
    assert "--on-missing base drops it" in str(error.value)
    assert "another base?" not in str(error.value)


HEADED = TIED | {"score.weight": (2, 4)}


@pytest.mark.parametrize(
    ("shapes", "scales", "keeps"),
    [
        ((HEADED,), (1,), False),  # a merge needs two models, or a base
        ((HEADED, HEADED), (1, 1), True),
        ((HEADED, HEADED), (1, -1), False),  # an average has no negative shares
        ((HEADED, TIED), (1, 1), False),  # the other model has none to average
        ((TIED, HEADED), (1, 1), False),
    ],
)
def test_to_keep_a_head_nothing_is_proposed_that_does_not_work(shapes, scales, keeps):
    model("base", 0, mean=tiny.arrays(0, TIED))
    names = "ab"[: len(shapes)]
    for seed, (name, own) in enumerate(zip(names, shapes, strict=True), start=1):
        model(name, seed, mean=tiny.arrays(seed, own))
    with pytest.raises(MismatchError) as error:
        merge(*names, weights="uniform", scale=scales)
    assert ("without --base" in str(error.value)) == keeps
    assert "name a base that has it" in str(error.value)
    try:
        output = merge(*names, base=None, weights="uniform", scale=scales)
        works = "score.weight" in load(output.path)
    except BmergeError:
        works = False
    assert works == keeps
    dropped = merge(*names, weights="uniform", scale=scales, on_missing="base")
    assert "score.weight" not in load(dropped.path)


@pytest.mark.parametrize("settings", [{"base": None}, {}], ids=["average", "on a base"])
def test_a_model_without_some_of_its_layers_is_incomplete_and_no_flag_is_proposed(settings):
    """A shard that was not fetched reads like tensors that one has more: the flag would hide it."""
    shapes = {f"h.{i}.{part}.weight": (3, 3) for i in range(4) for part in ("attn", "mlp")}
    model("base", 0, mean=tiny.arrays(0, shapes))
    model("a", 1, mean=tiny.arrays(1, {n: s for n, s in shapes.items() if not n.startswith("h.3")}))
    models = ("base", "a") if "base" in settings else ("a",)
    with pytest.raises(MismatchError) as error:
        merge(*models, weights="uniform", **settings)
    assert "'h.3.attn.weight' (2 such)" in str(error.value)
    assert "files are incomplete" in str(error.value)
    assert "--on-missing" not in str(error.value)
