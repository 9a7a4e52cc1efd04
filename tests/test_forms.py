"""The forms in which models come: dtypes, pooled precisions, shards, ties, vocabularies, recipes, broken entries."""

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.names import is_vocabulary
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import (
    PosteriorInfo,
    checkpoint_files,
    identify,
    open_posterior,
    precision_path,
    save_posterior,
    write_index,
)
from mergekit_bayes.tensors import SafetensorsSource
from tests import tiny
from tests.reference import lora as lora_twin
from tests.reference.merging import natural_sum
from tests.tiny_models import tiny_bert, tiny_gpt2

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Half a step between neighbours, relative and at zero.
ROUNDING = {"F64": (2**-53, 0), "F32": (2**-24, 0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 0),
            "F8_E4M3": (2**-4, 2**-10), "F8_E5M2": (2**-3, 2**-17)}  # fmt: skip
SHAPES = {"wte.weight": (7, 4), "h.0.attn.weight": (4, 5), "h.0.ln.bias": (4,), "h.0.scalar": (), "h.0.conv": (3, 2, 2)}
POOLED = {
    "entry": lambda s: s,
    "row": lambda s: s.mean(axis=tuple(range(1, s.ndim)), keepdims=True, dtype=np.float32) if s.ndim > 1 else s,
    "tensor": lambda s: np.full((1,) * s.ndim, s.mean(), np.float32),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, tensors, dtype="F32", metadata=None):
    """A checkpoint as torch writes it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    stored = {n: torch.as_tensor(np.asarray(t)).to(TORCH[dtype]).contiguous() for n, t in tensors.items()}
    save_file(stored, str(path), metadata or {"format": "pt"})


def load(path):
    """A checkpoint's tensors as torch reads them, in float64."""
    files = checkpoint_files(Path(path))
    return {n: t.to(torch.float64).numpy() for file in files for n, t in load_file(str(file)).items()}


def model(name, seed, *, dtype="F32", pool="entry", kept="F32", spread=1.0, mean=None, precision=None, **info):
    """`name.safetensors` with a precision of any shape and dtype beside it; both as they are stored, in float64."""
    mean = tiny.arrays(seed, SHAPES, spread) if mean is None else mean
    precision = tiny.precisions(seed, SHAPES) if precision is None else precision
    path = Path(f"{name}.safetensors")
    save(path, mean, dtype)
    source = SafetensorsSource([path])
    known = {"estimator": "ggn", "unit": "token", "observations": 100.0, "ess": 100.0} | info
    metadata = PosteriorInfo(mean=identify(source), **known).to_metadata()
    source.close()
    save(precision_path(path), {n: POOLED[pool](p) for n, p in precision.items()}, kept, metadata)
    return load(path), load(precision_path(path))


def merge(*models, **settings):
    settings = {"base": "base", "weights": "precision", "out": "x.safetensors", "force": True} | settings
    paths = {
        ref: f"{ref}.safetensors" for ref in (*models, settings["base"]) if ref and Path(f"{ref}.safetensors").exists()
    }
    settings["base"] = paths.get(settings["base"], settings["base"])
    return run_merge(MergeConfig(models=tuple(paths.get(m, m) for m in models), **settings))


def spread_out(precision, mean):
    return {n: np.broadcast_to(p, mean[n].shape) for n, p in precision.items()}


def matching(base, tasks, scales):
    """Gradient matching in float64, in natural parameters: mean and precision by tensor."""
    found = {}
    for name, m0 in base[0].items():
        s0 = np.broadcast_to(base[1][name], m0.shape) + DELTA_0
        each = [(s0 + np.broadcast_to(s[name], m0.shape), m[name]) for m, s in tasks]
        found[name] = natural_sum((s0, m0), each, scales)
    return found


# Dtypes


