"""A precision in coarser forms: what is stored, how it merges, and what a push sends."""

import errno
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.errors import CheckpointError, MismatchError, PrecisionError
from mergekit_bayes.hub import make_card, plan_push, push_folder
from mergekit_bayes.inspect import run_inspect
from mergekit_bayes.lora import open_adapter
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior, save_posterior
from mergekit_bayes.posterior import pooling as pooling_module
from mergekit_bayes.posterior.factors import RankOne
from mergekit_bayes.posterior.pooling import pooled, write_pooled
from mergekit_bayes.posterior.stored import StoredPrecisions
from tests import tiny
from tests.pushing import adapter, folder, hub  # noqa: F401

SHAPES = tiny.SHAPES | {"h.0.conv": (3, 2, 2)}


def saved(place, values, seed=0, shapes=SHAPES):
    """A model folder with a precision in any form."""
    model = tiny.write(place / "model.safetensors", tiny.arrays(seed, shapes)).parent
    save_posterior(model, values, tiny.info(model))
    return model


def rank_ones(values):
    """Each matrix as two vectors, by the definition, in float64."""
    made = {}
    for name, v in values.items():
        if v.ndim < 2:
            made[name] = v
            continue
        rows = v.mean(axis=tuple(range(1, v.ndim)), keepdims=True, dtype=np.float64)
        columns = v.mean(axis=0, keepdims=True, dtype=np.float64) / v.mean(dtype=np.float64)
        made[name] = RankOne(rows.astype(np.float32), columns.astype(np.float32))
    return made


def dense(values):
    return {n: v.rows * v.columns if isinstance(v, RankOne) else v for n, v in values.items()}


def again(model, place, form):
    """The model with its precision written again in a form."""
    target = tiny.write(place / "model.safetensors", tiny.read(model)).parent
    (target / "posterior").mkdir()
    with open_posterior(str(model)) as opened:
        write_pooled(opened.precision, opened.info, target / "posterior", form)
    return target


@pytest.mark.parametrize("window", [7, 1 << 18])
def test_rank_one_has_the_sums_of_the_entries(monkeypatch, window):
    monkeypatch.setattr(pooling_module, "_WINDOW", window)  # pieces of rows, and of several rows
    values = tiny.precisions(3, {"w": (5, 9), "conv": (4, 3, 2), "zeros": (2, 3), "thin": (1, 30)})
    values["zeros"] *= 0
    source = MemorySource(values)
    for name, v in values.items():
        made = pooled(source, name, "row-column")
        assert made.rows.shape == (v.shape[0], *(1 for _ in v.shape[1:]))
        assert made.columns.shape == (1, *v.shape[1:])
        product = (made.rows * made.columns).astype(np.float64)
        np.testing.assert_allclose(product.sum(0), v.sum(0, np.float64), rtol=1e-5)
        rest = tuple(range(1, v.ndim))
        np.testing.assert_allclose(product.sum(rest), v.sum(rest, np.float64), rtol=1e-5)
        np.testing.assert_array_equal(pooled(source, name, "row"), made.rows)
    one = np.outer([1.0, 2.0], [3.0, 5.0, 7.0]).astype(np.float32)
    made = pooled(MemorySource({"w": one}), "w", "row-column")
    np.testing.assert_allclose(made.rows * made.columns, one, rtol=1e-6)


def test_a_bad_entry_is_not_pooled_away():
    for bad in (np.nan, np.inf, -1.0):
        values = np.ones((3, 4), np.float32)
        values[1, 2] = bad
        with pytest.raises(PrecisionError, match="'w' has 1 entries that are negative or not fin"):
            pooled(MemorySource({"w": values}), "w", "row")


def test_rank_one_is_read_as_the_entries_it_stands_for(tmp_path):
    values = rank_ones(tiny.precisions(0, SHAPES))
    model = saved(tmp_path / "m", values)
    stored = load_file(model / "posterior" / "precision.posterior")
    assert {"rows:h.0.conv", "columns:h.0.conv", "precision:h.0.ln.bias"} <= stored.keys()
    with open_posterior(str(model)) as opened:
        source = opened.precision
        for name, expected in dense(values).items():
            np.testing.assert_array_equal(read_tensor(source, name), expected)
            whole = expected.tobytes()
            for start, size in ((0, len(whole)), (5, 9), (len(whole) - 3, 3), (4, 0)):
                size = max(min(size, len(whole) - start), 0)
                out = bytearray(size)
                source.read_bytes(name, start, memoryview(out))
                assert bytes(out) == whole[start : start + size], (name, start)
        entries = MemorySource(dense(values))
        assert block_hash(source, "h.0.conv") == block_hash(entries, "h.0.conv")


