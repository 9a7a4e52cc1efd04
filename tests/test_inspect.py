"""The numbers of inspect equal those of whole arrays in numpy at any chunk, and it notes doubts."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bmerge_cli import inspect
from bmerge_cli.main import app
from bmerge_cli.render import Screen
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.inspect import QUANTILES, totals
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.posterior import (
    PosteriorInfo,
    Predictive,
    Prior,
    open_posterior,
    save_posterior,
)
from tests import tiny
from tests.adapters import adapter, base, factors, precise

SHAPES = {
    "transformer.wte.weight": (50, 8),
    "transformer.h.10.mlp.weight": (8, 32),
    "transformer.h.2.attn.weight": (8, 24),
    "transformer.h.2.attn.bias_": (24,),
    "transformer.ln_f.weight": (8,),
    "score.weight": (2, 8),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mean, precision = tiny.arrays(0, SHAPES), tiny.precisions(0, SHAPES, low=1e-3, high=1e9)
    tiny.posterior("a.safetensors", mean, precision)
    return mean, precision


def layer(report, name):
    return next(x for x in report.layers if x.name == name)


def test_layers_come_in_the_order_of_the_model(world):
    report = run_inspect("a.safetensors")
    assert [x.name for x in report.layers] == [
        "embeddings",
        "transformer.h.2",
        "transformer.h.10",
        "rest",
        "head",
    ]
    assert (
        report.parameters
        == sum(x.parameters for x in report.layers)
        == sum(t.size for t in world[0].values())
    )
    assert report.dtypes == {"F32": report.parameters}


@pytest.mark.parametrize("chunk", [1 << 18, 100, 7])
def test_numbers_of_a_layer_equal_those_of_whole_arrays(world, monkeypatch, chunk):
    monkeypatch.setattr(totals, "_CHUNK", chunk)
    mean, precision = world
    other = {n: t + np.float32(0.01) * tiny.arrays(1, SHAPES)[n] for n, t in mean.items()}
    tiny.write("b.safetensors", other)
    report = run_inspect("a.safetensors", "b.safetensors")
    names = [n for n in SHAPES if n.startswith("transformer.h.2.")]
    m, s, o = (
        np.concatenate([x[n].ravel() for n in names]).astype(float)
        for x in (mean, precision, other)
    )
    second = layer(report, "transformer.h.2")
    rms = np.sqrt(np.mean(m**2))
    assert (second.tensors, second.parameters) == (2, m.size)
    assert (second.rms, second.largest) == pytest.approx((rms, np.abs(m).max()))
    assert second.precision.quantiles[0] == s.min()
    assert second.precision.quantiles[-1] == s.max()
    true = np.quantile(s, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(second.precision.quantiles[1:-1], true, rtol=4e-3)
    assert second.precision.sigma_ratio == pytest.approx(true[2] ** -0.5 / rms, rel=4e-3)
    gap = np.sqrt(np.mean((o - m) ** 2))
    assert (second.difference.rms, second.difference.relative) == pytest.approx((gap, gap / rms))
    assert second.difference.largest == pytest.approx(np.abs(o - m).max())
    assert report.comparison.parameters == report.parameters


def test_a_checkpoint_does_not_differ_from_itself(world):
    report = run_inspect("a.safetensors", "a.safetensors")
    assert (report.comparison.rms, report.comparison.largest) == (0, 0)


def test_who_made_the_precision_and_whether_it_is_of_these_weights(world):
    mean, precision = world
    report = run_inspect("a.safetensors")
    assert report.precision.belongs is True
    assert (report.precision.info.estimator, report.precision.info.unit) == ("ggn", "token")
    assert report.precision.info.observations == 100
    tiny.write("moved.safetensors", {n: t + 1 for n, t in mean.items()})
    moved = run_inspect("moved.safetensors", precision="a.posterior")
    assert moved.precision.belongs is False
    assert "the precision was made for other weights" in moved.notes
    tiny.write("foreign.safetensors", precision)
    foreign = run_inspect("a.safetensors", precision="foreign.safetensors")
    assert (foreign.precision.belongs, foreign.precision.info) == (None, None)


def test_a_precision_without_a_proper_prior_is_marked_as_not_samplable(world):
    mean, precision = world
    assert "bare curvature" in run_inspect("a.safetensors").precision.not_samplable
    tiny.posterior("proper.safetensors", mean, precision, prior=0.05)
    assert run_inspect("proper.safetensors").precision.not_samplable is None


def test_entries_that_are_no_precision_are_counted(world):
    precision = world[1]
    bad = {n: p.copy() for n, p in precision.items()}
    bad["score.weight"][0, :4] = [np.nan, -1, np.inf, 0]
    del bad["transformer.ln_f.weight"]
    tiny.write("bad.safetensors", bad | {"stray": np.ones(3, np.float32)})
    report = run_inspect("a.safetensors", precision="bad.safetensors")
    assert (report.precision.bad, report.precision.zeros) == (3, 1)
    assert (layer(report, "head").precision.bad, layer(report, "head").precision.zeros) == (3, 1)
    assert layer(report, "head").precision.quantiles[0] == 0
    assert layer(report, "rest").precision is None
    assert report.precision.unknown == ("stray",)
    assert "the model has no tensor of this name" in " ".join(report.notes)
    assert report.precision.covered == pytest.approx(1 - 8 / report.parameters)


@pytest.mark.parametrize(
    ("change", "dtype", "words"),
    [
        (np.sqrt, "F16", "its dtype is F16, and F32, BF16 or F64 is read"),
        (lambda t: t.T.copy(), "F32", "it is transposed"),
        (lambda t: np.ones((7, *t.shape)), "F32", ", and that of the model's tensor ["),
    ],
)
def test_a_precision_that_fits_no_tensor_says_why_and_shows_no_empty_table(
    world, change, dtype, words
):
    matrices = {n: t for n, t in world[1].items() if t.ndim == 2 and len(set(t.shape)) == 2}
    tiny.write("other.safetensors", {n: change(t) for n, t in matrices.items()}, dtype)
    report = run_inspect("a.safetensors", precision="other.safetensors")
    (note,) = (note for note in report.notes if "fit none of the model" in note)
    assert words in note
    assert f"{len(matrices) - 1} other tensors" in note
    shown = CliRunner().invoke(
        app, ["inspect", "a.safetensors", "--precision", "other.safetensors"]
    )
    assert "sigma / RMS" not in shown.output


def test_the_record_of_an_estimate_is_not_taken_for_that_of_a_training(world):
    def shown(name, **changes):
        tiny.posterior(name, *world, **changes)
        return CliRunner().invoke(app, ["inspect", name]).output

    estimate = shown("e.safetensors", training={"batch_size": 8})
    assert "what the training pulled towards is not known" in estimate
    assert "estimate: batch_size 8" in estimate
    assert estimate.index("to draw weights from it") > estimate.index("estimate: batch_size 8")
    training = shown("t.safetensors", training={"optimizer": "ivon", "batch_size": 8})
    assert "the training pulled towards nothing" in training
    assert "training: optimizer ivon" in training


def test_weights_that_are_not_finite_are_noted(world):
    mean = {n: t.copy() for n, t in world[0].items()}
    mean["score.weight"][0, 0] = np.nan
    tiny.write("nan.safetensors", mean)
    report = run_inspect("nan.safetensors")
    assert layer(report, "head").bad == 1
    assert "1 weights are not finite" in report.notes
    assert json.loads(report.model_dump_json())["precision"] is None


def test_bad_health_is_said_aloud(world):
    posterior = open_posterior("a.safetensors")
    info = PosteriorInfo(
        estimator="ivon", mean=posterior.info.mean, health={"init_fraction": 0.9, "kappa": 2.0}
    )
    posterior.close()
    save_posterior(
        posterior.path, tiny.precisions(0, SHAPES, low=1e-3, high=1e-2), info, force=True
    )
    notes = " ".join(run_inspect("a.safetensors").notes)
    assert "init_fraction 0.9" in notes
    assert "kappa 2" in notes
    assert "above a fifth of the weights' RMS in embeddings, transformer.h.2" in notes
    flushed = info.model_copy(update={"estimator": "ggn"})
    frozen = info.model_copy(update={"health": {}})  # IVON's curvature at a mean that stood still
    for measured in (flushed, frozen):
        save_posterior(
            posterior.path, tiny.precisions(0, SHAPES, low=1e-3, high=1e-2), measured, force=True
        )
        assert run_inspect("a.safetensors").notes == ()


def test_buffers_and_tied_copies_are_no_parameters(tmp_path):
    embedding = np.ones((5, 4), np.float32)
    tensors = {
        "wte.weight": embedding,
        "lm_head.weight": embedding,
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32),
    }
    report = run_inspect(str(tiny.write(tmp_path / "m.safetensors", tensors)))
    assert (report.parameters, report.tied, report.buffers) == (
        20,
        ("lm_head.weight",),
        ("h.0.attn.bias",),
    )


def test_a_common_prefix_does_not_hide_the_partners(world, tmp_path):
    mean = world[0]
    bare = {n.removeprefix("transformer."): t for n, t in mean.items()}
    tiny.write("bare.safetensors", bare)
    for pair in (("a.safetensors", "bare.safetensors"), ("bare.safetensors", "a.safetensors")):
        comparison = run_inspect(*pair).comparison
        assert (comparison.rms, comparison.only_here, comparison.only_there) == (0, (), ())


def test_checkpoints_without_a_common_tensor_are_refused(world):
    tiny.write("c.safetensors", {"x": np.ones(3, np.float32)})
    with pytest.raises(
        MismatchError, match=r"'c\.safetensors' has no tensor of the same name and shape"
    ):
        run_inspect("a.safetensors", "c.safetensors")


def test_the_command_prints_tables_for_people_and_one_document_for_machines(world):
    tiny.write("b.safetensors", {n: t * 2 for n, t in world[0].items()})
    done = CliRunner().invoke(app, ["inspect", "a.safetensors", "b.safetensors", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["comparison"]["relative"] == pytest.approx(1)
    for text in (
        "transformer.h.10",
        "difference to b.safetensors",
        "ggn, of these weights, for 100 tokens",
    ):
        assert text in done.stderr
    quiet = CliRunner().invoke(app, ["inspect", "a.safetensors", "-q"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    missing = CliRunner().invoke(app, ["inspect", "no.safetensors"])
    assert missing.exit_code == 2
    assert "no such file or folder" in missing.stderr


@pytest.mark.parametrize("axis", [1, None], ids=["row", "tensor"])
def test_a_pooled_precision_is_reported_as_if_spread_out(world, axis):
    precision = world[1]
    pooled = {
        n: p.mean(axis=axis if p.ndim > 1 else None, keepdims=True) for n, p in precision.items()
    }
    pooled["transformer.wte.weight"][0] = 0
    pooled["score.weight"][0] = np.nan
    tiny.write("pooled.safetensors", pooled)
    tiny.write(
        "spread.safetensors", {n: np.broadcast_to(p, SHAPES[n]).copy() for n, p in pooled.items()}
    )
    short, long = (
        run_inspect("a.safetensors", precision=f"{n}.safetensors") for n in ("pooled", "spread")
    )
    assert short.layers == long.layers
    assert short.precision.unknown == ()
    assert (short.precision.zeros, short.precision.bad) == (
        long.precision.zeros,
        long.precision.bad,
    )
    assert (short.precision.covered, short.precision.numbers) == (
        1,
        sum(p.size for p in pooled.values()),
    )
    pooled_note = (
        f"the precision is pooled: {short.precision.numbers:,} numbers stand for "
        f"{long.parameters:,} parameters"
    )
    assert [n for n in short.notes if n not in long.notes] == [pooled_note]
    shown = CliRunner().invoke(
        app, ["inspect", "a.safetensors", "--precision", "pooled.safetensors"]
    )
    assert pooled_note in " ".join(shown.stderr.split())


def test_inspect_needs_no_torch(world):
    code = (
        "import sys; from mergekit_bayes.inspect import run_inspect; "
        "run_inspect('a.safetensors'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_adapter_on_its_base_shows_the_record_of_its_precision(tmp_path):
    folder, name = base(tmp_path / "base"), tmp_path / "ad"
    adapter(name, made := factors(0), precision=precise(made, 0))
    report = run_inspect(f"{folder}+{name}")
    alone = run_inspect(str(name))
    assert report.path == f"{folder}+{name}"
    assert report.precision.info == alone.precision.info
    assert report.precision.belongs is True
    assert not any("does not say where it comes from" in note for note in report.notes)


@pytest.mark.parametrize("axis", [None, 1], ids=["entry", "row"])
def test_the_width_of_draws_stands_beside_that_of_the_stored_precision(world, axis):
    mean, precision = world[0], tiny.precisions(0, SHAPES, low=20, high=30)
    if axis is not None:
        precision = {n: t.mean(t.ndim - 1, keepdims=True) for n, t in precision.items()}
    info = tiny.info(
        "a.safetensors",
        prior=Prior(kind="isotropic", precision=15),
        predictive=Predictive(prior=50, temperature=0.01),
    )
    save_posterior(Path("a.safetensors"), precision, info, force=True)
    ratios = [
        np.median(np.sqrt(0.01 / (precision[n] - 15 + 50))) / np.sqrt(np.mean(mean[n] ** 2))
        for n, shape in SHAPES.items()
        if len(shape) > 1
    ]
    done = CliRunner().invoke(app, ["inspect", "a.safetensors", "--json"])
    summary = json.loads(done.stdout)["precision"]
    assert summary["draws_over_rms"] == pytest.approx(np.median(ratios), rel=0.02)
    assert summary["info"]["predictive"] == {"prior": 50, "temperature": 0.01}
    assert (
        "draws for predictions (bmerge evaluate --samples): prior 50, temperature 0.01, "
        f"sigma / RMS {summary['draws_over_rms']:.2g}\n"
    ) in done.stderr
    assert "stored precision, 1/weight^2, which merges read" in done.stderr


def test_a_record_without_draws_for_predictions_has_no_line_about_them(world):
    tiny.posterior("proper.safetensors", *world, prior=0.05)
    done = CliRunner().invoke(app, ["inspect", "proper.safetensors", "--json"])
    assert "draws for predictions" not in done.stderr
    assert json.loads(done.stdout)["precision"]["draws_over_rms"] is None


def test_the_screen_shows_health_that_exists_and_counts_in_full(world):
    health = {"kappa": 0.0, "hess_noise": 0.0, "init_fraction": 0.0, "hess_min": 0.01149}
    health |= {"sigma_over_rms": 0.15, "not_positive": 20288.0, "precision_max": 1773.81}
    training = {"optimizer": "ivon", "ess": 1e6, "seed": 1234, "antithetic": False}

    def shown(name, **changes):
        tiny.posterior(name, *world, training=training | changes, health=health)
        done = CliRunner().invoke(app, ["inspect", name, "--json"])
        assert json.loads(done.stdout)["precision"]["info"]["health"] == health
        return done.stderr

    ggn = shown("g.safetensors", curvature="ggn", damping=0.01149)
    assert (
        "health: damped hess_min 0.01149, sigma_over_rms of the training 0.15, not_positive "
        "20,288, precision_max 1774\n"
    ) in ggn
    assert "ess 1,000,000, seed 1234, antithetic False, curvature ggn, damping 0.01149\n" in ggn
    price = shown("p.safetensors", curvature="price", damping=0)
    assert "kappa 0, hess_noise 0, init_fraction 0, hess_min 0.01149" in price
    texts = [inspect._setting("x", value) for value in (10**400, 1e300, float("nan"), 0.5, [1])]
    assert texts == [str(10**400), "1e+300", "nan", "0.5", "[1]"]


@pytest.mark.parametrize(("width", "quantiles"), [(160, 7), (80, 3), (60, 1)])
def test_a_narrow_screen_breaks_no_number(world, width, quantiles):
    """It shows fewer quantiles, and cuts long names in the middle."""
    prefix = "base_model.model.language_model_with_a_long_name."
    mean, precision = ({f"{prefix}{n}": t for n, t in part.items()} for part in world)
    tiny.posterior("long.safetensors", mean, {n: t * 1.2345e-4 for n, t in precision.items()})
    tiny.write("other.safetensors", {n: t * np.float32(1.0123) for n, t in mean.items()})
    report = run_inspect("long.safetensors", "other.safetensors")
    screen, file = Screen(), io.StringIO()
    screen.rich = Console(file=file, force_terminal=True, width=width, color_system=None)
    inspect._show(screen, report)
    rows = [line.split() for line in file.getvalue().splitlines()]
    kept = {7: range(7), 3: (0, 3, 6), 1: (3,)}[quantiles]
    for part in report.layers:
        cells = [
            row[1:] for row in rows if row and row[0] == inspect._middle_cut(part.name, len(row[0]))
        ]
        stored, gap = part.precision, part.difference
        assert cells == [
            [f"{part.parameters:,}", f"{part.rms:.3g}", f"{part.largest:.3g}"],
            [*(f"{stored.quantiles[i]:.3g}" for i in kept), f"{stored.sigma_ratio:.4g}"],
            [f"{gap.rms:.3g}", f"{gap.relative:.4g}", f"{gap.largest:.3g}"],
        ]


def test_only_a_long_name_is_cut_in_the_middle():
    assert inspect._middle_cut("transformer.h.10", 16) == "transformer.h.10"
    assert inspect._middle_cut("transformer.h.10", 11) == "tran...h.10"
