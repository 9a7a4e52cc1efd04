"""An adapted base has the tensors that PEFT merges and the precision of its products."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import transformers

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.lora import is_adapter, open_adapted, open_adapter, open_model, split_ref
from mergekit_bayes.lora.dense import change, variance
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import Prior
from tests import tiny
from tests.adapters import BASE, LAYERS, adapter, base, factors, peft_adapter, precise
from tests.reference import lora as twin
from tests.tiny_models import tiny_bert, tiny_gpt2


def equals_merged(model, opened):
    """Every tensor of an adapted base is that of the model with the adapter merged in."""
    merged = {n: t.detach().numpy() for n, t in model.merge_and_unload().state_dict().items()}
    assert set(opened.mean.specs) <= set(merged)
    for name in opened.mean.specs:
        np.testing.assert_allclose(
            read_tensor(opened.mean, name), merged[name], rtol=2e-6, atol=2e-6, err_msg=name
        )


def test_the_variance_of_a_product_is_that_of_the_worked_example():
    pair = Factors(np.float32([[3, 0.5]]), np.float32([[1], [-2]]))
    spread = Factors(np.float32([[0.05, 0.4]]), np.float32([[0.1], [0.2]]))
    np.testing.assert_array_equal(change(pair, 2.0).entries(0, 4), [6, 1, -12, -2])
    found = variance(pair, spread, 2.0).entries(0, 4)
    np.testing.assert_allclose(found, [3.82, 1.86, 8.04, 6.92], rtol=1e-6)
    transposed = variance(pair, spread, 2.0, transposed=True).entries(0, 4)
    np.testing.assert_array_equal(transposed.reshape(2, 2), found.reshape(2, 2).T)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_proj"], "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"c_fc": 2},
            "alpha_pattern": {r"h.1.attn.c_attn": 5},
            "fan_in_fan_out": True,
        },
    ],
)
def test_an_adapted_gpt2_is_what_peft_merges(tmp_path, config):
    folder = tiny_gpt2(tmp_path / "base")
    model = peft_adapter(tmp_path / "a", folder, task_type="CAUSAL_LM", **config)
    with open_adapted(f"{folder}+{tmp_path / 'a'}") as opened:
        assert opened.precision is None
        assert {s.dtype for s in opened.mean.specs.values()} == {"F32"}
        equals_merged(model, opened)


def test_an_adapted_classifier_is_what_peft_merges_and_has_its_head(tmp_path):
    folder = tiny_bert(tmp_path / "base")
    kind = transformers.AutoModelForSequenceClassification
    model = peft_adapter(
        tmp_path / "a",
        folder,
        kind=kind,
        r=2,
        lora_alpha=3,
        target_modules=["query", "dense"],
        task_type="SEQ_CLS",
    )
    with open_adapted(f"{folder}+{tmp_path / 'a'}") as opened:
        head = read_tensor(opened.mean, "classifier.weight")
        assert not np.array_equal(head, tiny.read(folder)["classifier.weight"])
        equals_merged(model, opened)


def test_names_may_differ_by_a_prefix(tmp_path):
    folder = tiny_gpt2(tmp_path / "base")
    model = peft_adapter(
        tmp_path / "a", folder, r=2, target_modules=["c_attn"], fan_in_fan_out=True
    )
    bare = {n.removeprefix("transformer."): t for n, t in tiny.read(folder).items()}
    tiny.write(tmp_path / "hub" / "model.safetensors", bare)
    with open_adapted(f"{tmp_path / 'hub'}+{tmp_path / 'a'}") as opened:
        merged = model.merge_and_unload().state_dict()
        name = "h.1.attn.c_attn.weight"
        np.testing.assert_allclose(
            read_tensor(opened.mean, name), merged[f"transformer.{name}"].numpy(), atol=2e-6
        )


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_an_entry_has_the_same_bits_whatever_the_chunk(tmp_path, dtype):
    made = factors(0, rank=5)
    adapter(tmp_path / "a", made, alpha=7, precision=precise(made, 0))
    with open_adapted(f"{base(tmp_path / 'base', dtype)}+{tmp_path / 'a'}") as opened:
        rng = np.random.default_rng(1)
        for source in (opened.mean, opened.precision):
            for name, spec in source.specs.items():
                whole = np.empty(spec.nbytes, np.uint8)
                source.read_bytes(name, 0, whole.data)
                for _ in range(40):
                    start, stop = np.sort(rng.integers(0, spec.nbytes + 1, 2))
                    part = np.empty(stop - start, np.uint8)
                    source.read_bytes(name, int(start), part.data)
                    np.testing.assert_array_equal(part, whole[start:stop])


def test_wide_rows_and_many_rows_have_the_bits_of_single_entries():
    for rows, columns in ((3, 70_001), (70_001, 3)):
        rng = np.random.default_rng(0)
        pair = Factors(
            rng.normal(size=(3, columns)).astype("f4"), rng.normal(size=(rows, 3)).astype("f4")
        )
        made = change(pair, 0.7)
        whole = made.entries(0, rows * columns)
        for at in (*rng.integers(0, rows * columns, 50), rows * columns - 1):
            assert made.entries(at, at + 1) == whole[at]
        expected = twin.change(*pair, 0.7).reshape(-1)
        np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_threads_read_the_same_bits(tmp_path):
    adapter(tmp_path / "a", factors(0, rank=5))
    with open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}") as opened:
        expected = identity(opened.mean, full=True)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: identity(opened.mean, full=True), range(12))) == {
                expected
            }


def test_tensors_that_the_adapter_leaves_alone_keep_their_bytes_and_type(tmp_path):
    adapter(tmp_path / "a", factors(0, layers={"m.q": (6, 4)}))
    folder = base(tmp_path / "base", "BF16")
    ref = f"{folder}+{tmp_path / 'a'}"
    with open_adapted(ref) as opened, SafetensorsSource(checkpoint_files(folder)) as plain:
        for name, spec in plain.specs.items():
            assert opened.mean.specs[name] == (
                TensorSpec("F32", spec.shape) if name == "m.q.weight" else spec
            )
            assert opened.mean.file_of(name) == 0
            if name != "m.q.weight":
                actual, stored = np.empty(spec.nbytes, np.uint8), np.empty(spec.nbytes, np.uint8)
                opened.mean.read_bytes(name, 0, actual.data)
                plain.read_bytes(name, 0, stored.data)
                np.testing.assert_array_equal(actual, stored)
        assert opened.mean.files == plain.files


def test_the_precision_of_an_adapted_base_follows_from_the_moments_of_its_factors(tmp_path):
    made = factors(0)
    stored = precise(made, 0)
    stored["m.wide"] = Factors(None, stored["m.wide"].b)  # A was frozen
    adapter(tmp_path / "a", made, alpha=3, precision=stored)
    with open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}") as opened:
        assert opened.info is None
        assert set(opened.precision.specs) == {f"{m}.weight" for m in LAYERS}
        for module, pair in made.items():
            a, b = stored[module]
            expected = 1 / twin.variance(
                *pair, np.zeros_like(pair.a) if a is None else 1 / a, 1 / b, 1.5
            )
            np.testing.assert_allclose(
                read_tensor(opened.precision, f"{module}.weight"), expected, rtol=1e-5
            )
    with open_adapted(opened.ref, with_precision=False) as uniform:
        assert not uniform.has_precision


def test_a_transposed_layer_has_the_transposed_precision(tmp_path):
    made = {"m.q": Factors(*(f for f in factors(0, layers={"m.q": (4, 6)})["m.q"]))}
    stored = precise(made, 0)
    adapter(tmp_path / "a", made, precision=stored)
    with open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}") as opened:
        expected = 1 / twin.variance(*made["m.q"], *(1 / s for s in stored["m.q"]), 1.5).T
        np.testing.assert_allclose(read_tensor(opened.precision, "m.q.weight"), expected, rtol=1e-5)


def test_square_layers_are_laid_out_as_the_others_and_else_as_the_config_says(tmp_path):
    folder = base(tmp_path / "base")
    plain = tiny.arrays(99, BASE)["m.k.weight"]
    for name, layers, flag, transposed in (
        ("flag", {"m.k": (4, 4)}, True, True),
        ("noflag", {"m.k": (4, 4)}, False, False),
        ("neighbour", {"m.k": (4, 4), "m.q": (4, 6)}, False, True),
    ):
        made = factors(0, layers=layers)
        adapter(tmp_path / name, made, fan_in_fan_out=flag)
        with open_adapted(f"{folder}+{tmp_path / name}") as opened:
            moved = twin.change(*made["m.k"], 1.5)
            np.testing.assert_allclose(
                read_tensor(opened.mean, "m.k.weight"),
                plain + (moved.T if transposed else moved),
                atol=1e-5,
            )
    adapter(tmp_path / "both", factors(0, layers={"m.k": (4, 4), "m.q": (4, 6), "m.wide": (3, 70)}))
    with pytest.raises(ConfigError, match=r"the square 'm\.k\.weight' may be either"):
        open_adapted(f"{folder}+{tmp_path / 'both'}")


def test_precisions_are_taken_for_the_recorded_observations_or_any_other_number(tmp_path):
    made = factors(0)
    stored = {m: Factors(*(4 * s + 8 for s in p)) for m, p in precise(made, 0).items()}
    adapter(
        tmp_path / "a",
        made,
        precision=stored,
        info={"observations": 100.0, "ess": 400.0, "prior": Prior(kind="isotropic", precision=8.0)},
    )
    with open_adapter(str(tmp_path / "a")) as opened:
        for count in (None, 300.0):
            for found, s in zip(
                opened.precisions(opened.layers["m.q"], count), stored["m.q"], strict=True
            ):
                np.testing.assert_allclose(found, (count or 100) / 400 * (s - 8) + 2, rtol=1e-6)


def test_entries_of_no_curvature_have_a_tiny_finite_precision(tmp_path):
    made = factors(0, layers={"m.q": (6, 4)})
    adapter(
        tmp_path / "a", made, precision={"m.q": Factors(*(np.zeros_like(f) for f in made["m.q"]))}
    )
    with open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}") as opened:
        found = read_tensor(opened.precision, "m.q.weight")
        assert np.isfinite(found).all()
        assert (found > 0).all()
        assert found.max() < 1e-20


def test_a_plus_in_an_existing_path_is_no_adapter(tmp_path):
    tiny.write(tmp_path / "a+b" / "model.safetensors", tiny.arrays(0))
    assert split_ref(str(tmp_path / "a+b")) is None
    with open_model(str(tmp_path / "a+b")) as opened:
        assert isinstance(opened.mean, SafetensorsSource)
    assert split_ref("org/base@main+org/adapter") == ("org/base@main", "org/adapter")
    (tmp_path / "x").mkdir()
    assert split_ref(f"{tmp_path}/a+b+{tmp_path}/x") == (f"{tmp_path}/a+b", f"{tmp_path}/x")
    with pytest.raises(CheckpointError, match=r"not BASE\+ADAPTER either: .*nowhere"):
        split_ref(f"{tmp_path}/x+{tmp_path}/nowhere")


def test_what_tells_an_adapter_from_a_model(tmp_path):
    adapter(tmp_path / "a", factors(0))
    assert is_adapter(tmp_path / "a")
    assert not is_adapter(base(tmp_path / "base"))


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rules_that_count_directions_do_not_count_those_of_rounding(tmp_path, method, dtype):
    """A change of rank 4 has no other direction, though `W + s B A` is rounded to float32."""
    shape, layers = {"m.q.weight": (80, 60)}, {"m.q": (80, 60)}
    weight = tiny.arrays(7, shape)["m.q.weight"]
    tiny.write(tmp_path / "base" / "model.safetensors", {"m.q.weight": weight}, dtype)
    weight = read(tmp_path / "base" / "model.safetensors")
    tiny.write(tmp_path / "exact" / "model.safetensors", {"m.q.weight": weight}, "F64")
    for seed, name in enumerate("ab"):
        made = {"m.q": Factors(*(x / 10 for x in factors(seed, 4, layers)["m.q"]))}
        adapter(tmp_path / name, made)
    changes = {}
    for name in ("base", "exact"):
        base_folder, out = tmp_path / name, tmp_path / f"{name}.safetensors"
        models = tuple(f"{base_folder}+{tmp_path / a}" for a in "ab")
        settings = {"base": str(base_folder), "method": method, "dtype": "F64"}
        run_merge(MergeConfig(models=models, out=str(out), **settings))
        changes[name] = read(out) - weight
    scale = np.linalg.norm(changes["exact"])
    assert scale > 0.1
    assert np.linalg.norm(changes["base"] - changes["exact"]) < 1e-4 * scale
    assert np.linalg.matrix_rank(changes["base"], tol=1e-5 * scale) == 8


def read(file):
    with SafetensorsSource([file]) as source:
        (name,) = source.specs
        return np.asarray(read_tensor(source, name), np.float64)