@pytest.mark.parametrize("settings", [{}, {"pool": "row"}, {"shrink": "row:0.3"}], ids=str)
def test_rank_one_merges_as_its_entries_do(tmp_path, settings):
    for kind, change in (("one", lambda v: v), ("entries", dense)):
        for seed, name in enumerate(("base", "a")):
            values = change(rank_ones(tiny.precisions(seed, SHAPES)))
            saved(tmp_path / kind / name, values, seed)
        run_merge(
            MergeConfig(
                models=(str(tmp_path / kind / "a"),),
                base=str(tmp_path / kind / "base"),
                weights="precision",
                out=str(tmp_path / kind / "out"),
                **settings,
            )
        )
    one, entries = (tmp_path / kind / "out" for kind in ("one", "entries"))
    for file in ("model.safetensors", "posterior/precision.posterior"):
        tensors = load_file(entries / file)
        for name, value in load_file(one / file).items():
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_the_row_form_merges_as_the_entries_pooled_by_row(tmp_path):
    """To the bit, since both add in the same order, also a row in several pieces."""
    shapes = SHAPES | {"wide": (2, 300_001)}
    for seed, name in enumerate(("base", "a")):
        place = tmp_path / "entries" / name
        entries = saved(place, tiny.precisions(seed, shapes), seed, shapes)
        again(entries, tmp_path / "row" / name, "row")
    for kind, settings in (("entries", {"pool": "row"}), ("row", {})):
        place = tmp_path / kind
        run_merge(
            MergeConfig(
                models=(str(place / "a"),),
                base=str(place / "base"),
                weights="precision",
                out=str(place / "out"),
                **settings,
            )
        )
    for file in ("model.safetensors", "posterior/precision.posterior"):
        tensors = load_file(tmp_path / "entries" / "out" / file)
        assert {n: v.tobytes() for n, v in load_file(tmp_path / "row" / "out" / file).items()} == {
            n: v.tobytes() for n, v in tensors.items()
        }


@pytest.mark.parametrize("pooled_part", ["merge", "task"])
def test_a_removal_from_pooled_precisions_is_no_undo(tmp_path, pooled_part):
    """Sums of entries and means of rows do not cancel: without the guard weights would explode."""
    for seed, name in enumerate(("base", "a", "b")):
        saved(tmp_path / name, tiny.precisions(seed, SHAPES), seed)
    settings = {"base": str(tmp_path / "base"), "weights": "precision"}
    a, b, both = (str(tmp_path / name) for name in ("a", "b", "both"))
    run_merge(MergeConfig(models=(a, b), out=both, **settings))
    undo = {"scale": (1.0, -1.0), **settings}
    exact = run_merge(MergeConfig(models=(both, a), out=str(tmp_path / "exact"), **undo))
    assert exact.guard == pytest.approx(1e-6)
    if pooled_part == "merge":
        both = str(again(tmp_path / "both", tmp_path / "row", "row"))
    else:
        a = str(again(tmp_path / "a", tmp_path / "row", "row"))
    report = run_merge(MergeConfig(models=(both, a), out=str(tmp_path / "bounded"), **undo))
    assert report.guard == 0.2
    assert all(np.abs(v).max() < 100 for v in tiny.read(tmp_path / "bounded").values())


def test_an_adapter_reads_a_precision_in_any_form(tmp_path):
    """One number stands for its row, or for all."""
    place = adapter(tmp_path / "a", "org/base")
    with open_adapter(str(place)) as opened:
        entries = opened.counted("base_model.model.h.0.attn.lora_B.weight")
        (layer,) = opened.layers.values()
    row = place.with_name("row")
    shutil.copytree(place, row, ignore=shutil.ignore_patterns("posterior"))
    (row / "posterior").mkdir()
    with StoredPrecisions([place / "posterior" / "precision.posterior"]) as stored:
        write_pooled(stored, stored.info, row / "posterior", "row")
    with open_adapter(str(row)) as opened:
        # B is (4, 1), so that its rows are its entries; A is (1, 5).
        np.testing.assert_array_equal(opened.counted(layer.b), entries)
        a = opened.counted(layer.a)
    assert a.shape == (1, 5)
    np.testing.assert_allclose(
        a, tiny.read(place / "posterior" / "precision.posterior")[layer.a].mean(), rtol=1e-6
    )