@pytest.mark.parametrize("out", TORCH)
@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_means_of_every_dtype_mix_and_come_out_in_every_dtype(out, weights):
    names = list(TORCH)
    rounded = 0
    for k, own in enumerate(names):
        base, a, b = (
            model(name, i, dtype=names[(k + i) % 6], kept=("F32", "BF16")[(i + k) % 2])
            for i, name in enumerate(("base", "a", "b"))
        )
        merge("a", "b", weights=weights, scale=(0.5, 0.25), dtype=out)
        source = SafetensorsSource([Path("x.safetensors")])
        assert {s.dtype for s in source.specs.values()} == {out}
        source.close()
        found = load("x.safetensors")
        if weights == "uniform":
            base, a, b = ((m, dict.fromkeys(m, s)) for (m, _), s in zip((base, a, b), (1.0, 0.0, 0.0), strict=True))
        for name, (exact, _) in matching(base, (a, b), (0.5, 0.25)).items():
            relative, absolute = ROUNDING[out]
            inner = 4e-14 if out == "F64" else 4e-6
            bound = relative * abs(exact) + absolute + inner * (1 + abs(exact))
            assert (abs(found[name] - exact) <= bound).all(), (own, name)
            nearest = torch.as_tensor(exact).to(TORCH[out]).to(torch.float64).numpy()
            rounded += np.count_nonzero(found[name] == nearest)
    if out not in ("F64", "F32"):
        assert rounded > 0.98 * 6 * sum(int(np.prod(s)) for s in SHAPES.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A GPT-2 (tied), a Qwen2 with a head of its own and a BERT: each a base and two tasks, with posteriors."""
    root = tmp_path_factory.mktemp("world")
    tiny_gpt2(root / "gpt2-base", width=8, layers=1, context=16)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(root / "qwen-base")
    (root / "qwen-base" / "chat_template.jinja").write_text("{{ messages }}")
    tiny_bert(root / "bert-base")
    for kind in ("gpt2", "qwen", "bert"):
        base = root / f"{kind}-base"
        known = open_posterior(str(base), with_precision=False)
        shapes = {n: s.shape for n, s in known.mean.specs.items()}
        known.close()
        for seed, name in enumerate(("base", "a", "b")):
            folder = root / f"{kind}-{name}"
            if name != "base":
                loaded = CLASSES[kind].from_pretrained(base)
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter in loaded.parameters():
                        parameter += 0.05 * torch.randn_like(parameter)
                loaded.save_pretrained(folder)
            source = SafetensorsSource(checkpoint_files(folder))
            info = PosteriorInfo(estimator="ggn", unit="token", observations=100, ess=100, mean=identify(source))
            source.close()
            save_posterior(folder, tiny.precisions(seed, shapes), info)
    return root


CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "qwen": transformers.Qwen2ForCausalLM,
    "bert": transformers.BertForSequenceClassification,
}


def opened(folder):
    return load(folder), load(Path(folder) / "posterior" / "precision.safetensors")


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "BF16"), ("qwen", "BF16"), ("qwen", "F16"), ("bert", "F64")])
def test_a_model_written_in_another_dtype_loads_with_equal_tensors(world, kind, dtype):
    base, a, b = (world / f"{kind}-{n}" for n in ("base", "a", "b"))
    merge(str(a), str(b), base=str(base), out="x", dtype=dtype)
    stored = load("x")
    loaded = CLASSES[kind].from_pretrained("x")
    assert loaded.dtype == TORCH[dtype]
    state = loaded.state_dict()
    for name, values in stored.items():
        np.testing.assert_array_equal(state[name].to(torch.float64).numpy(), values)
    assert set(state) - set(stored) <= {"lm_head.weight"}
    assert json.loads(Path("x/config.json").read_text())["dtype"] == str(TORCH[dtype]).removeprefix("torch.")
    for name, (exact, _) in matching(opened(base), [opened(a), opened(b)], (1, 1)).items():
        assert (abs(stored[name] - exact) <= ROUNDING[dtype][0] * abs(exact) + 1e-6).all()


# Precisions by entry, row and tensor


def close(found, expected, rtol=2e-5, atol=2e-6, what=""):
    assert set(found) == set(expected)
    for name, values in expected.items():
        shown = np.broadcast_to(found[name], np.shape(values))
        np.testing.assert_allclose(shown, values, rtol=rtol, atol=atol, err_msg=f"{what} {name}")


def coarsest(pools):
    return next(p for p in ("entry", "row", "tensor") if p in pools)


def expect(base, tasks, scales, shapes=None):
    """Merged mean and precision, by matching in float64."""
    both = matching(base, tasks, scales)
    return {n: m for n, (m, _) in both.items()}, {n: s for n, (_, s) in both.items()}


@pytest.mark.parametrize("pools", list(itertools.product(POOLED, repeat=3)), ids="-".join)
def test_pooled_precisions_equal_the_same_numbers_spread_out(pools):
    base, a, b = (
        model(n, i, pool=p, kept=("F32", "BF16")[i % 2])
        for i, (n, p) in enumerate(zip(("base", "a", "b"), pools, strict=True))
    )
    merge("a", "b", scale=(1.0, 0.4))
    mean, precision = expect(base, (a, b), (1.0, 0.4))
    close(load("x.safetensors"), mean)
    stored = load("x.precision.safetensors")
    close(stored, precision)
    assert {n: s.shape for n, s in stored.items()} == {
        n: POOLED[coarsest(pools)](np.ones(s, np.float32)).shape for n, s in SHAPES.items()
    }
    for name in SHAPES:
        if coarsest(pools) != "entry":
            assert precision[name].size == 1 or np.ptp(precision[name].reshape(len(precision[name]), -1), 1).max() == 0


@pytest.mark.parametrize("settings", [{"shrink": "0.3"}, {"shrink": "row:0.3"}, {"pool": "row"}, {"pool": "tensor"},
                                      {"pool": "row", "shrink": "row:0.5"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("pools", [("entry", "row", "tensor"), ("tensor", "entry", "row"), ("row",) * 3], ids="-".join)
def test_shrinking_and_pooling_of_pooled_precisions(pools, settings):
    each = [model(n, i, pool=p) for i, (n, p) in enumerate(zip(("base", "a", "b"), pools, strict=True))]
    merge("a", "b", **settings)

    def shape(s, to):
        axes = tuple(range(1, s.ndim)) if to == "row" else tuple(range(s.ndim))
        return np.broadcast_to(s.mean(axis=axes, keepdims=True), s.shape)

    def mended(name, s):
        s = np.broadcast_to(s, SHAPES[name])
        s = shape(s, settings["pool"]) if "pool" in settings else s
        amount, by_row = settings.get("shrink", "0").removeprefix("row:"), "row:" in settings.get("shrink", "")
        return s + float(amount) * shape(s, "row" if by_row else "tensor")

    base, a, b = ((m, {n: mended(n, s) for n, s in p.items()}) for m, p in each)
    mean, precision = expect(base, (a, b), (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), precision)


@pytest.mark.parametrize("settings", [{}, {"shrink": "0.3"}, {"shrink": "row:0.3"}, {"pool": "row"},
                                      {"pool": "tensor", "shrink": "0.5"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("pools", [("row",) * 4, ("tensor",) * 4, ("entry", "row", "tensor", "row")], ids="-".join)
def test_merges_of_pooled_precisions_chain_and_undo(pools, settings):
    for i, (name, pool) in enumerate(zip(("base", "a", "b", "c"), pools, strict=True)):
        model(name, i, pool=pool)
    merge("a", "b", scale=(1.0, 0.7), out="ab.safetensors", **settings)
    merge("ab", "c", scale=(1.0, 0.3), out="chain.safetensors", **settings)
    merge("a", "b", "c", scale=(1.0, 0.7, 0.3), out="once.safetensors", **settings)
    report = merge("chain", "b", scale=(1.0, -0.7), out="undone.safetensors", **settings)
    merge("a", "c", scale=(1.0, 0.3), out="rest.safetensors", **settings)
    assert report.guarded_share == 0
    for suffix in (".safetensors", ".precision.safetensors"):
        close(load(f"chain{suffix}"), load(f"once{suffix}"), rtol=1e-4, atol=1e-5)
        close(load(f"undone{suffix}"), load(f"rest{suffix}"), rtol=1e-3, atol=1e-4)


def test_a_removal_of_pooled_precisions_is_guarded_like_the_same_numbers_spread_out():
    base, a = model("base", 0, pool="row"), model("a", 1, pool="row")
    report = merge("a", scale=(-1.0,))
    stored, guarded, entries = load("x.precision.safetensors"), 0, 0
    for name, m0 in base[0].items():
        s0, h = (np.broadcast_to(p[1][name], m0.shape) for p in (base, a))
        s = np.maximum(s0 - h, 0.2 * (s0 + h))
        np.testing.assert_allclose(load("x.safetensors")[name], m0 - (s0 + h) / s * (a[0][name] - m0), rtol=2e-4)
        np.testing.assert_allclose(np.broadcast_to(stored[name], m0.shape), s, rtol=2e-5)
        guarded, entries = guarded + np.count_nonzero(s0 - h < 0.2 * (s0 + h)), entries + s.size
    assert report.guarded_share == pytest.approx(guarded / entries)
    assert guarded > 0


def test_a_pooled_posterior_is_kilobytes():
    shapes = {"w": (300, 500), "b": (500,)}
    for i, name in enumerate(("base", "a")):
        model(name, i, mean=tiny.arrays(i, shapes), precision=tiny.precisions(i, shapes))
    whole = 4 * 300 * 500
    for pool, numbers in (("row", 800), ("tensor", 2)):
        merge("a", pool=pool, out=f"{pool}.safetensors")
        assert precision_path(Path(f"{pool}.safetensors")).stat().st_size < 4 * numbers + 4000 < whole
        # And it can be pooled or spread out no further: it stays what it is.
        merge(pool, pool=pool, out="again.safetensors", base="base")
        assert load("again.precision.safetensors")["w"].shape == load(f"{pool}.precision.safetensors")["w"].shape


def test_rows_of_vocabularies_that_differ_keep_their_own_pooled_precision():
    for longer, kept, pool in itertools.product((5, 9), POOLED, (None, "row", "tensor")):
        shapes = SHAPES | {"wte.weight": (longer, 4)}
        base = model("base", 0, pool=kept)
        a = model("a", 1, pool=kept, mean=tiny.arrays(1, shapes), precision=tiny.precisions(1, shapes))
        report = merge("a", vocab="common", pool=pool)
        rows = min(7, longer)
        s0, h = base[1]["wte.weight"], a[1]["wte.weight"]
        s0 = np.broadcast_to(s0, (7, 4))
        h = np.broadcast_to(h, (longer, 4))[:rows]
        if pool is not None:
            axis = 1 if pool == "row" else None
            s0, h = (np.broadcast_to(x.mean(axis=axis, keepdims=True), x.shape) for x in (s0, h))
        m0, m = base[0]["wte.weight"], a[0]["wte.weight"][:rows]
        mean, precision = m0.copy(), s0.copy()
        precision[:rows] += h
        mean[:rows] += (s0[:rows] + h) / precision[:rows] * (m - m0[:rows])
        case = f"{longer} {kept} {pool}"
        close({"w": load("x.safetensors")["wte.weight"]}, {"w": mean}, what=case)
        close({"w": load("x.precision.safetensors")["wte.weight"]}, {"w": precision}, what=case)
        assert str(rows) in report.ruled["wte.weight"]


# Entries that cannot be merged

BAD = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "negative": -3.0}
AT = ("h.0.attn.weight", (2, 3))  # flat index 13
POOLINGS = [{}, {"shrink": "0.3"}, {"shrink": "row:0.3"}, {"pool": "row"}, {"pool": "tensor"}]


def spoiled(arrays, value, at=AT):
    arrays = {n: a.copy() for n, a in arrays.items()}
    arrays[at[0]][at[1]] = value
    return arrays


@pytest.mark.parametrize("settings", POOLINGS, ids=str)
@pytest.mark.parametrize("kind", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_precision_is_named_and_nothing_is_left_behind(value, kind, settings):
    model("base", 0)
    model("b", 2)
    model("a", 1, precision=spoiled(tiny.precisions(1, SHAPES), value), kept=kind)
    before = sorted(Path().iterdir())
    for base, scale in (("base", 1.0), (None, 1.0)):
        with pytest.raises(PrecisionError) as error:
            merge("b", "a", base=base, scale=(scale,), **settings)
        shown = str(error.value)
        assert f"'{AT[0]}' in a.precision.safetensors is {value} at flat index 13. " in shown
        assert "--on-bad base" in shown  # without a base it says that one is needed
        assert ("with --base" in shown) == (base is None)
        assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F16", "F8_E5M2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_mean_is_named_and_counted_and_nothing_is_left_behind(value, dtype):
    model("base", 0, dtype="BF16")
    mean = spoiled(spoiled(tiny.arrays(1, SHAPES), value), value, (AT[0], (3, 4)))
    model("a", 1, mean=mean, dtype=dtype)
    before = sorted(Path().iterdir())
    for weights in ("uniform", "precision"):
        with pytest.raises(CheckpointError, match=rf"'{AT[0]}' is {value} at flat index 13, the first of 2 bad entri"):
            merge("a", weights=weights)
        with pytest.raises(CheckpointError, match=r"Make it anew\.$"):
            merge("base", base="a", weights=weights, on_bad="base")
        assert sorted(Path().iterdir()) == before


def test_bad_entries_of_a_first_model_without_a_base_are_named():
    model("a", 1, mean=spoiled(tiny.arrays(1, SHAPES), np.nan))
    model("b", 2)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 'h\.0\.attn\.weight' is nan"):
        merge("a", "b", base=None)


@pytest.mark.parametrize("settings", POOLINGS, ids=str)
@pytest.mark.parametrize("where", ["mean", "precision"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F64"])
def test_bad_entries_count_as_unchanged_where_asked(where, kind, settings):
    prior = {"kind": "isotropic", "precision": 0.05}
    model("base", 0)
    good = model("a", 1, dtype=kind, kept=kind, prior=prior)
    merge("a", **settings, out="good.safetensors")
    values = iter(BAD.values()) if where == "precision" else iter([np.nan, np.inf, -np.inf, np.nan])
    mean, precision = tiny.arrays(1, SHAPES), tiny.precisions(1, SHAPES)
    for k in range(4):
        target = spoiled(mean if where == "mean" else precision, next(values), (AT[0], (k, 3)))
        mean, precision = (target, precision) if where == "mean" else (mean, target)
    model("a", 1, mean=mean, precision=precision, dtype=kind, kept=kind, prior=prior)
    report = merge("a", **settings, on_bad="base", out="mended.safetensors")
    assert [m.mended for m in report.models] == [0, 4]
    assert "4 bad entries of 'a.safetensors' took the base's values" in report.notes
    found, whole = load("mended.safetensors"), load("good.safetensors")
    for name in set(SHAPES) - {AT[0]}:
        np.testing.assert_array_equal(found[name], whole[name])
    if where == "mean" or "pool" not in settings:
        np.testing.assert_array_equal(found[AT[0]][:, 3], load("base.safetensors")[AT[0]][:, 3])
    # What the data of the other entries added, summed up: none of the bad ones'.
    s0, h = load("base.precision.safetensors")[AT[0]], good[1][AT[0]] - 0.05
    if where == "precision":
        h[:, 3] = 0
    if settings.get("pool"):
        axis = 1 if settings["pool"] == "row" else None
        s0, h = s0.mean(axis=axis, keepdims=True), h.mean(axis=axis, keepdims=True)
    if settings.get("shrink"):
        axis = 1 if "row" in settings["shrink"] else None
        s0, h = s0 + 0.3 * s0.mean(axis=axis, keepdims=True), h + 0.3 * h.mean(axis=axis, keepdims=True)
    if "pool" not in settings:
        h[:, 3] = 0
    np.testing.assert_allclose(load("mended.precision.safetensors")[AT[0]], s0 + h, rtol=2e-5)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("pool", ["row", "tensor"])
@pytest.mark.parametrize("settings", POOLINGS, ids=str)
def test_a_bad_number_of_a_pooled_precision_is_found_and_mended(pool, value, settings):
    model("base", 0, pool=pool)
    precision = {n: POOLED[pool](p) for n, p in tiny.precisions(1, SHAPES).items()}
    at = (AT[0], (2, 0) if pool == "row" else (0, 0))
    model("a", 1, precision=spoiled(precision, value, at))
    with pytest.raises(PrecisionError, match=rf"'{AT[0]}' in a\.precision\.safetensors is {value} at flat"):
        merge("a", **settings)
    report = merge("a", **settings, on_bad="base")
    kept = load("x.precision.safetensors")
    assert all(np.isfinite(s).all() and (s > 0).all() for s in kept.values())
    assert report.models[1].mended > 0
    s0 = load("base.precision.safetensors")[AT[0]]
    if not settings:
        row = slice(2, 3) if pool == "row" else slice(None)
        np.testing.assert_array_equal(load("x.safetensors")[AT[0]][row], load("base.safetensors")[AT[0]][row])
        np.testing.assert_allclose(np.broadcast_to(kept[AT[0]], s0.shape)[row], s0[row], rtol=1e-6)


def test_a_bad_row_that_is_pooled_further_adds_nothing_to_the_mean():
    base = model("base", 0, pool="row")
    rows = {n: POOLED["row"](p) for n, p in tiny.precisions(1, SHAPES).items()}
    model("a", 1, precision=spoiled(rows, np.nan, (AT[0], (2, 0))), prior={"kind": "isotropic", "precision": 0.05})
    for settings in ({"pool": "tensor"}, {"shrink": "0.3"}):
        report = merge("a", on_bad="base", **settings)
        s0, h = base[1][AT[0]], np.float64(rows[AT[0]]) - 0.05
        h[2] = 0
        if "pool" in settings:
            expected, bad = np.full((1, 1), s0.mean() + h.mean()), 1  # one number
        else:
            expected, bad = s0 + 0.3 * s0.mean() + h + 0.3 * h.mean(), 5  # the entries of its row
            expected[2] -= 0.3 * h.mean()
        np.testing.assert_allclose(load("x.precision.safetensors")[AT[0]], expected, rtol=2e-5)
        assert report.models[1].mended == bad


@pytest.mark.parametrize("settings", [{}, {"method": "ties"}, {"method": "ties", "param": {"scope": "tensor"}},
                                      {"weights": "precision"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_mended_means_merge_like_means_mended_by_hand(settings, dtype):
    base = model("base", 0, dtype=dtype)
    b = model("b", 2, dtype=dtype)
    precision = tiny.precisions(2, SHAPES)
    spoilt, by_hand, known = b[0], b[0], precision
    for k, value in enumerate((np.nan, np.inf, -np.inf)):
        at = (AT[0], (k, 2))
        spoilt, by_hand = spoiled(spoilt, value, at), spoiled(by_hand, base[0][AT[0]][at[1]], at)
        known = spoiled(known, 0.0, at)
    model("a", 1, dtype=dtype)
    model("spoilt", 2, mean=spoilt, dtype=dtype)
    model("by_hand", 2, mean=by_hand, precision=known, dtype=dtype)
    settings = {"weights": "uniform"} | settings
    merge("a", "spoilt", on_bad="base", **settings)
    merge("a", "by_hand", out="y.safetensors", **settings)
    close(load("x.safetensors"), load("y.safetensors"), rtol=0, atol=0)


def test_a_bad_entry_of_a_merge_in_the_frame_of_its_base_adds_nothing():
    for settings in ({}, {"shrink": "0.3"}, {"shrink": "row:0.3"}):
        for i, name in enumerate(("base", "a", "b")):
            model(name, i)
        merge("a", out="m.safetensors", **settings)
        stored = load_file("m.precision.safetensors")
        header = open_posterior("m.safetensors").info.to_metadata()
        stored[AT[0]][AT[1]] = torch.nan
        save_file(stored, "m.precision.safetensors", header)
        merge("b", out="b_only.safetensors", **settings)
        report = merge("m", "b", on_bad="base", **settings)
        assert report.models[1].mended == 1
        for suffix in (".safetensors", ".precision.safetensors"):
            one, other = (load(f"{n}{suffix}")[AT[0]][AT[1]] for n in ("x", "b_only"))
            assert one == pytest.approx(other, rel=1e-5), (settings, suffix)


def test_a_negative_zero_is_a_precision_and_a_tensor_of_zeros_is_noted():
    precision = spoiled(tiny.precisions(1, SHAPES), -0.0)
    precision["h.0.conv"] *= 0
    base, a = model("base", 0), model("a", 1, precision=precision)
    report = merge("a", on_bad="error")
    mean, stored = expect(base, (a,), (1.0,))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), stored)
    assert [n for n in report.notes if "is zero" in n] == [
        "the precision of 'a.safetensors' is zero in all of 'h.0.conv'"
    ]


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("base", ["base", None])
def test_a_precision_of_zeros_everywhere_is_refused(pool, base):
    model("base", 0)
    model("b", 2)
    model("a", 1, pool=pool, precision={n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    before = sorted(Path().iterdir())
    with pytest.raises(PrecisionError, match=r"'a\.safetensors' .*is zero everywhere"):
        merge("b", "a", base=base)
    assert sorted(Path().iterdir()) == before


def test_values_beyond_float32_are_said_to_be_so():
    base = model("base", 0)
    a = model("a", 1, mean=spoiled({n: np.float64(x) for n, x in tiny.arrays(1, SHAPES).items()}, 1e300), dtype="F64")
    with pytest.raises(CheckpointError, match=r"is 1e\+300 at flat index 13. It is merged in F32.*--dtype F64"):
        merge("a")
    merge("a", dtype="F64", weights="uniform")
    exact = base[0][AT[0]] + (a[0][AT[0]] - base[0][AT[0]])
    np.testing.assert_allclose(load("x.safetensors")[AT[0]], exact, rtol=1e-15)
    model(
        "a", 1, precision=spoiled({n: np.float64(x) for n, x in tiny.precisions(1, SHAPES).items()}, 1e300), kept="F64"
    )
    with pytest.raises(PrecisionError, match=r"is 1e\+300 at flat index 13. It is merged in F32"):
        merge("a")


@pytest.mark.parametrize("out", ["F16", "F8_E4M3", "F8_E5M2"])
def test_a_merge_that_does_not_fit_its_dtype_is_refused(out):
    model("base", 0, mean={"w": np.float32([1e5, 1])}, precision={"w": np.float32([1, 1])})
    model("a", 1, mean={"w": np.float32([2e5, 1])}, precision={"w": np.float32([1, 1])})
    for settings in ({}, {"scale": ("a.safetensors:w=0",)}):
        with pytest.raises(CheckpointError, match=rf"'w': the merge does not fit {out}\. .*BF16 or F32"):
            merge("a", dtype=out, **settings)


def test_a_copied_tensor_is_not_the_place_for_a_bad_precision_or_a_cast_nan():
    model("base", 0, precision=spoiled(tiny.precisions(0, SHAPES), -1.0))
    model("a", 1)
    with pytest.raises(PrecisionError, match=r"'h\.0\.attn\.weight' in base\.precision.* is -1\.0 at flat index 13"):
        merge("a", only="wte")
    merge("a", only="wte", weights="uniform")
    every = np.uint32(0x7FFFFFFF).view(np.float32)  # a NaN whose bits carry over where they are rounded
    model("base", 0, mean=spoiled(tiny.arrays(0, SHAPES), every))
    merge("a", only="wte")
    assert np.isnan(load("x.safetensors")[AT[0]][AT[1]])  # copied byte for byte
    with pytest.raises(CheckpointError, match=r"base\.safetensors: 'h\.0\.attn\.weight' is nan"):
        merge("a", only="wte", dtype="BF16")


# Files: shards, headers, side files


def shard(folder, tensors, parts, dtype="F32", stem="model"):
    """A sharded checkpoint: `parts` are lists of names."""
    files = {f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors": list(part) for i, part in enumerate(parts)}
    for file, part in files.items():
        save(Path(folder) / file, {n: tensors[n] for n in part}, dtype)
    write_index(Path(folder), stem, files, sum(4 * np.size(t) for t in tensors.values()))


def test_the_same_tensor_may_lie_in_different_shards_of_different_models():
    names = list(SHAPES)
    base, a, b = (tiny.arrays(i, SHAPES) for i in range(3))
    shard("base", base, [names[:2], names[2:]])
    shard("a", a, [names[4:], names[1:4], names[:1]])
    shard("b", b, [reversed(names)])
    index = json.loads(Path("a/model.safetensors.index.json").read_text())
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    Path("a/model.safetensors.index.json").write_text(json.dumps(index))
    Path("base/model-00001-of-00002.safetensors").rename("base/zz.safetensors")  # nothing is read from a file's name
    index = Path("base/model.safetensors.index.json")
    index.write_text(index.read_text().replace("model-00001-of-00002", "zz"))
    merge("a", "b", weights="uniform", out="x", scale=(0.5, -1.0))
    close(load("x"), {n: base[n] + 0.5 * (np.float64(a[n]) - base[n]) - (np.float64(b[n]) - base[n]) for n in names})


@pytest.mark.parametrize("padding", range(8))
def test_headers_of_any_length_are_read(padding):
    """Data then begins at an odd offset, on which no array of float32 could be mapped."""
    model("base", 0)
    tensors = {n: torch.as_tensor(t) for n, t in tiny.arrays(1, SHAPES).items()}
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + 4 * t.numel()]}
        at += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    data = b"".join(t.numpy().tobytes() for t in tensors.values())
    Path("odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    model("even", 1)
    for name in ("odd", "even"):
        merge(name, weights="uniform", scale=(0.7,), out=f"{name}_out.safetensors")
    assert Path("odd_out.safetensors").read_bytes() == Path("even_out.safetensors").read_bytes()


def test_shards_are_filled_to_a_size_with_one_index_and_load(world):
    base = world / "qwen-base"
    whole = merge(str(world / "qwen-a"), base=str(base), out="whole")
    merge(str(world / "qwen-a"), base=str(base), out="x", max_shard_size="1.5KB")
    files = sorted(p.name for p in Path("x").glob("*.safetensors"))
    index = json.loads(Path("x/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert len(list(Path("x").glob("*.index.json"))) == 1
    sizes = {f: sum(t.numel() * 4 for t in load_file(f"x/{f}").values()) for f in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert len(files) > 2
    assert all(size <= 1500 for size in sizes.values())
    # Neighbours together would not have fitted.
    assert all(sizes[a] + sizes[b] > 1500 - 1024 for a, b in itertools.pairwise(files))
    state = CLASSES["qwen"].from_pretrained("x").state_dict()
    for name, values in load("whole").items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    for name, values in load("whole/posterior/precision.safetensors").items():
        found = index["weight_map"][name].replace("model-", "x/posterior/precision-")
        np.testing.assert_array_equal(load_file(found)[name].numpy(), values)
    assert whole.precision_path == "whole/posterior"


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own():
    sizes = {"a": (10,), "b": (100,), "c": (10,), "d": (10,)}
    shard("base", tiny.arrays(0, sizes), [list(sizes)])
    shard("t", tiny.arrays(1, sizes), [list(sizes)])
    merge("t", base="base", weights="uniform", out="x", max_shard_size="100")
    index = json.loads(Path("x/model.safetensors.index.json").read_text())["weight_map"]
    assert [int(index[n][6:11]) for n in sizes] == [1, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"--max-shard-size 100: .* needs 520 bytes. Name a folder"):
        merge("t", base="base", weights="uniform", max_shard_size="100")


def test_force_leaves_no_shards_of_an_earlier_merge(world):
    a, base = str(world / "qwen-a"), str(world / "qwen-base")
    for size in ("1.5KB", "700", None, "2KB"):
        merge(a, base=base, out="x", max_shard_size=size)
        merge(a, base=base, out="fresh", max_shard_size=size)
        for one, other in (("x", "fresh"), ("x/posterior", "fresh/posterior")):
            assert sorted(p.name for p in Path(one).iterdir()) == sorted(p.name for p in Path(other).iterdir())
    merge(a, base=base, out="x", weights="uniform")
    assert not Path("x/posterior").exists()
    assert not list(Path().glob("*.partial"))


def test_side_files_come_along_complete(world):
    base = world / "gpt2-base"
    merge(str(world / "gpt2-a"), base=str(base), out="x")
    named = {p.name for p in base.iterdir() if p.is_file()} - {"model.safetensors"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= named
    for name in named:
        assert Path("x", name).read_bytes() == (base / name).read_bytes()
    own = {"model.safetensors", "merge_report.json", "merge_recipe.yaml"}
    assert {p.name for p in Path("x").iterdir() if p.is_file()} == named | own
    transformers.AutoTokenizer.from_pretrained("x")
    merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="q")
    assert Path("q/chat_template.jinja").read_text() == "{{ messages }}"
    # Another merge's report, or code beside the model: the one is not this merge's, the other belongs to the model.
    again = Path("q")
    (again / "modeling_own.py").write_text("pass\n")
    merge(str(world / "qwen-a"), base="q", weights="uniform", out="r")
    assert Path("r/modeling_own.py").exists()
    assert json.loads(Path("r/merge_report.json").read_text())["path"] == "r"


def test_side_files_of_a_base_that_is_a_file_are_the_first_folders(world):
    save("base.safetensors", load(world / "gpt2-base"), "BF16")
    merge(str(world / "gpt2-a"), weights="uniform", out="x")
    assert transformers.AutoModelForCausalLM.from_pretrained("x").dtype == torch.bfloat16
    merge(str(world / "gpt2-a"), weights="uniform", out="x", dtype="F16")
    assert transformers.AutoModelForCausalLM.from_pretrained("x").dtype == torch.float16


def test_the_parts_of_a_model_get_the_dtype_too(world):
    shard("base", load(world / "gpt2-base"), [list(load(world / "gpt2-base"))])
    config = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "heads": 2},
    }
    Path("base/config.json").write_text(json.dumps(config))
    merge(str(world / "gpt2-a"), base="base", weights="uniform", out="x", dtype="BF16")
    config["dtype"] = config["text_config"]["torch_dtype"] = "bfloat16"
    assert json.loads(Path("x/config.json").read_text()) == config


def test_force_does_not_take_away_a_folder_that_is_no_model(world):
    Path("papers").mkdir()
    Path("papers/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"'papers' is a folder without a model"):
        merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="papers")
    assert Path("papers/thesis.tex").read_text() == "years of work"
    Path("empty").mkdir()
    merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="empty")


# Ties, buffers, missing tensors, vocabularies

TIED = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.weight": (4, 4)}
HEAD = "lm_head.weight"


def test_a_head_tied_in_a_task_and_not_in_the_base_takes_the_embedding():
    base = model(
        "base", 0, mean=tiny.arrays(0, TIED | {HEAD: (6, 4)}), precision=tiny.precisions(0, TIED | {HEAD: (6, 4)})
    )
    a = model("a", 1, mean=tiny.arrays(1, TIED), precision=tiny.precisions(1, TIED))
    b = model("b", 2, mean=tiny.arrays(2, TIED), precision=tiny.precisions(2, TIED))
    report = merge("a", "b")
    full = [
        ({**m, HEAD: m["model.embed_tokens.weight"]}, {**p, HEAD: p["model.embed_tokens.weight"]}) for m, p in (a, b)
    ]
    mean, precision = expect(base, full, (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), precision)
    tie = "'{}.safetensors' ties it to 'model.embed_tokens.weight'"
    assert report.ruled == {HEAD: f"{tie.format('a')}; {tie.format('b')}"}


def test_a_head_of_a_tasks_own_is_refused_where_the_base_ties_it_and_dropped_where_asked():
    base = model("base", 0, mean=tiny.arrays(0, TIED), precision=tiny.precisions(0, TIED))
    own = TIED | {HEAD: (6, 4)}
    a = model("a", 1, mean=tiny.arrays(1, own), precision=tiny.precisions(1, own))
    own_head = r"'base\.safetensors' ties it to 'model.embed_tokens.weight', 'a\.safetensors' has one of its own\. "
    with pytest.raises(MismatchError, match=own_head + "--on-missing base leaves"):
        merge("a")
    mean, precision = expect(base, [a], (1,))
    for rule in ("base", "skip"):
        report = merge("a", on_missing=rule)
        assert report.left_out == {HEAD: "only 'a.safetensors' has it"}
        close(load("x.safetensors"), mean)
        close(load("x.precision.safetensors"), precision)
    tied = tiny.arrays(1, TIED)
    model("a", 1, mean=tied | {HEAD: tied["model.embed_tokens.weight"].copy()}, precision=tiny.precisions(1, TIED))
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
    merge(str(world / "qwen-a"), base="tied", weights="uniform", out="y", on_missing="base")
    loaded = CLASSES["qwen"].from_pretrained("y")
    np.testing.assert_array_equal(loaded.lm_head.weight.detach(), loaded.model.embed_tokens.weight.detach())


def test_buffers_and_integers_are_the_bases_whatever_the_tasks_hold():
    base = {n: torch.as_tensor(a) for n, a in tiny.arrays(0, SHAPES).items()}
    kept = {
        "h.0.attn.bias": torch.ones(1, 1, 3, 3), "rotary.inv_freq": torch.rand(4), "ids": torch.arange(5),
        "steps": torch.tensor(7, dtype=torch.int32), "mask": torch.tensor([True, False]),
        "bytes": torch.arange(3).to(torch.uint8),
    }  # fmt: skip
    save_file(base | kept, "base.safetensors")
    other = {"rotary.inv_freq": torch.zeros(4), "ids": torch.zeros(9, dtype=torch.int64), "more": torch.arange(2)}
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
    with pytest.raises(MismatchError, match=r"'h\.0\.conv' is in 'base\.safetensors' but not in 'a\.safetensors'.*"
                                            r"--on-missing base .*--on-missing skip"):  # fmt: skip
        merge("a", "b")
    with pytest.raises(ConfigError, match="--on-missing base takes the base's values: name it with --base"):
        merge("a", "b", base=None, on_missing="base")
    report = merge("a", "b", on_missing="base")
    assert report.ruled == {"h.0.conv": "'a.safetensors' has none and counts as unchanged"}
    unchanged = ({**a[0], "h.0.conv": base[0]["h.0.conv"]}, {**a[1], "h.0.conv": np.zeros((3, 2, 2))})
    mean, precision = expect(base, (unchanged, b), (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), precision)
    sums = [sum(float(s.sum()) for s in p.values()) for _, p in (base, a, b)]
    assert [m.ratio for m in report.models[1:]] == pytest.approx([s / sums[0] for s in sums[1:]], rel=1e-5)
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
    unchanged = ({**a[0], "h.0.conv": base[0]["h.0.conv"]}, {**a[1], "h.0.conv": np.zeros((3, 2, 2))})
    tasks = [(m, {n: np.full(SHAPES[n], s.mean()) if pool else s for n, s in p.items()}) for m, p in (unchanged, b)]
    mean, precision = expect(base, tasks, (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), precision)


def test_an_extra_tensor_is_an_error_or_left_out():
    base = model("base", 0)
    more = SHAPES | {"h.1.conv": (2, 2), "h.1.bias": (2,)}
    a = model("a", 1, mean=tiny.arrays(1, more), precision=tiny.precisions(1, more))
    with pytest.raises(MismatchError, match=r"'h\.1\.bias' \(2 such\) is in 'a\.safetensors'.*--on-missing base"):
        merge("a")
    for rule in ("base", "skip"):
        assert merge("a", on_missing=rule).left_out == dict.fromkeys(
            ("h.1.conv", "h.1.bias"), "only 'a.safetensors' has it"
        )
        close(load("x.safetensors"), expect(base, [a], (1,))[0])
    # Without a base the first model's names are written, and only skipping is left.
    with pytest.raises(MismatchError, match="--on-missing skip leaves it out"):
        merge("base", "a", base=None, weights="uniform")
    assert set(load(merge("a", "base", base=None, weights="uniform", on_missing="skip").path)) == set(SHAPES)


@pytest.mark.parametrize("longer", [5, 9])
def test_vocabularies_of_different_length_follow_the_rule(longer):
    names = ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.w"]
    own = {names[0]: (7, 4), names[1]: (7, 4), names[2]: (7,), names[3]: (3, 3)}
    theirs = own | {names[0]: (longer, 4), names[1]: (longer, 4), names[2]: (longer,)}
    base, b = (
        model(n, i, mean=tiny.arrays(i, own), precision=tiny.precisions(i, own)) for n, i in (("base", 0), ("b", 2))
    )
    a = model("a", 1, mean=tiny.arrays(1, theirs), precision=tiny.precisions(1, theirs))
    with pytest.raises(
        MismatchError, match=rf"is \[7\] in 'base.*\[{longer}\] in 'a\.s.*--vocab common .*--vocab base"
    ):
        merge("a", "b")
    report = merge("a", "b", vocab="base")
    assert set(report.copied) == set(names[:3])
    assert f"vocabularies differ (7, {longer}, 7 rows); --vocab base" in report.copied[names[0]]
    found, kept = load("x.safetensors"), load("x.precision.safetensors")
    for name in names[:3]:
        np.testing.assert_array_equal(found[name], base[0][name])
        np.testing.assert_allclose(kept[name], base[1][name], rtol=1e-6)
    report = merge("a", "b", vocab="common")
    assert set(report.ruled) == set(names[:3])
    assert (f"{longer} of 7 rows are merged, the others are 'base.safetensors''s own" if longer < 7 else
            f"the first 7 rows of {longer} are merged") in report.ruled[names[0]]  # fmt: skip
    rows = min(7, longer)
    cut = [
        tuple({n: x if n == "model.w" else x[:rows] for n, x in side.items()} for side in post) for post in (base, a, b)
    ]
    mean, precision = expect(cut[0], cut[1:], (1, 1))
    found, kept = load("x.safetensors"), load("x.precision.safetensors")
    close({n: x if n == "model.w" else x[:rows] for n, x in found.items()}, mean)
    close({n: x if n == "model.w" else x[:rows] for n, x in kept.items()}, precision)
    for name in names[:3]:
        np.testing.assert_array_equal(found[name][rows:], base[0][name][rows:])
        np.testing.assert_allclose(kept[name][rows:], base[1][name][rows:], rtol=1e-6)
        assert found[name].shape == own[name]


def test_only_vocabularies_may_differ_in_length():
    model("base", 0)
    theirs = SHAPES | {"h.0.attn.weight": (3, 5)}
    model("a", 1, mean=tiny.arrays(1, theirs), precision=tiny.precisions(1, theirs))
    for rule in ("error", "common", "base"):
        with pytest.raises(MismatchError, match=r"'h\.0\.attn\.weight' is \[4, 5\] in .* but \[3, 5\] .*architecture"):
            merge("a", vocab=rule)


def test_the_plan_lists_what_the_rules_decide_before_anything_is_written():
    lacking = {n: s for n, s in SHAPES.items() if n != "h.0.conv"} | {"wte.weight": (5, 4), "extra": (2,)}
    model("base", 0)
    model("a", 1, mean=tiny.arrays(1, lacking), precision=tiny.precisions(1, lacking))
    config = MergeConfig(models=("a.safetensors",), base="base.safetensors", weights="precision", vocab="common",
                         on_missing="base", out="x.safetensors")  # fmt: skip
    plan = plan_merge(config)
    plan.close()
    assert (set(plan.mended), set(plan.left_out)) == ({"h.0.conv", "wte.weight"}, {"extra"})
    assert not Path("x.safetensors").exists()
    report = run_merge(config)
    assert (report.ruled, report.left_out) == (plan.mended, plan.left_out)


# Part of a model, and recipes


def test_scales_by_tensor_reach_the_arithmetic_and_later_ones_win():
    base, a, b = (model(n, i) for i, n in enumerate(("base", "a", "b")))
    rules = ("a.safetensors:h=0.5", r"a.safetensors:attn|^wte=0.25", "b.safetensors:h\\.0\\.(attn|ln)=0")
    report = merge("a", "b", scale=(1.0, *rules, 0.8))
    found, kept = load("x.safetensors"), load("x.precision.safetensors")
    scales = {"wte.weight": (0.25, 0.8), "h.0.attn.weight": (0.25, 0), "h.0.ln.bias": (0.5, 0),
              "h.0.scalar": (0.5, 0.8), "h.0.conv": (0.5, 0.8)}  # fmt: skip
    for name, own in scales.items():
        mean, precision = (x[name] for x in expect(base, (a, b), own))
        np.testing.assert_allclose(found[name], mean, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(kept[name], precision, rtol=2e-5)
    assert list(report.settings["scale"]) == [1.0, *rules, 0.8]
    assert open_posterior("x.safetensors").info.merge.uneven


def test_a_model_whose_path_holds_a_colon_or_an_equals_sign_can_be_scaled():
    model("base", 0)
    for name in ("v=1", "v:2"):
        model(name, 1)
        report = merge(name, weights="uniform", scale=(0.0, rf"{name}.safetensors:attn(?:=|\.)=0.5"))
        assert report.copied == dict.fromkeys(set(SHAPES) - {"h.0.attn.weight"}, "all scales are zero")
        found, base, a = load("x.safetensors"), load("base.safetensors"), load(f"{name}.safetensors")
        np.testing.assert_allclose(found[AT[0]], base[AT[0]] / 2 + a[AT[0]] / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{"only": "attn"}, {"scale": (0.0, "a.safetensors:attn=0.5")}], ids=str)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_what_nothing_matches_stays_byte_equal_to_the_base(dtype, settings):
    mean = tiny.arrays(0, SHAPES)
    mean["wte.weight"][0] = [-0.0, 0.0, 1e-7, -1e-7]
    model("base", 0, mean=mean, dtype=dtype)
    model("a", 1)
    for weights in ("uniform", "precision"):
        merge("a", weights=weights, **settings)
        one, other = load_file("x.safetensors"), load_file("base.safetensors")
        for name in SHAPES:
            same = torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
            assert same == (name != "h.0.attn.weight")


def test_patterns_that_match_nothing_or_cannot_be_read_are_errors():
    model("base", 0)
    model("a", 1)
    for scale, match in (
        ("a.safetensors:mlp=0.5", r"--scale 'a\.safetensors:mlp=0\.5' matches no tensor"),
        ("a.safetensors:attn=much", "'much' is not a number"),
        ("a.safetensors:(=1", "is no regular expression"),
        ("c.safetensors:attn=1", "expected a number, or MODEL:REGEX=X with a model as given: a.safetensors"),
        ("a.safetensors:attn=inf", "must be finite"),
    ):
        with pytest.raises(ConfigError, match=match):
            merge("a", scale=(1.0, scale))
    with pytest.raises(ConfigError, match=r"--only 'mlp' matches no tensor"):
        merge("a", only="mlp")


def test_a_tensor_without_a_share_of_any_model_is_refused():
    model("a", 0)
    model("b", 1)
    rules = ("a.safetensors:attn=0", "b.safetensors:attn=0")
    with pytest.raises(ConfigError, match=r"leaves 'h\.0\.attn\.weight' without a share"):
        merge("a", "b", base=None, weights="uniform", scale=rules)
    merge("a", "b", base=None, weights="uniform", scale=rules[:1])
    np.testing.assert_allclose(load("x.safetensors")[AT[0]], load("b.safetensors")[AT[0]], rtol=1e-5)


def run(*args):
    return CliRunner().invoke(app, ["merge", *args])


def test_a_recipe_gives_the_same_bytes_again_and_flags_beat_it(world):
    for name in ("base", "a", "b"):
        Path(name).symlink_to(world / f"qwen-{name}")
    flags = ["--weights", "precision", "--scale", "0.7", "--scale", "b:mlp=-0.25", "--shrink", "row:0.3",
             "--dtype", "bf16", "--observations", "a=3x", "--max-shard-size", "600",
             "--only", "layers|lm_head"]  # fmt: skip
    assert run("a", "b", "--base", "base", *flags, "-o", "one").exit_code == 0
    done = run("one/merge_recipe.yaml", "-o", "two")
    assert done.exit_code == 0, done.stderr
    files = [p.relative_to("one") for p in Path("one").rglob("*") if p.suffix in (".safetensors", ".yaml", ".json")]
    assert len([f for f in files if f.suffix == ".safetensors"]) > 4
    for file in files:
        if file.name != "merge_report.json":
            assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file
    recipe = yaml.safe_load(Path("one/merge_recipe.yaml").read_text())
    assert recipe["scale"] == [0.7, "b:mlp=-0.25"]
    assert "out" not in recipe
    assert run("one/merge_recipe.yaml", "--dtype", "F32", "--scale", "0.2", "-o", "three").exit_code == 0
    changed = json.loads(Path("three/merge_report.json").read_text())["settings"]
    assert (changed["dtype"], changed["scale"], changed["shrink"]) == ("F32", [0.2], "row:0.3")


def test_a_recipe_names_its_mistakes():
    model("base", 0)
    model("a", 1)
    Path("r.yaml").write_text("models: [a.safetensors]\nbase: base.safetensors\nwieghts: precision\nscale: [1]\n")
    done = run("r.yaml", "-o", "x.safetensors")
    assert done.exit_code == 2
    assert "r.yaml" in done.stderr
    assert "wieghts: unknown key; did you mean 'weights'?" in done.stderr
    Path("r.yaml").write_text("models: [a.safetensors]\nbase: base.safetensors\nscale: [1, 'a.safetensors:ln=0']\n")
    assert run("r.yaml", "-o", "x.safetensors").exit_code == 0
    both = run("r.yaml", "a.safetensors")
    assert both.exit_code == 2
    assert "names its own models" in both.stderr


def test_a_recipe_pins_hub_ids_and_gives_the_same_bytes(monkeypatch):
    """A Hub cache as huggingface_hub lays it out, read offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for i, name in enumerate(("base", "a")):
        repo = Path("hub") / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        model("model", i)
        folder = repo / "snapshots" / commit
        (folder / "posterior").mkdir(parents=True)
        Path("model.safetensors").rename(folder / "model.safetensors")
        Path("model.precision.safetensors").rename(folder / "posterior" / "precision.safetensors")
    report = run_merge(MergeConfig(models=("org/a",), base="org/base", weights="precision", out="one",
                                   scale=("org/a:attn=0.5",), observations={"org/a": "2x"}))  # fmt: skip
    assert [m.commit for m in report.models] == [commit, commit]
    recipe = yaml.safe_load(Path("one/merge_recipe.yaml").read_text())
    assert (recipe["models"], recipe["base"]) == ([f"org/a@{commit}"], f"org/base@{commit}")
    assert recipe["scale"] == [f"org/a@{commit}:attn=0.5"]
    assert recipe["observations"] == {f"org/a@{commit}": "2x"}
    assert run("one/merge_recipe.yaml", "-o", "two").exit_code == 0
    for file in ("model.safetensors", "posterior/precision.safetensors", "merge_recipe.yaml"):
        assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file


# Frozen tensors and adapters


def frozen(name, base, seed, learnt, *, dtype="F32", prefix=""):
    """A fine-tune of `base` (its arrays) in which only the tensors `learnt` moved, and only they have a precision."""
    moved = {n: x + tiny.arrays(seed, SHAPES)[n] * (n in learnt) for n, x in base.items()}
    kept = {prefix + n: p for n, p in tiny.precisions(seed, SHAPES).items() if n in learnt}
    mean, stored = model(name, seed, mean={prefix + n: x for n, x in moved.items()}, precision=kept, dtype=dtype)
    stored = {n: stored.get(prefix + n, np.zeros(())) for n in base}
    return {n: mean[prefix + n] for n in base}, stored


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("settings", [{}, {"shrink": "0.3"}, {"pool": "row"}], ids=str)
def test_a_tensor_without_a_precision_that_did_not_move_counts_as_unchanged(settings, prefix):
    base = model("base", 0, dtype="BF16")
    a = frozen("a", base[0], 1, ["h.0.attn.weight"], prefix=prefix)
    b = frozen("b", base[0], 2, ["h.0.attn.weight", "wte.weight"], dtype="F64")
    report = merge("a", "b", **settings, dtype="F32")

    def change(s, shape):
        s = np.broadcast_to(s, shape)
        if "pool" in settings:
            return np.broadcast_to(s.mean(axis=tuple(range(1, s.ndim)), keepdims=True), shape) if s.ndim > 1 else s
        return s + float(settings.get("shrink", 0)) * s.mean()

    each = [(m, {n: change(s, SHAPES[n]) for n, s in p.items()}) for m, p in (base, a, b)]
    mean, precision = expect(each[0], each[1:], (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.precision.safetensors"), precision)
    assert report.copied == dict.fromkeys(("h.0.ln.bias", "h.0.scalar", "h.0.conv"), "no task changed it")
    merged = ("h.0.attn.weight", "wte.weight")
    sums = [sum(np.sum(p[n]) for n in merged) for _, p in each]
    assert [m.ratio for m in report.models[1:]] == pytest.approx([s / sums[0] for s in sums[1:]], rel=1e-4)


def test_a_tensor_that_moved_without_a_precision_is_refused():
    base = model("base", 0)
    mean = tiny.arrays(0, SHAPES)
    mean["h.0.conv"][0, 0, 0] += 1
    precision = {n: p for n, p in tiny.precisions(1, SHAPES).items() if n != "h.0.conv"}
    model("a", 1, mean=mean, precision=precision)
    with pytest.raises(PrecisionError, match=r"no precision for 'h\.0\.conv' of 'a\.safetensors'.*--only"):
        merge("a")
    model("b", 2, mean=base[0], precision={n: 0 * p for n, p in precision.items()})
    with pytest.raises(PrecisionError, match="is zero everywhere"):
        merge("b")


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def lora(folder, base, seed, modules, rank, alpha, observations):
    """An adapter as PEFT writes it with a posterior; the changes and their precision for 100 observations, exact."""
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
        result[f"{module}.weight"] = (lora_twin.change(pair["A"], pair["B"], scaling), 1 / (spread + 1e-20))
    path = Path(folder)
    save(path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    source = SafetensorsSource(checkpoint_files(path))
    info = PosteriorInfo(estimator="ggn", unit="token", observations=observations, ess=observations,
                         mean=identify(source))  # fmt: skip
    source.close()
    save_posterior(path, kept, info, force=True)
    return result


@pytest.fixture
def adapters(world):
    """Two adapters of different rank and layers, from 50 and 400 observations, on a base with 100."""
    Path("base").symlink_to(world / "qwen-base")
    base = opened("base")
    changes = lora("a", base[0], 1, [Q], 2, 3, 50.0), lora("b", base[0], 2, [Q, DOWN], 3, 5, 400.0)
    tasks = [
        ({n: x + c[n][0] if n in c else x for n, x in base[0].items()}, {n: c[n][1] if n in c else 0 for n in base[0]})
        for c in changes
    ]
    return base, tasks


def test_adapters_on_their_base_merge_like_the_folded_models(adapters):
    base, tasks = adapters
    for names, folded, scales in ((["a"], tasks[:1], (0.8,)), (["a", "b"], tasks, (0.8, -0.3))):
        merge(*(f"base+{n}" for n in names), weights="uniform", out="x", scale=scales)
        exact = {
            n: m0 + sum(s * (m[n] - m0) for s, (m, _) in zip(scales, folded, strict=True)) for n, m0 in base[0].items()
        }
        close(load("x"), exact, rtol=1e-5, atol=1e-6)
    CLASSES["qwen"].from_pretrained("x")
    merge("base+a", "base+b", base=None, weights="uniform", out="x")
    close(load("x"), {n: (x + tasks[1][0][n]) / 2 for n, x in tasks[0][0].items()}, rtol=1e-5, atol=1e-6)


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
    # Twice the count is half the variance of either factor; a count of its own is what its author saw.
    for settings, counts in (
        ({"observations": {"base+a": "2x"}}, [100, 200, 100]),
        ({"observations": {"base+a": "70"}}, [100, 70, 100]),
        ({"counts": "recorded"}, [100, 50, 400]),
    ):
        report = merge("base+a", "base+b", out="y", **settings)
        assert [m.count for m in report.models] == counts
        again = [lora(n, base[0], i + 1, m, r, s, o * 100 / c) for i, (n, m, r, s, o, c) in enumerate(
            zip(("c", "d"), ([Q], [Q, DOWN]), (2, 3), (3, 5), (50.0, 400.0), counts[1:], strict=True))]  # fmt: skip
        weighed = [(m, {n: c[n][1] if n in c else 0 for n in base[0]}) for (m, _), c in zip(tasks, again, strict=True)]
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
    assert merge("ab", "base+b", scale=(1.0, -1.0), observations={"base+b": "2x"}, out="z").guard == 0.2


def test_an_adapter_of_another_estimator_does_not_add_to_the_bases(adapters):
    stored = load_file("a/posterior/precision.safetensors")
    source = SafetensorsSource([Path("a/adapter_model.safetensors")])
    info = PosteriorInfo(estimator="ivon", unit="token", observations=50, ess=50, mean=identify(source))
    source.close()
    save_file(stored, "a/posterior/precision.safetensors", info.to_metadata())
    with pytest.raises(PrecisionError, match=r"different kinds .*'base\+a' (has )?ivon per token"):
        merge("base+a", out="x")


def test_an_output_never_takes_the_place_of_an_input(adapters):
    Path("nested").mkdir()
    Path("a").rename("nested/a")
    model("m", 0)
    save("far/precision.safetensors", load("base.safetensors") if Path("base.safetensors").exists() else load("base"))
    for settings, out in (
        ({}, "nested/a"), ({}, "nested"), ({}, "base"), ({"base": "base/model.safetensors"}, "base/model.safetensors"),
        ({"precision": {"base+nested/a": "nested/a"}, "weights": "precision"}, "nested/a/posterior"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="would overwrite"):
            merge("base+nested/a", **({"weights": "uniform"} | settings), out=out)
        assert Path("nested/a/adapter_model.safetensors").exists()
        assert Path("base/model.safetensors").exists()


# The report


def test_the_report_says_who_went_in_and_how():
    for i, name in enumerate(("base", "a", "b")):
        model(name, i)
    table = {
        ("uniform", None): "m = sum_t scale_t m_t / sum_t scale_t",
        ("uniform", "base"): "m = m0 + sum_t scale_t (m_t - m0)",
        ("precision", None): "sum_t scale_t S_t m_t",
        ("precision", "base"): "m = m0 + sum_t scale_t S_t (m_t - m0) / S",
    }
    for (weights, base), formula in table.items():
        report = merge("a", "b", weights=weights, base=base, scale=(0.5, 2.0))
        assert formula in report.formula
        refs = [*([base] if base else []), "a", "b"]
        assert [(m.ref, m.role, m.scale) for m in report.models] == [
            (f"{r}.safetensors", "base" if r == "base" else "task", {"a": 0.5, "b": 2.0}.get(r)) for r in refs
        ]
        for ref, found in zip(refs, report.models, strict=True):
            source = SafetensorsSource([Path(f"{ref}.safetensors")])
            assert found.identity == identify(source).blocks
            source.close()
        assert json.loads(Path("x.merge_report.json").read_text()) == report.model_dump(mode="json")


@pytest.mark.parametrize("out", ["BF16", "F16", "F8_E4M3", "F32"])
@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_changed_and_lost_entries_equal_a_count_of_all(out, weights):
    shapes = {"w": (40, 30), "v": (50,)}
    base = {n: torch.as_tensor(x).to(TORCH[out]).double().numpy() for n, x in tiny.arrays(0, shapes).items()}
    rng = np.random.default_rng(3)
    edit = {n: x * 10.0 ** rng.uniform(-5, 0, x.shape) * (rng.random(x.shape) < 0.6) for n, x in base.items()}
    model("base", 0, mean=base, precision=tiny.precisions(0, shapes), dtype=out)
    model("a", 1, mean={n: x + edit[n] for n, x in base.items()}, precision=tiny.precisions(1, shapes), dtype="F32")
    report = merge("a", weights=weights, scale=(0.5,))
    before, after, found = load("base.safetensors"), load("a.safetensors"), load("x.safetensors")
    changed = sum(np.count_nonzero(after[n] != before[n]) for n in shapes)
    lost = sum(np.count_nonzero((after[n] != before[n]) & (found[n] == before[n])) for n in shapes)
    assert report.changed_share == pytest.approx(changed / 1250)
    assert report.lost_share == pytest.approx(lost / changed)
    assert (lost > 100) == (out != "F32")
    assert any("undoing it later is exact in F32 only" in n for n in report.notes) == (out != "F32")


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_a_ratio_that_smells_of_a_unit_is_noted(unit):
    base = model("base", 0)
    a = model("a", 1, precision={n: unit * p for n, p in tiny.precisions(1, SHAPES).items()})
    report = merge("a")
    ratio = sum(p.sum() for p in a[1].values()) / sum(p.sum() for p in base[1].values())
    assert report.models[1].ratio == pytest.approx(ratio, rel=1e-5)
    assert any("check the units" in n for n in report.notes) == (unit != 1)


def test_a_precision_of_the_wrong_shape_is_named_also_where_it_is_only_copied():
    wrong = tiny.precisions(0, SHAPES) | {"h.0.attn.weight": np.ones((5, 4), np.float32)}
    model("base", 0, precision=wrong)
    model("a", 1)
    for only in (None, "wte"):
        with pytest.raises(
            PrecisionError, match=r"'h\.0\.attn\.weight' in base\.precision.*\[5, 4\], expected F32 or BF"
        ):
            merge("a", only=only)


QUANTISED = {
    "GPTQ": {"h.0.attn.qweight": np.int32([[1, 2]]), "h.0.attn.scales": np.float16([1])},
    "bitsandbytes": {"h.0.attn.weight": np.uint8([[1], [2]]), "h.0.attn.weight.absmax": np.float32([1])},
    "int8": {"h.0.attn.weight": np.int8([[1, 2]]), "h.0.attn.SCB": np.float32([1])},
    "MXFP4": {"h.0.mlp.experts.up_proj_blocks": np.uint8([[1]]), "h.0.mlp.experts.up_proj_scales": np.uint8([[1]])},
    "float 8": {"h.0.attn.weight": np.float32([[1, 2]]), "h.0.attn.weight_scale_inv": np.float32([1])},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind):
    for name in ("base", "a"):
        save_file({n: torch.from_numpy(t) for n, t in QUANTISED[kind].items()}, f"{name}.safetensors")
    with pytest.raises(MismatchError, match=r"'base\.safetensors' is quantised|of 'base\.safetensors' is quantised"):
        merge("a", weights="uniform")


def test_a_config_that_says_quantised_is_believed(world):
    shard("base", load(world / "gpt2-base"), [list(load(world / "gpt2-base"))])
    Path("base/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(MismatchError, match="quantization_config"):
        merge(str(world / "gpt2-a"), base="base", weights="uniform")


def test_heads_may_differ_where_they_are_not_merged():
    head = {"score.weight": np.float32([[1, 2], [3, 4]])}
    model("base", 0, mean=tiny.arrays(0, SHAPES) | head, precision=tiny.precisions(0, SHAPES) | head)
    model("a", 1, mean=tiny.arrays(1, SHAPES) | head, precision=tiny.precisions(1, SHAPES) | head)
    other = {"score.weight": np.float32([[1, 2], [3, 4], [5, 6]]), "pooler.weight": np.float32([[1]])}
    model("b", 2, mean=tiny.arrays(2, SHAPES) | other, precision=tiny.precisions(2, SHAPES) | other)
    with pytest.raises(MismatchError, match=r"'pooler\.weight'"):
        merge("a", "b", weights="uniform")
    for weights in ("uniform", "precision"):
        report = merge("a", "b", weights=weights, only=r"^h\.|wte")
        assert report.left_out["pooler.weight"] == "only 'b.safetensors' has it"
        np.testing.assert_array_equal(load("x.safetensors")["score.weight"], head["score.weight"])
        merge("a", "b", weights=weights, on_missing="base", scale=("b.safetensors:score=0",))
        np.testing.assert_allclose(load("x.safetensors")["score.weight"], head["score.weight"], rtol=1e-6)
    with pytest.raises(MismatchError, match=r"'score\.weight' is \[2, 2\].*--only chooses"):
        merge("a", "b", weights="uniform", on_missing="base")


def test_a_rule_for_a_model_that_is_named_twice_is_for_both():
    base, a = model("base", 0), model("a", 1)
    merge("a", "a", weights="uniform", scale=("a.safetensors:.=0.25",))
    for name, m0 in base[0].items():
        np.testing.assert_allclose(load("x.safetensors")[name], m0 + 0.5 * (a[0][name] - m0), rtol=1e-5, atol=1e-6)


def test_a_recipe_notices_that_a_precision_changed():
    model("base", 0)
    model("a", 1)
    line = ("a.safetensors", "--base", "base.safetensors", "--weights", "precision")
    assert run(*line, "-o", "x.safetensors").exit_code == 0
    model("a", 1, precision=tiny.precisions(5, SHAPES))
    done = run("x.merge_recipe.yaml", "-o", "y.safetensors")
    assert done.exit_code == 2
    assert "the precision of 'a.safetensors' is not what the recipe was made with" in " ".join(done.stderr.split())


@pytest.mark.parametrize("out", [".", "..", "x\0y"])
def test_an_output_without_a_name_is_refused(out):
    model("base", 0)
    model("a", 1)
    with pytest.raises(ConfigError, match="name a new folder"):
        merge("a", weights="uniform", out=out)


def test_the_folder_that_a_link_points_to_is_replaced_and_the_link_stays(world):
    Path("real").mkdir()
    Path("link").symlink_to(Path("real").absolute())
    merge(str(world / "gpt2-a"), base=str(world / "gpt2-base"), weights="uniform", out="link")
    merge(str(world / "gpt2-a"), base=str(world / "gpt2-base"), weights="uniform", out="link")
    assert Path("link").is_symlink()
    assert Path("real/model.safetensors").exists()


def test_a_recipe_in_another_encoding_is_refused():
    Path("r.yaml").write_bytes("models: [ä]".encode("latin-1"))
    done = run("r.yaml")
    assert (done.exit_code, "is not UTF-8" in " ".join(done.stderr.split())) == (2, True)


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "output.weight",
    "transformer.output_layer.weight", "proj_out.weight", "backbone.embeddings.weight", "generator_lm_head.weight",
    "cls.predictions.bias", "cls.predictions.decoder.weight", "lm_head.decoder.weight",
])  # fmt: skip
def test_embeddings_and_heads_of_the_field_are_known(name):
    assert is_vocabulary(name)


@pytest.mark.parametrize("name", [
    "model.decoder.weight", "encoder.layer.0.output.weight", "h.0.mlp.proj_out.bias.x", "embeddings.LayerNorm.weight",
    "bert.embeddings.position_embeddings.weight",
])  # fmt: skip
def test_other_tensors_are_no_vocabularies(name):
    assert not is_vocabulary(name)
