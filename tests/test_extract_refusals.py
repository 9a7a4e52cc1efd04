"""What an extraction refuses: each in one message that names the cause and the way out."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.extract import ExtractConfig, run_extract
from mergekit_bayes.posterior.factors import Matrices
from tests import adapters, tiny

SHAPES = {
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.q_proj.weight": (4, 4),
    "model.layers.0.up_proj.weight": (6, 4),
    "model.layers.0.norm.weight": (4,),
}
UP = "model.layers.0.up_proj.weight"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def model(folder, tensors, dtype="F32", **config):
    tiny.write(folder / "model.safetensors", tensors, dtype)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture
def pair(tmp_path):
    base = tiny.arrays(0, SHAPES)
    tuned = base | {UP: base[UP] + np.float32(0.5)}
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    return tmp_path, base, tuned


def extract(root, tuned="tuned", base="base", out="out", **more):
    return run_extract(
        ExtractConfig(model=str(root / tuned), base=str(root / base), out=str(root / out), **more)
    )


def test_a_pair_that_fits_is_extracted(pair):
    report = extract(pair[0])
    assert list(report.layers) == ["model.layers.0.up_proj"]
    assert report.unchanged == 3


CHANGED = {
    "another shape": ({UP: (6, 5)}, r"up_proj.*\[6, 4\].*base.*\[6, 5\].*tuned.*--base"),
    "more rows of the vocabulary": (
        {"model.embed_tokens.weight": (9, 4)},
        "vocabulary was resized",
    ),
    "another tensor": ({"model.layers.1.up_proj.weight": (6, 4)}, "tuned' has .*layers.1.*lacks"),
    "an own head": ({"lm_head.weight": (7, 4)}, "head .*lm_head.* of its own.*tie_word_embeddings"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_models_that_are_not_of_one_architecture_are_refused(pair, case):
    root, _, tuned = pair
    shapes, message = CHANGED[case]
    shutil.rmtree(root / "tuned")
    model(root / "tuned", tuned | tiny.arrays(5, shapes))
    with pytest.raises(MismatchError, match=message):
        extract(root)
    assert not (root / "out").exists()


def test_a_missing_tensor_is_named(pair):
    root, _, tuned = pair
    shutil.rmtree(root / "tuned")
    model(root / "tuned", {n: t for n, t in tuned.items() if "q_proj" not in n})
    with pytest.raises(MismatchError, match=r"base' has .*q_proj.*'.*tuned' lacks"):
        extract(root)


def test_the_same_model_has_nothing_to_extract(pair):
    with pytest.raises(MismatchError, match="hold the same weights"):
        extract(pair[0], tuned="base")


def test_a_change_of_vectors_alone_makes_no_adapter(pair):
    root, base, _ = pair
    norm = "model.layers.0.norm.weight"
    model(root / "other", base | {norm: base[norm] + 1})
    with pytest.raises(MismatchError, match=r"only 'model\.layers\.0\.norm\.weight' differs"):
        extract(root, tuned="other", rest=True)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["tuned", "base"])
def test_entries_that_are_not_finite_are_named(pair, which, number):
    root, base, tuned = pair
    values = {"base": base, "tuned": tuned}[which]
    values[UP] = values[UP].copy()
    values[UP][1, 2] = number
    shutil.rmtree(root / which)
    model(root / which, values)
    with pytest.raises(CheckpointError, match=f"{which}.*up_proj.*not finite"):
        extract(root)


def test_a_change_that_no_float32_holds_is_named(pair):
    root, base, tuned = pair
    shutil.rmtree(root / "base")
    model(root / "base", base, "F64")
    far = tuned | {UP: np.full(SHAPES[UP], 1e39)}
    shutil.rmtree(root / "tuned")
    model(root / "tuned", far, "F64")
    with pytest.raises(CheckpointError, match=r"up_proj.*more than float32 holds"):
        extract(root)
    shutil.rmtree(root / "tuned")
    model(root / "tuned", tuned | {UP: np.full(SHAPES[UP], 1e12, np.float32)})
    with pytest.raises(CheckpointError, match=r"up_proj.*beyond F16\. Use --dtype F32"):
        extract(root, dtype="F16")


def test_quantised_models_are_refused(pair):
    root, base, _ = pair
    scale = {UP.replace("weight", "weight_scale_inv"): np.ones(1, np.float32)}
    model(root / "quantised", base | scale)
    for names in ({"base": "quantised"}, {"tuned": "quantised"}):
        with pytest.raises(MismatchError, match="quantised"):
            extract(root, **names)


def test_an_adapter_alone_is_no_model(pair):
    root = pair[0]
    adapters.adapter(root / "adapter", adapters.factors(0))
    with pytest.raises(ConfigError, match=r"an adapter without its base.*BASE\+"):
        extract(root, tuned="adapter")


def test_a_precision_that_is_asked_for_and_missing(pair):
    with pytest.raises(PrecisionError, match=r"no precision for .*bmerge precision"):
        extract(pair[0], weights="precision")


def test_a_precision_of_other_weights(pair):
    root, base, tuned = pair
    place = tiny.posterior(root / "p" / "model.safetensors", base, tiny.precisions(0, SHAPES))
    with pytest.raises(PrecisionError, match="taken at other weights"):
        extract(root, precision=str(place.with_suffix(".posterior")))
    own = tiny.posterior(root / "o" / "model.safetensors", tuned, tiny.precisions(0, SHAPES))
    report = extract(root, precision=str(own.with_suffix(".posterior")))
    assert report.unit == "nats"


def test_tensors_without_a_precision_are_told(pair):
    root, _, tuned = pair
    tuned["model.layers.0.q_proj.weight"] = tuned["model.layers.0.q_proj.weight"] + 1
    place = tiny.posterior(
        root / "o" / "model.safetensors", tuned, tiny.precisions(0, {UP: SHAPES[UP]})
    )
    (root / "o" / "config.json").write_text(json.dumps(CONFIG))
    assert place.exists()
    report = extract(root, tuned="o", precision=str(place.with_suffix(".posterior")))
    assert report.layers["model.layers.0.q_proj"].change is None
    assert report.layers["model.layers.0.up_proj"].change > 0
    assert any("q_proj" in note and "no precision" in note for note in report.notes)


def squares(after, before, weights=1.0):
    return 0.5 * float(np.sum(weights * (after.astype(np.float64) - before) ** 2))


def test_the_rank_and_what_is_left_out_are_told_apart(pair):
    """Without a precision: half the squares, as the words say, of the layers and of the rest."""
    root, base, tuned = pair
    rng, table = np.random.default_rng(3), "model.embed_tokens.weight"
    for name in (UP, table):
        tuned[name] = base[name] + rng.normal(size=base[name].shape).astype(np.float32)
    shutil.rmtree(root / "tuned")
    model(root / "tuned", tuned)
    report = extract(root, rank=1)
    found = report.losses["half the squared change"]
    sigma = np.linalg.svd(tuned[UP] - base[UP], compute_uv=False)
    assert found.layers_change == pytest.approx(0.5 * np.sum(sigma**2), rel=1e-4)
    assert found.layers_lost == pytest.approx(0.5 * np.sum(sigma[1:] ** 2), rel=1e-4)
    assert found.left_out == pytest.approx(squares(tuned[table], base[table]), rel=1e-4)
    assert report.change == pytest.approx(found.layers_change + found.left_out)
    assert report.lost == pytest.approx(found.layers_lost + found.left_out)
    (line,) = report.summary
    rank, left_out = line.split("; ")
    assert rank.startswith("in half the squared change: the rank loses ")
    assert f"{found.layers_lost:.4g} of the {found.layers_change:.4g} of 1 stored layer" in rank
    assert f"{found.layers_lost / found.layers_change:.2%}" in rank
    assert left_out == f"left out: {found.left_out:.4g} in 1 tensor ('{table}')"
    assert "1 changed tensor is left out" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("more", "cause"),
    [({"rank": 1}, "--rank 1"), ({"dtype": "BF16", "tolerance": 1e-6}, "rounding"), ({}, None)],
)
def test_a_tolerance_that_is_not_met_is_told_with_its_cause(pair, more, cause):
    root, base, tuned = pair
    rng, query = np.random.default_rng(3), "model.layers.0.q_proj.weight"
    tuned[UP] = base[UP] + rng.normal(size=base[UP].shape).astype(np.float32)
    tuned[query] = base[query] + np.float32(0.5)  # of rank 1
    shutil.rmtree(root / "tuned")
    model(root / "tuned", tuned)
    report = extract(root, **{"tolerance": 0.01, **more})
    notes = [note for note in report.notes if "--tolerance" in note]
    assert len(notes) == (cause is not None)
    if cause:
        share = report.layers["model.layers.0.up_proj"].share
        assert notes[0].startswith(f"{cause} keeps ")
        assert share > report.tolerance
        if cause == "--rank 1":
            assert "keeps 1 of 2 layers above --tolerance 0.01" in notes[0]
            assert f"'model.layers.0.up_proj' loses most, {share:.2%}" in notes[0]


def test_units_of_a_precision_of_inputs_are_never_added(pair):
    """Of matrices in squared outputs, and of what has one number an entry in nats."""
    root, base, tuned = pair
    rng = np.random.default_rng(4)
    tuned |= {n: t + rng.normal(size=t.shape).astype(np.float32) for n, t in base.items()}
    entries = {n: p * 1e6 for n, p in tiny.precisions(0, SHAPES).items()}
    covariance = np.eye(4, dtype=np.float32)[None]
    precision = entries | {UP: Matrices(covariance)}
    more = {"estimator": "inputs", "observations": 12.0, "ess": 12.0, "unit": "example"}
    place = tiny.posterior(root / "o" / "model.safetensors", tuned, precision, **more)
    (root / "o" / "config.json").write_text(json.dumps(CONFIG))
    where = str(place.with_suffix(".posterior"))
    report = extract(root, tuned="o", precision=where, weights="precision", rank=1)
    outputs, nats = (report.losses[unit] for unit in ("half the squared outputs", "nats"))
    assert report.unit == "half the squared outputs"
    assert outputs.change == pytest.approx(squares(tuned[UP], base[UP]), rel=1e-3)
    assert report.change == outputs.change
    assert outputs.left_out == 0
    expected = sum(squares(tuned[n], base[n], entries[n]) for n in SHAPES if n != UP)
    assert nats.change == pytest.approx(expected, rel=1e-3)
    assert nats.left_out > 1e3 * report.change
    first, second = sorted(report.summary, key=lambda line: "nats" in line)
    assert "summed over 12 examples" in first
    assert "left out" not in first
    assert "by the precision and no forecast" in second
    assert "embed_tokens" in second


@pytest.mark.parametrize("out", ["base", "tuned", "."])
def test_an_input_is_never_replaced(pair, out):
    with pytest.raises(CheckpointError, match=r"input|without a model"):
        extract(pair[0], out=out, force=True)
    assert (pair[0] / "base" / "model.safetensors").exists()


def test_an_output_that_exists_needs_force(pair):
    extract(pair[0])
    with pytest.raises(CheckpointError, match="exists"):
        extract(pair[0])
    extract(pair[0], force=True)
    with pytest.raises(ConfigError, match="an adapter is a folder"):
        extract(pair[0], out="a.safetensors")


def test_a_model_that_is_written_to_meanwhile_is_no_adapter(pair):
    root, base, _ = pair

    def write(done, of):
        if done == of:
            tiny.write(root / "base" / "new.safetensors", base)
            (root / "base" / "new.safetensors").replace(root / "base" / "model.safetensors")

    config = ExtractConfig(
        model=str(root / "tuned"), base=str(root / "base"), out=str(root / "out")
    )
    with pytest.raises(ChangedError):
        run_extract(config, progress=write)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank"),
        (["--tolerance", "0"], "--tolerance"),
        (["--tolerance", "1.5"], "--tolerance"),
        (["--weights", "frobenius"], "--weights"),
        (["--dtype", "F8_E4M3"], "--dtype"),
    ],
)
def test_flags_that_make_no_sense_end_in_one_message(pair, flags, message):
    words = [str(pair[0] / "tuned"), "--base", str(pair[0] / "base"), "-o", str(pair[0] / "out")]
    done = CliRunner().invoke(app, ["extract", *words, *flags])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_prints_a_table_notes_and_the_folder(pair):
    words = [str(pair[0] / "tuned"), "--base", str(pair[0] / "base"), "-o", str(pair[0] / "out")]
    done = CliRunner().invoke(app, ["extract", *words])
    assert done.exit_code == 0
    assert done.stdout == f"{pair[0] / 'out'}\n"
    lines = done.stderr.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("up_proj")) + 1]
    assert len(table) == 3  # a title, the columns and one row: nothing is folded
    assert table[0].strip() == "half the squared change"
    quiet = CliRunner().invoke(app, ["extract", *words, "-q", "--force"])
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_experts_and_routers_are_left_out_by_name(tmp_path):
    shapes = {
        "model.layers.0.q_proj.weight": (4, 4),
        "model.layers.0.mlp.gate.weight": (2, 4),
        "model.layers.0.mlp.experts.0.up_proj.weight": (6, 4),
        "model.layers.0.mlp.experts.down_proj": (2, 4, 6),
    }
    model(tmp_path / "base", tiny.arrays(0, shapes))
    model(tmp_path / "tuned", tiny.arrays(1, shapes))
    report = extract(tmp_path, rest=True)
    assert list(report.layers) == ["model.layers.0.q_proj"]
    experts = {n: o for n, o in report.others.items() if ".experts." in n}
    assert len(experts) == 2
    assert all("experts" in o.why and not o.stored for o in experts.values())
    assert any("target_parameters" in n and "whole model" in n for n in report.notes)
