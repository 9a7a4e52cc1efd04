"""Adapters merge in their core space by any method, and as their dense changes where that holds."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.kernels.arrays import Arrays, facts_of, merge_arrays, totals_of
from mergekit_bayes.kernels.base import task_key
from mergekit_bayes.lora import merge_adapters
from mergekit_bayes.lora.bases import orthonormal, principal
from mergekit_bayes.lora.core import core_space
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.lora.truncate import truncate_core
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, settings_of
from tests import tiny
from tests.adapters import adapter, factors, product

WITHOUT_PRECISION = sorted(n for n, m in METHODS.items() if not m.needs_precision)
OF_CHANGES = sorted(n for n, m in METHODS.items() if m.merges_changes)
EQUIVARIANT = [n for n in OF_CHANGES if METHODS[n].is_equivariant(settings_of(METHODS[n], {}))]
SHAPES = {"m.q": (20, 24), "m.k": (24, 20), "m.small": (5, 30)}


def drawn(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def turn(seed, size):
    return np.linalg.qr(drawn(seed, (size, size)))[0]


def by(name, base, tasks, **given):
    """A method on matrices in memory, at scales of its own."""
    method = METHODS[name]
    settings = settings_of(method, given)
    arrays = Arrays(base if method.needs_base or method.takes_base else None, tuple(tasks))
    facts = facts_of(method, settings, len(tasks), totals_of(method, [arrays]))
    scales = (0.7, 0.4, 0.9)[: len(tasks)] if method.takes_scales else (1.0,) * len(tasks)
    keys = [task_key(0, "m", str(t)) for t in range(len(tasks))]
    return merge_arrays(method, settings, arrays, scales, facts, keys)


def problem(name, seed=0):
    count = METHODS[name].tasks or 3
    # Cubed, so that some entries stand out.
    return drawn(seed, (6, 9)), [drawn([seed, t, 7], (6, 9)) ** 3 for t in range(count)]


@pytest.mark.parametrize("name", WITHOUT_PRECISION)
def test_a_method_says_truly_whether_changes_are_enough(name):
    """One that needs the weights would merge adapters alone as if their base were zero."""
    base, tasks = problem(name)
    moved = 3 * drawn(9, base.shape)
    there = by(name, base + moved, [task + moved for task in tasks]) - moved
    assert np.allclose(by(name, base, tasks), there, atol=1e-9) != METHODS[name].reads_weights


@pytest.mark.parametrize("name", WITHOUT_PRECISION)
@pytest.mark.parametrize("given", [{}, {"filter_wise": 1}, {"nuslerp_flatten": 0}])
def test_a_method_says_truly_whether_it_commutes_with_orthogonal_maps(name, given):
    known = {p.name for p in METHODS[name].parameters}
    if given.keys() - known:
        return
    base, tasks = problem(name)
    left, right = turn(1, 6), turn(2, 9)
    turned = by(name, left @ base @ right, [left @ t @ right for t in tasks], **given)
    commutes = np.allclose(left @ by(name, base, tasks, **given) @ right, turned, atol=1e-8)
    assert commutes == METHODS[name].is_equivariant(settings_of(METHODS[name], given))


def pairs_of(ranks, shape=(20, 24), same=None):
    rows, columns = shape
    return [
        Factors(drawn([1 if same else t, 1], (r, columns)), drawn([t, 2], (rows, r)))
        for t, r in enumerate(ranks)
    ]


STACKS = {
    "different ranks": pairs_of([2, 5, 3]),
    "a shared factor": pairs_of([4, 4, 4], same=True),
    "more directions than rows": pairs_of([3, 4], shape=(5, 30)),
    "far apart in size": [
        Factors(a, b * 10.0 ** (-4 * t)) for t, (a, b) in enumerate(pairs_of([3, 3]))
    ],
    "nothing at all": [Factors(np.zeros((2, 24)), np.zeros((20, 2)))],
    "no factor": [Factors(np.zeros((0, 24)), np.zeros((20, 0)))],
}


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("pairs", STACKS.values(), ids=STACKS)
def test_the_core_space_loses_nothing_and_its_directions_are_orthonormal(pairs, published):
    space = space_of(pairs, published)
    for pair, core in zip(pairs, space.cores, strict=True):
        change = pair.b @ pair.a
        np.testing.assert_allclose(
            whole(space, core), change, atol=1e-8 * np.abs(change).max(initial=1e-300)
        )
    for basis in (space.left, space.right):
        own = basis.times(np.eye(basis.size))
        np.testing.assert_allclose(own.T @ own, np.eye(basis.size), atol=1e-8)
        np.testing.assert_allclose(basis.inside(own), np.eye(basis.size), atol=1e-8)
    stack = np.concatenate([pair.b for pair in pairs], axis=1)
    assert space.left.size == (np.linalg.matrix_rank(stack) if stack.size else 0)
    # The paper's basis: singular directions of the stack, the largest first.
    sizes = np.linalg.norm(space.left.inside(stack), axis=1)
    assert (np.diff(sizes) <= 1e-9 * sizes.max(initial=0)).all() or not published


def space_of(pairs, published=True):
    left = np.concatenate([pair.b for pair in pairs], axis=1)
    right, ranks = np.concatenate([pair.a for pair in pairs]), [len(pair.a) for pair in pairs]
    return core_space(left, right, ranks, by_singular_vectors=published)


def whole(space, core):
    return space.left.times(core) @ space.right.times(np.eye(space.right.size)).T


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("way", [orthonormal, principal])
def test_a_stack_is_written_exactly_however_its_values_spread(way, spread):
    values = np.geomspace(1, spread, 6)
    stack = (turn(1, 40)[:, :6] * values) @ turn(2, 6)
    basis, inner = way(stack)
    own = basis.times(np.eye(basis.size))
    np.testing.assert_allclose(own @ inner, stack, atol=1e-13)
    np.testing.assert_allclose(own.T @ own, np.eye(6), atol=1e-8)
    np.testing.assert_allclose(np.linalg.svd(inner)[1], values, rtol=1e-6)
    if way is principal:
        np.testing.assert_allclose(np.linalg.norm(inner, axis=1), values, rtol=1e-6)


def test_the_error_of_a_core_is_that_of_the_factors_as_they_are_stored():
    space = space_of(pairs_of([2, 5, 3]))
    core = sum(space.cores)
    for rank in (1, 4, 12):
        found = truncate_core(space.left, core, space.right, rank)
        dense = whole(space, core)
        stored = found.factors.b.astype(np.float64) @ found.factors.a
        assert found.factors.a.shape == (rank, 24)
        assert found.norm == pytest.approx(np.linalg.norm(dense))
        error = np.linalg.norm(dense - stored) / np.linalg.norm(dense)
        assert found.error == pytest.approx(error, rel=1e-3, abs=1e-12)


def adapters(tmp_path, ranks=(2, 5, 3), shapes=SHAPES, kinds=({}, {"use_rslora": True}, {})):
    """Adapters of different ranks and scalings; the last one lacks a layer."""
    for t, (rank, kind) in enumerate(zip(ranks, kinds, strict=False)):
        held = dict(list(shapes.items())[: 2 if t == 2 else None])
        adapter(tmp_path / f"a{t}", factors(t + 1, rank, held), alpha=t + 2, **kind)
    return [str(tmp_path / f"a{t}") for t in range(len(ranks))]


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_it_is_the_merge_of_the_dense_changes(name, tmp_path):
    """Its twin is the merge of whole models in float64, on a base of zeros."""
    count = METHODS[name].tasks or 3
    refs = adapters(tmp_path)[:count]
    scales = (0.8, -0.5, 0.3)[:count] if METHODS[name].needs_base else (0.8, 0.5, 0.3)[:count]
    scales = scales if METHODS[name].takes_scales else (1.0,)
    merge_adapters(refs, tmp_path / "core", space="core", method=name, scales=scales, rank=10)
    base = tmp_path / "base"
    tiny.write(
        base / "model.safetensors",
        {f"{m}.weight": np.zeros(s, np.float64) for m, s in SHAPES.items()},
        "F64",
    )
    takes = METHODS[name].needs_base or METHODS[name].takes_base
    run_merge(
        MergeConfig(
            models=tuple(f"{base}+{ref}" for ref in refs),
            base=str(base) if takes else None,
            method=name,
            scale=scales,
            out=str(tmp_path / "dense"),
        )
    )
    dense = tiny.read(tmp_path / "dense" / "model.safetensors")
    for module in SHAPES:
        expected = dense[f"{module}.weight"]
        found = product(tmp_path / "core", module)
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected), module


def test_a_rule_for_matrices_keeps_as_many_directions_as_in_the_layer(tmp_path):
    """TSV-M's share of directions is that of the weight: a core alone would cut the larger rank."""
    base = np.zeros((12, 40))
    pairs = pairs_of([1, 6], shape=base.shape)
    expected = by("tsv_m", base, [pair.b @ pair.a for pair in pairs])
    cut = by("tsv_m", np.zeros((7, 7)), space_of(pairs).cores)
    space = space_of(pairs)
    assert not np.allclose(whole(space, cut), expected, atol=1e-6)
    for t, (a, b) in enumerate(pairs):
        adapter(tmp_path / f"a{t}", {"m.q": Factors(np.float32(a), np.float32(b))}, alpha=len(a))
    refs = [str(tmp_path / f"a{t}") for t in range(2)]
    merge_adapters(refs, tmp_path / "out", space="core", method="tsv_m", scales=(0.7, 0.4), rank=12)
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=1e-4)