def test_what_is_coarse_already_is_kept(tmp_path):
    values = tiny.precisions(0, SHAPES)
    row = again(saved(tmp_path / "m", values), tmp_path / "row", "row")
    one = again(tmp_path / "m", tmp_path / "one", "row-column")
    for model, forms in ((row, ("row", "row-column", "entries")), (one, ("row-column", "entries"))):
        expected = load_file(model / "posterior" / "precision.posterior")
        for form in forms:
            written = again(model, tmp_path / f"{model.name}-{form}", form)
            found = load_file(written / "posterior" / "precision.posterior")
            assert found.keys() == expected.keys()
            assert all((found[n] == v).all() for n, v in expected.items())
            assert open_posterior(str(written)).info == open_posterior(str(model)).info
    with StoredPrecisions([row / "posterior" / "precision.posterior"]) as stored:
        assert stored.info.pool == "row"
    coarser = again(one, tmp_path / "coarser", "row")
    np.testing.assert_allclose(
        tiny.read(coarser / "posterior" / "precision.posterior")["wte.weight"],
        values["wte.weight"].mean(1, keepdims=True),
        rtol=1e-6,
    )


def test_inspect_counts_the_numbers_that_are_stored(tmp_path):
    values = tiny.precisions(0, SHAPES)
    expected = {"entries": 28 + 20 + 4 + 1 + 12, "row": 7 + 4 + 4 + 1 + 3, "row-column": None}
    expected["row-column"] = (7 + 4) + (4 + 5) + 4 + 1 + (3 + 4)
    model = saved(tmp_path / "m", values)
    for form, numbers in expected.items():
        report = run_inspect(str(again(model, tmp_path / form, form)))
        assert report.precision.numbers == numbers, form
        assert report.precision.covered == 1.0
        assert report.precision.belongs
        assert any("is pooled" in note for note in report.notes) == (form != "entries")


