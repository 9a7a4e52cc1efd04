"""Factors of one start merge exactly or with reported cross terms, and whole tensors by rule."""

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.lora import INITIAL_A, initial_identity, merge_adapters
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests import tiny
from tests.adapters import LAYERS, adapter, factors, precise, product
from tests.reference import lora as twin


def test_factors_that_share_one_are_merged_exactly(tmp_path):
    shared = factors(0)
    for name, seed in (("a", 1), ("b", 2)):
        made = factors(seed, same_a=shared)
        adapter(tmp_path / name, made, alpha=seed + 1, precision=precise(made, seed))
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", scales=(0.8, -0.5), space="factor")
    assert report.rank == 2
    assert "linear" in report.notes[0]
    for module in LAYERS:
        expected = 0.8 * product(refs[0], module) - 0.5 * product(refs[1], module)
        np.testing.assert_allclose(product(tmp_path / "out", module), expected, atol=1e-5)
    merge_adapters(refs, tmp_path / "weighted", weights="precision", space="factor")
    pairs = [factors(s, same_a=shared)["m.q"] for s in (1, 2)]
    spreads = [precise(factors(s, same_a=shared), s)["m.q"].b for s in (1, 2)]
    scalings = (1.0, 1.5)
    b = twin.weighted(
        [c * p.b for p, c in zip(pairs, scalings, strict=True)],
        [s / c**2 for s, c in zip(spreads, scalings, strict=True)],
        (1.0, 1.0),
    )
    np.testing.assert_allclose(product(tmp_path / "weighted", "m.q"), b @ pairs[0].a, atol=1e-5)


def test_a_layer_whose_only_adapter_has_scale_zero_is_not_changed(tmp_path):
    shared = factors(0)
    alone = {m: shape for m, shape in LAYERS.items() if m != "m.k"}
    for name, layers in (("a", alone), ("b", LAYERS)):
        made = factors(ord(name), layers=layers, same_a=shared)
        adapter(tmp_path / name, made, precision=precise(made, ord(name)))
    refs = [str(tmp_path / n) for n in "ab"]
    out = tmp_path / "out"
    merge_adapters(refs, out, scales=(1.0, 0.0), weights="precision", space="factor")
    assert not product(out, "m.k").any()
    np.testing.assert_allclose(product(out, "m.q"), product(refs[0], "m.q"), atol=1e-5)


def test_factors_of_different_starts_are_refused_with_the_numbers(tmp_path):
    made = [factors(s) for s in (1, 2)]
    for name, pair in zip("ab", made, strict=True):
        adapter(tmp_path / name, pair)
    with pytest.raises(MismatchError) as caught:
        merge_adapters([str(tmp_path / n) for n in "ab"], tmp_path / "out", space="factor")
    assert not (tmp_path / "out").exists()
    apart = max(
        np.linalg.norm(made[0][m].a - made[1][m].a) / np.linalg.norm(made[0][m].a) for m in LAYERS
    )
    errors = []
    for m in LAYERS:
        average = sum(f[m].b for f in made) @ sum(f[m].a for f in made) / 4
        exact = sum(f[m].b @ f[m].a for f in made) / 2
        errors.append(np.linalg.norm(average - exact) / np.linalg.norm(exact))
    assert f"{apart:.2f} of their norm" in str(caught.value)
    assert f"up to {max(errors):.0%}" in str(caught.value)
    assert "no record says so" in str(caught.value)


def test_factors_of_one_recorded_start_are_averaged_and_their_cross_terms_reported(tmp_path):
    start = {m: f.a for m, f in factors(0).items()}
    for name, seed in (("a", 1), ("b", 2)):
        made = {m: Factors(start[m] + np.float32(0.1) * f.a, f.b) for m, f in factors(seed).items()}
        adapter(
            tmp_path / name,
            made,
            precision=precise(made, seed),
            info={"training": {INITIAL_A: initial_identity(start)}},
        )
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", space="factor")
    for module in LAYERS:
        exact = (product(refs[0], module) + product(refs[1], module)) / 2
        found = product(tmp_path / "out", module)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(report.layers[module].error, error, rtol=1e-4)
        assert 0 < error < 0.3
    weighed = merge_adapters(refs, tmp_path / "w", weights="precision", space="factor")
    by_entries = merge_adapters(refs, tmp_path / "p", weights="precision", rank=70)
    assert by_entries.largest_error < 1e-6
    assert "from the average of the changes by precision as the error" in weighed.notes[0]
    for module in LAYERS:
        exact = product(tmp_path / "p", module)
        error = np.linalg.norm(product(tmp_path / "w", module) - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(weighed.layers[module].error, error, rtol=1e-4)
    assert initial_identity(start) != initial_identity({**start, "m.q": start["m.q"] + 1})
    with pytest.raises(ConfigError, match="none below zero"):
        merge_adapters(refs, tmp_path / "no", space="factor", scales=(1, -1))


def test_tensors_held_whole_are_kept_if_equal_averaged_by_precision_and_else_refused(tmp_path):
    made, heads = factors(1), [np.float32([[1, 2]]), np.float32([[3, 6]])]
    for name, head in (("a", heads[0]), ("b", heads[0]), ("c", heads[1])):
        adapter(tmp_path / name, made, whole={"head.weight": head}, modules_to_save=["head"])
    a, b, c = (str(tmp_path / n) for n in "abc")
    report = merge_adapters([a, b], tmp_path / "same")
    assert report.whole == {"head.weight": "the same in all adapters"}
    np.testing.assert_array_equal(
        tiny.read(tmp_path / "same")["base_model.model.head.weight"], heads[0]
    )
    with pytest.raises(MismatchError, match=r"'head\.weight' differs between the adapters"):
        merge_adapters([a, c], tmp_path / "no")
    for name, amount in (("a", 1.0), ("c", 3.0)):
        with SafetensorsSource(checkpoint_files(tmp_path / name)) as source:
            stored = {n: np.full(s.shape, amount, np.float32) for n, s in source.specs.items()}
            save_posterior(
                tmp_path / name,
                stored,
                PosteriorInfo(estimator="ggn", unit="token", mean=identify(source)),
            )
    merge_adapters([a, c], tmp_path / "weighted", weights="precision")
    merged = tiny.read(tmp_path / "weighted")["base_model.model.head.weight"]
    np.testing.assert_allclose(merged, heads[0] / 4 + 0.75 * heads[1], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_an_adapter_of_scaling_zero_is_known_to_change_nothing(tmp_path):
    """Its `s B` has no variance, and counts fully by precision, as in product space."""
    start = factors(0)
    for t, alpha in enumerate((0, 3)):
        made = factors(t + 1, same_a=start)
        adapter(tmp_path / f"a{t}", made, alpha=alpha, precision=precise(made, t))
    refs = [str(tmp_path / f"a{t}") for t in range(2)]
    for space in ("factor", "product"):
        merge_adapters(refs, tmp_path / space, weights="precision", space=space)
        for module in start:
            assert np.abs(product(tmp_path / space, module)).max() < 1e-9