def test_ties_trims_over_all_layers_or_over_each(tmp_path):
    refs = adapters(tmp_path)
    merged = {}
    for scope in ("model", "tensor"):
        merge_adapters(
            refs,
            tmp_path / scope,
            space="core",
            method="ties",
            rank=10,
            param={"density": 0.3, "scope": scope},
        )
        merged[scope] = [product(tmp_path / scope, module) for module in SHAPES]
    assert not np.allclose(merged["model"][0], merged["tensor"][0])
    # By hand in one layer: the directions, the trim, the election.
    opened = [read_pair(ref, "m.q") for ref in refs]
    u = np.linalg.svd(np.concatenate([b for _, b in opened], 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([a for a, _ in opened]), full_matrices=False)[2]
    cores = np.array([u.T @ b @ a @ v.T for a, b in opened])
    for core in cores:
        least = np.sort(np.abs(core).reshape(-1))[-max(1, round(0.3 * core.size))]
        core[np.abs(core) < least] = 0
    agree = (np.sign(cores) == np.sign(cores.sum(0))) & (cores != 0)
    elected = (cores * agree).sum(0) / np.maximum(agree.sum(0), 1)
    np.testing.assert_allclose(merged["tensor"][0], u @ elected @ v, atol=1e-4)


def read_pair(ref, module):
    from mergekit_bayes.lora import open_adapter

    with open_adapter(ref, with_precision=False) as found:
        layer = found.layers[module]
        a, b = (np.float64(x) for x in found.factors(layer))
        return a, layer.scaling * b


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_random_rules_draw_by_their_seed(name, tmp_path):
    refs = adapters(tmp_path)
    made = []
    for i, seed in enumerate((5, 5, 6)):
        out = tmp_path / f"out{i}"
        merge_adapters(refs, out, space="core", method=name, param={"seed": seed, "density": 0.5})
        made.append((out / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_convolutions_merge_as_flattened_kernels(tmp_path):
    kernels = [(drawn([t, 1], (r, 4, 3)), drawn([t, 2], (6, r, 1))) for t, r in enumerate((2, 3))]
    for t, (a, b) in enumerate(kernels):
        adapter(tmp_path / f"a{t}", {"m.q": Factors(np.float32(a), np.float32(b))}, alpha=len(a))
    refs = [str(tmp_path / f"a{t}") for t in range(2)]
    merge_adapters(refs, tmp_path / "out", space="core", method="iso_c", rank=6)
    changes = [np.einsum("ok,kix->oix", b[..., 0], a).reshape(6, 12) for a, b in kernels]
    u, s, v = np.linalg.svd(sum(changes), full_matrices=False)
    expected = s[:5].mean() * u[:, :5] @ v[:5]
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=1e-5)
    stored = tiny.read(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.m.q.lora_A.weight"].shape == (6, 4, 3)


def test_what_cannot_be_merged_so_is_refused_with_the_way_out(tmp_path):
    refs = adapters(tmp_path)

    def refused(match, kind=ConfigError, **given):
        with pytest.raises(kind, match=match):
            merge_adapters(refs, tmp_path / "out", **{"space": "core", **given})
        assert not (tmp_path / "out").exists()

    refused("karcher needs the weights.*multislerp", method="karcher")
    refused("weighs entries by their precision", method="fisher")
    refused("no such method. Did you mean 'ties'", method="tie")
    refused("merges 2 adapters, not 3", method="nuslerp")
    refused("takes no --scale", method="model_stock", scales=(0.5,))
    refused("shares: none below", method="average", scales=(1.0, 1.0, -0.5))
    refused("no entry is used by 4 of 3", method="consensus", param={"k": 4})
    refused("no such setting", method="ties", param={"densty": 1})
    refused("--param density is a setting", space="product", param={"density": 1})
    refused("use --space core", space="product", method="ties")
    refused("use --space core", space="factor", method="task_arithmetic")
    refused("weighs no entries; use --space product", weights="precision")
    for space in ("product", "core", "factor"):
        by = {"weights": "precision", "space": space}
        refused(r"two rules.*average by precision, or --weights precision for", method="ties", **by)
        refused(r"two rules.*Leave out --method for the average by.*\.$", method="fisher", **by)
        refused("no such method. Did you mean 'ties'", method="tie", **by)
    refused("'m.k': the weights", MismatchError, method="multislerp", scales=(1.0, -1.0, 0.0))
    huge = Factors(np.full((1, 24), 3e38, np.float32), np.full((20, 1), 3e38, np.float32))
    adapter(tmp_path / "huge", {"m.q": huge})
    refs = [*refs, str(tmp_path / "huge")]
    refused("'m.q': .*beyond float32", CheckpointError, method="ties")


def test_scale_zero_and_zero_factors_take_no_part(tmp_path):
    refs = adapters(tmp_path)
    zero = {m: Factors(f.a, 0 * f.b) for m, f in factors(7, 4, SHAPES).items()}
    adapter(tmp_path / "zero", zero)
    for name, scales in (("ties", (1.0, 0.0, 1.0)), ("sce", (0.0, 0.0, 0.0))):
        merge_adapters(refs, tmp_path / name, space="core", method=name, scales=scales, rank=9)
    without = [refs[0], refs[2]]
    merge_adapters(without, tmp_path / "two", space="core", method="ties", rank=9)
    for module in SHAPES:
        np.testing.assert_allclose(
            product(tmp_path / "ties", module), product(tmp_path / "two", module), atol=1e-5
        )
        assert not product(tmp_path / "sce", module).any()
    merge_adapters([str(tmp_path / "zero")], tmp_path / "none", space="core", method="iso_c")
    assert not product(tmp_path / "none", "m.q").any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OF_CHANGES)
def test_a_layer_that_no_adapter_changes_stays_so(name, tmp_path):
    refs = []
    for t in range(METHODS[name].tasks or 3):
        made = factors(t + 1, 2, {"m.q": (6, 4), "m.k": (4, 4)})
        made["m.k"] = Factors(made["m.k"].a, 0 * made["m.k"].b)
        refs.append(str(adapter(tmp_path / f"a{t}", made)))
    report = merge_adapters(refs, tmp_path / "out", space="core", method=name)
    assert not product(tmp_path / "out", "m.k").any()
    assert report.layers["m.k"].norm == report.layers["m.k"].error == 0


def test_the_command_merges_by_a_method_and_its_recipe_repeats_it(tmp_path):
    refs = adapters(tmp_path)
    run = CliRunner()
    words = [*refs, "--method", "dare_ties", "--param", "density=0.6", "--param", "seed=3"]
    first = run.invoke(app, ["merge", *words, "--rank", "6", "-o", str(tmp_path / "one")])
    assert first.exit_code == 0, first.output
    shown = " ".join(first.output.split())
    assert "merging by dare_ties in the adapters' core space (--space core)" in shown
    assert "dare_ties (density=0.6, seed=3) of the changes of 3 adapters" in shown
    assert "not by entries of the weights" in shown
    assert "--space concat" not in shown  # which is exact for sums only
    report = json.loads((tmp_path / "one" / "merge_report.json").read_text())
    assert (report["method"], report["space"], report["rank"]) == ("dare_ties", "core", 6)
    recipe = str(tmp_path / "one" / "merge_recipe.yaml")
    again = run.invoke(app, ["merge", recipe, "-o", str(tmp_path / "two")])
    assert again.exit_code == 0, again.output
    one, two = (
        (tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two")
    )
    assert one == two
    refused = run.invoke(app, ["merge", *refs, "--space", "product", "--method", "ties"])
    assert refused.exit_code == 2
    assert "use --space core" in " ".join(refused.output.split())
