"""The comparison of precisions made without data: what its numbers mean, and that it runs."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.posterior import open_posterior, save_posterior
from tests import tiny

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    yield from _imported("without_data")


@pytest.fixture(scope="module")
def merges(script):
    yield from _imported("real_merges")


@pytest.fixture(scope="module")
def forms(script):
    yield from _imported("posterior_forms")


def _imported(name):
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_precision_of_another_size_and_order_is_told_from_the_reference(script):
    reference = {"a": np.arange(1.0, 5.0), "b": np.array([[10.0, 20.0], [30.0, 0.0]])}
    double = script.compare({n: 2 * t for n, t in reference.items()}, reference)
    ratios = {"ratio": 2.0, "ratio_least": 2.0, "ratio_most": 2.0}
    assert double == pytest.approx({"rank": 1.0, "within": 1.0, "within_least": 1.0} | ratios)
    turned = script.compare(reference | {"a": reference["a"][::-1]}, reference)
    assert turned["within_least"] == pytest.approx(-1)
    assert turned["within"] == pytest.approx(0)  # the median of -1 and 1
    assert turned["rank"] == pytest.approx(1 - 6 * (9 + 1 + 1 + 9) / (8 * 63))


def test_a_removal_is_paid_where_the_removed_text_has_risen_enough(
    script, merges, tmp_path, monkeypatch
):
    world = merges.World(tmp_path, script.SIZES["tiny"])
    looks = {scale: (5 + 0.3 * scale, 4 + 0.1 * scale**2) for scale in (0, *merges.SCALES)}

    def losses(_, folder):
        removed, kept = looks[0 if folder == world.base(0) else float(folder.name)]
        return {merges.TUNED: removed, "related": kept, "yelp": kept}

    monkeypatch.setattr(merges, "losses", losses)
    monkeypatch.setattr(merges, "run_merge", lambda config: None)
    # The rise of 0.2 lies at two thirds, between the scales 0.5 and 0.75.
    paid = merges.subtract(world, 0, None)
    assert paid["yelp"] == pytest.approx(0.025 + 2 / 3 * (0.05625 - 0.025))
    looks.update(dict.fromkeys(merges.SCALES, (5.1, 4.0)))
    assert merges.subtract(world, 0, None) is None


def test_entries_change_places_within_a_tensor_and_alike_in_all_models(merges, tmp_path):
    read = []
    for scale in (1, 3):
        model = tiny.write(tmp_path / f"{scale}" / "model.safetensors", tiny.arrays(0)).parent
        values = {n: scale * v for n, v in tiny.precisions(0).items()}
        save_posterior(model, values, tiny.info(model))
        out = merges.make_permuted(model, model / "posterior", tmp_path / f"permuted-{scale}")
        with open_posterior(str(model), precision=str(out)) as posterior:
            read.append({n: read_tensor(posterior.precision, n) for n in values})
    for name, before in tiny.precisions(0).items():
        one, three = (tensors[name] for tensors in read)
        np.testing.assert_array_equal(np.sort(one.ravel()), np.sort(before.ravel()))
        np.testing.assert_allclose(three, 3 * one, rtol=1e-6)
        assert one.size < 4 or not np.array_equal(one, before)


def test_own_text_takes_the_place_of_held_out_text_alone(script):
    given = {kind.label: kind.of_text("wiki").settings for kind in script.kinds(100)}
    assert given[script.REFERENCE] == {"data": "wiki", "seed": 0}
    assert given[script.CEILING] == {"data": "wiki", "seed": 1}
    assert given["root-GGN, novels"] == {"data": "other-text", "seed": 1}
    assert given["root-GGN, 100 self-generated"] == {"self_generated": 100, "seed": 1}


def test_an_addition_is_told_from_task_arithmetic_over_all_seeds(script, tmp_path):
    texts, tokens = (*script.ADDED, *script.KEPT), [1.0, 2.0, 3.0]
    for seed, shift in enumerate((0.1, 0.3)):  # nats a token less, of every document

        def read(kept, added):
            of = dict.fromkeys(script.ADDED, added) | dict.fromkeys(script.KEPT, kept)
            return {t: {"nats": [of[t] * n for n in tokens], "tokens": tokens} for t in texts}

        found = {script.BASE: read(2, 5), script.UNIFORM: read(4, 3)}
        found[script.REFERENCE] = read(3, 4 - shift)  # half-way between the two, but for the shift
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "added.json").write_text(json.dumps(found))
    folders = [tmp_path / "0", tmp_path / "1"]
    _, _, base, uniform, reference = script.addition_table(folders, "2.1M").splitlines()
    assert base.startswith("| base | 5.0000 | 5.0000 | 2.0000 | 2.0000 |")
    assert uniform.endswith("|  | -0.8000 [-0.8000, -0.8000] |")
    added, kept = "+0.8000 [+0.8000, +0.8000]", "-1.0000 [-1.0000, -1.0000]"
    gain = "0.200 [0.100, 0.300]"
    assert f"| {added} | {added} | {kept} | {kept} | {gain} |  |" in reference


def test_the_comparison_runs(script, forms, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(script.SIZES, "small", script.SIZES["tiny"])
    monkeypatch.setitem(script.WIDTHS, "0.3M", 32)
    for name in ("real_merges", "posterior_forms"):
        monkeypatch.setattr(sys.modules[name], "SCALES", (0.5,))
    if not script.DATA.exists():
        pytest.skip(f"there is no {script.DATA}")
    arguments = ["without_data.py", "-o", str(tmp_path), "--sizes", "0.3M", "--rows", "32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--removal", "--addition"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 9 + 2 + 12 + 2 + 18
    work = tmp_path / "0.3M" / "precisions-0"
    found = json.loads((work / "compared.json").read_text())
    assert found[script.CEILING]["rank"] > 0.3
    assert set(json.loads((work / "removed.json").read_text())) > set(found)
    assert set(json.loads((work / "added.json").read_text())) > set(found)
    # The same precisions of the same models, in coarser forms.
    out = tmp_path / "forms"
    arguments = ["posterior_forms.py", "-o", str(out), "--seeds", "1", "--rows", "32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--real", str(tmp_path / "0.3M")])
    forms.main()
    table = capsys.readouterr().out
    by_kind = json.loads((out / "seed-0.json").read_text())
    assert tuple(by_kind) == forms.KINDS
    assert all(kind in table for kind in forms.KINDS)
    added = json.loads((work / "added.json").read_text())
    for kind, label in (("entries", script.REFERENCE), ("uniform", script.UNIFORM)):
        wiki = added[label]["wiki"]
        assert by_kind[kind]["added, wiki"] == sum(wiki["nats"]) / sum(wiki["tokens"])
    assert by_kind["row"]["bytes"] < by_kind["row-column"]["bytes"] < by_kind["entries"]["bytes"]
    assert len({by_kind[kind]["added"] for kind in forms.KINDS}) == len(forms.KINDS)