def test_factors_that_are_none_are_refused(tmp_path):
    model = tiny.write(tmp_path / "m.safetensors", {"w": np.ones((3, 2), np.float32)})
    rows, columns = np.ones((3, 1), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(MismatchError, match=r"precision of 'w' is \[2, 2\]"):
        save_posterior(model, {"w": RankOne(rows[:2], columns)}, tiny.info(model))
    with pytest.raises(PrecisionError, match="1 of 5 entries"):
        save_posterior(model, {"w": RankOne(-rows * [[0], [0], [1]], columns)}, tiny.info(model))
    for other, reason in (
        ({"rows:w": rows.reshape(3), "columns:w": columns}, r"is F32 \[3\]"),
        ({"rows:w": rows, "columns:w": columns.T}, r"columns F32 \[2, 1\], expected F32"),
    ):
        place = tmp_path / "p.safetensors"
        save_file(other, place, tiny.info(model).to_metadata())
        with pytest.raises(PrecisionError, match=reason):
            open_posterior(str(model), precision=str(place))
    bad = {"rows:w": rows, "columns:w": -columns}
    save_file(bad, tmp_path / "p.safetensors", tiny.info(model).to_metadata())
    with (
        open_posterior(str(model), precision=str(tmp_path / "p.safetensors")) as opened,
        pytest.raises(PrecisionError, match="factors of the precision of 'w' have 2 entries"),
    ):
        read_tensor(opened.precision, "w")


def test_names_of_format_1_are_the_model_s_own_whatever_they_begin_with(tmp_path):
    values = {"rows:w": np.ones((3, 2), np.float32), "rows": np.full(3, 2, np.float32)}
    model = tiny.write(tmp_path / "m.safetensors", values)
    record = tiny.info(model).model_dump(mode="json") | {"format": 1}
    save_file(values, tmp_path / "m.precision.safetensors", {"bmerge": json.dumps(record)})
    (tmp_path / "again").mkdir()
    with open_posterior(str(model)) as opened:
        assert opened.precision.specs.keys() == values.keys()
        write_pooled(opened.precision, opened.info, tmp_path / "again", "entries")
    with StoredPrecisions([tmp_path / "again" / "precision.posterior"]) as written:
        for name, value in values.items():
            np.testing.assert_array_equal(read_tensor(written, name), value)


@pytest.mark.filterwarnings("error")
def test_products_beyond_float32_are_bad_entries_without_a_warning(tmp_path):
    model = tiny.write(tmp_path / "m.safetensors", {"w": np.ones((3, 2), np.float32)})
    large = np.full((3, 1), 1e30, np.float32)
    save_posterior(model, {"w": RankOne(large, large[:2].T)}, tiny.info(model))
    with open_posterior(str(model)) as opened:
        assert np.isinf(read_tensor(opened.precision, "w")).all()


def test_a_push_sends_one_number_a_row_unless_told_otherwise(hub, tmp_path):  # noqa: F811
    place, out = folder(tmp_path / "a"), CliRunner()
    for form, sent in (("row", 7), ("row-column", 11), ("entries", 28)):
        flags = [] if form == "row" else ["--posterior-form", form]
        done = out.invoke(app, ["push", str(place), f"org/{form}", *flags])
        assert done.exit_code == 0, done.output
        assert ("the posterior goes out with" in " ".join(done.output.split())) == (
            form != "entries"
        )
        there = hub.repos[f"org/{form}"].files()
        (tmp_path / form).mkdir()
        for name in ("precision.posterior", "precision.index.json", "posterior.json"):
            (tmp_path / form / name).write_bytes(there[f"posterior/{name}"])
        stored = load_file(tmp_path / form / "precision.posterior")
        assert sum(v.size for n, v in stored.items() if n.endswith("wte.weight")) == sent
        index = json.loads(there["posterior/precision.index.json"])
        assert index["tensors"] == dict.fromkeys(sorted(stored), "precision.posterior")
        with open_posterior(f"org/{form}") as opened:
            assert opened.info.mean.blocks == opened.identity
            assert opened.info.pool == (None if form == "entries" else form)
        assert push_folder(place, f"org/{form}", posterior_form=form).changed is False
    assert (place / "posterior" / "precision.posterior").read_bytes() == hub.repos[
        "org/entries"
    ].files()["posterior/precision.posterior"]


def test_a_form_that_cannot_be_written_is_one_message_and_nothing_is_left(
    hub,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    place = folder(tmp_path / "a")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pooling_module, "write_precision_index", full)
        with pytest.raises(CheckpointError, match=r"\(No space left on device\)\. Name .* TMPDIR"):
            push_folder(place, "org/a")
    assert "org/a" not in hub.repos
    assert push_folder(place, "org/a").changed
    assert not list((tmp_path / "scratch").iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="TMPDIR"):
        plan_push(place, "org/a")
    assert plan_push(place, "org/a", posterior_form="entries").files  # needs no such folder


def test_a_posterior_of_the_earlier_layout_is_pushed_in_todays(hub, tmp_path):  # noqa: F811
    values = tiny.precisions(0)
    place = tiny.write(tmp_path / "a" / "model.safetensors", tiny.arrays(0)).parent
    record = tiny.info(place).model_dump(mode="json") | {"format": 1}
    metadata = {"format": "pt", "bmerge": json.dumps(record)}
    tiny.write(place / "posterior" / "precision.safetensors", values, metadata=metadata)
    plan = plan_push(place, "org/a", posterior_form="entries")
    names = {file.path for file in plan.files if file.path.startswith("posterior/")}
    assert names == {
        "posterior/precision.posterior",
        "posterior/precision.index.json",
        "posterior/posterior.json",
    }
    hub.add("org/a", {"posterior/precision.safetensors": b"x"})
    report = push_folder(place, "org/a", posterior_form="entries")
    assert report.deleted == ("posterior/precision.safetensors",)
    with open_posterior("org/a") as opened:
        assert (opened.info.format, opened.info.pool) == (2, None)
        for name, v in values.items():
            np.testing.assert_array_equal(read_tensor(opened.precision, name), v)


def test_the_card_says_what_the_numbers_stand_for(tmp_path):
    place = folder(tmp_path / "a")
    for form, words in (
        ("row", "of each row of a tensor (the mean of its entries)"),
        ("row-column", "of each entry as a product of two vectors"),
        ("entries", "of each entry"),
    ):
        text = make_card(place, posterior_form=form).text
        assert f"holds the inverse variance {words}, 1/weight^2" in text
    assert not list(Path(place, "posterior").glob("*row*"))
