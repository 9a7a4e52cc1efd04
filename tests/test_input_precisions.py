"""`bmerge precision --estimator inputs`: what it stores, and what merges, reads and refuses it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.curvature import Keeping
from mergekit_bayes.curvature.inputs import input_covariance
from mergekit_bayes.curvature.sums import Sums
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.merge import MergeConfig, predict_merges, run_merge
from mergekit_bayes.merge.layer_posteriors import RIDGE
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import find_places
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.pooling import write_pooled
from mergekit_bayes.precision import PrecisionConfig, keeping, matrices
from mergekit_bayes.precision.run import run_precision
from tests import tiny
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_mixtral

TEXTS = ["the cat sat .", "a good film", "dull tree", "dog ran on the mat and saw the bird"] * 3
EXPERT = "model.layers.0.block_sparse_moe.experts.2"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    for i, name in enumerate(("base", "a", "b")):
        tiny_gpt2(folder / "gpt2" / name, seed=i)
        tiny_llama(folder / "llama" / name, seed=i)
    for kind in ("gpt2", "llama"):
        for name in ("base", "a", "b"):
            estimate(folder, f"{kind}/{name}")
    tiny_mixtral(folder / "mixtral")
    return folder


def tiny_llama(folder, seed):
    """A Llama with a head of its own, and the tokenizer of a tiny GPT-2."""
    tiny_gpt2(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=27, num_attention_heads=2, pad_token_id=2, initializer_range=0.2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def estimate(world, model, **settings):
    settings = {"data": str(world / "t.jsonl"), "estimator": "inputs", "batch_size": 2} | settings
    return run_precision(PrecisionConfig(model=str(world / model), **settings), quiet=True)


def matrices_of(model):
    """The matrices of a stored precision in float64, each with its inputs first among rows."""
    with open_posterior(str(model)) as opened:
        found = {}
        for name in opened.precision.matrices:
            (part,) = opened.precision.parts(name)
            blocks = np.float64(tiny.read_precision(model)[name])
            found[name] = (
                blocks.reshape(blocks.shape[-3:] if part[0] == "r" else blocks.shape[:3]),
                part,
            )
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_they_are_the_sums_over_the_rows_scaled_to_all_the_data(world, tmp_path, kind):
    out = tmp_path / "x.posterior"
    report = estimate(world, f"{kind}/a", output=str(out), examples=5, prior=0.5, batch_size=1)
    assert (report.sampled, report.estimator) == (5, "inputs")
    loaded = load_model(str(world / kind / "a"))
    examples = encode_rows({"text": TEXTS}, loaded)
    total = input_covariance(loaded.model, batches(examples, 4, Collate(loaded.pad)))
    assert report.observations == total.observations
    stored = tiny.read_precision(world / kind / "a")
    scaled = tiny.read_precision(world / kind / "a", out)
    assert len(total.matrices) == 8
    for name in total.matrices:
        matrix = total.total[name].numpy()
        matrix = matrix[..., None] if kind == "gpt2" else matrix
        np.testing.assert_allclose(stored[name], matrix, rtol=1e-4, atol=1e-4 * abs(matrix).max())
    # Of some rows it is another sum, which stands for all; the prior is on the diagonal.
    name = next(n for n in total.matrices if "o_proj" in n or "attn.c_proj" in n)
    traces = [
        np.einsum("kiia->" if kind == "gpt2" else "kii->", x) for x in (scaled[name], stored[name])
    ]
    assert traces[0] == pytest.approx(traces[1], rel=0.6)
    assert traces[0] != pytest.approx(traces[1], rel=1e-3)


@pytest.mark.parametrize("anchor", ["h0", "none"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_merge_by_them_is_the_formula(world, tmp_path, monkeypatch, kind, anchor):
    monkeypatch.chdir(world / kind)
    scales, out = (1.0, 0.5), tmp_path / "out"
    report = run_merge(
        MergeConfig(
            models=["a", "b"],
            base="base",
            weights="precision",
            scale=scales,
            anchor=anchor,
            counts="recorded",
            out=str(out),
        )
    )
    means = {n: tiny.read(Path(n)) for n in ("base", "a", "b")}
    stored = {n: matrices_of(Path(n)) for n in means}
    merged = tiny.read(out)
    assert len(stored["base"]) == 8
    for name, (_, part) in stored["base"].items():
        assert part == f"{'left' if kind == 'gpt2' else 'right'}:{name}"
        a0, a, b = (stored[n][name][0][0] for n in means)
        a0 = a0 + RIDGE * max(map(np.linalg.norm, (a0, a, b))) * np.eye(len(a0))
        w0, wa, wb = (np.float64(means[n][name]) for n in means)
        if kind == "gpt2":
            w0, wa, wb = w0.T, wa.T, wb.T
        pull = a0 if anchor == "h0" else 0
        moved = scales[0] * (wa - w0) @ (pull + a) + scales[1] * (wb - w0) @ (pull + b)
        expected = w0 + moved @ np.linalg.inv(a0 + scales[0] * a + scales[1] * b)
        found = merged[name].T if kind == "gpt2" else merged[name]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
    # They are no curvature of the loss, of which an increase in nats could be said.
    assert [p.nats for p in report.predicted] == [None] * 3
    assert [p.trusted for p in report.predicted] == [None] * 3
    assert any("no increase of the loss is predicted" in note for note in report.notes)


def test_other_blocks_are_told_of_by_their_number(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / "gpt2")
    other = str(tmp_path / "b.posterior")
    estimate(world, "gpt2/b", blocks=2, examples=4, output=other)
    with pytest.raises(PrecisionError, match=r"`bmerge precision b .* --blocks 1 -o OTHER`"):
        run_merge(MergeConfig(models=["a", "b"], weights="precision", precision={"b": other}))


@pytest.mark.parametrize("settings", [{"weights": "precision"}, {"method": "ties"}], ids=str)
def test_no_loss_is_predicted_from_them(world, monkeypatch, settings):
    monkeypatch.chdir(world / "gpt2")
    asked = MergeConfig(models=["a", "b"], base="base", **settings)
    with pytest.raises(ConfigError, match=r"'base' has the covariance of inputs.*no curvature"):
        predict_merges(asked, [(1.0,)])


def test_the_experts_of_a_file_have_their_own(world):
    estimate(world, "mixtral", blocks=2, force=True)
    stored = tiny.read_precision(world / "mixtral")
    loaded = load_model(str(world / "mixtral"))
    examples = encode_rows({"text": TEXTS}, loaded)
    steps = batches(examples, 4, Collate(loaded.pad))
    total = input_covariance(loaded.model, steps, keep=Keeping(blocks=2)).total
    for parts, name in ((("w1", "w3"), "gate_up_proj"), (("w2",), "down_proj")):
        for part in parts:
            found = stored[f"{EXPERT}.{part}.weight"]
            expected = total[f"model.layers.0.mlp.experts.{name}"][2].numpy()
            assert found.shape == expected.shape == ((2, 4, 4) if part != "w2" else (2, 6, 6))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(found).max())
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert stored[router].shape == tiny.read(world / "mixtral")[router].shape


def test_the_experts_of_a_file_may_be_of_low_rank(world, tmp_path):
    out = str(tmp_path / "x.posterior")
    estimate(world, "mixtral", rank=2, output=out)
    with open_posterior(str(world / "mixtral"), precision=out) as opened:
        for part, inputs in (("w1", 8), ("w2", 12)):
            name = f"{EXPERT}.{part}.weight"
            parts = opened.precision.parts(name)
            shapes = [opened.precision.in_files.specs[p].shape for p in parts]
            assert shapes == [(inputs,), (2, inputs)]


def test_layers_that_blocks_do_not_divide_are_named(world, tmp_path):
    report = estimate(world, "llama/a", blocks=3, output=str(tmp_path / "x.posterior"))
    assert "8 linear layers have matrices, which took 0.0 MB" in report.notes[0]
    assert "7 of them have one block" in report.notes[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_wide_layers_they_may_be_of_low_rank(world, tmp_path, kind):
    out, rank = tmp_path / "x.posterior", 4
    in_full, common = tmp_path / "full.posterior", {"prior": 0.5, "examples": 6}
    estimate(world, f"{kind}/a", output=str(in_full), **common)
    report = estimate(world, f"{kind}/a", output=str(out), rank=rank, **common)
    with open_posterior(str(world / kind / "a"), precision=str(in_full)) as full:
        matrices = {n: read_tensor(full.precision, n) for n in full.precision.matrices}
    with open_posterior(str(world / kind / "a"), precision=str(out)) as opened:
        found = opened.precision
        assert set(found.matrices) == set(matrices)
        low = {n for n in matrices if found.parts(n)[0].startswith("diagonal:")}
        for name, matrix in matrices.items():
            exact = np.float64(matrix.reshape(matrix.shape[1:3]))
            assert (name in low) == (len(exact) > 2 * rank)
            parts = [np.float64(read_tensor(found.in_files, part)) for part in found.parts(name)]
            if name in low:
                diagonal, factor = parts
                assert found.parts(name)[1] == f"{'left' if kind == 'gpt2' else 'right'}:{name}"
                kept = np.diag(diagonal) + factor.T @ factor
                np.testing.assert_allclose(np.diag(kept), np.diag(exact), rtol=1e-5)
                off = exact - np.diag(np.diag(exact))
                assert np.linalg.norm(kept - exact) < 0.5 * np.linalg.norm(off)
            else:
                np.testing.assert_allclose(parts[0][0], exact, rtol=1e-5, atol=1e-5)
    assert len(low) >= 2
    note = re.search(
        r"(\d+) of them are a diagonal and a factor of rank 4.* ([\d.]+)% of the sum",
        report.notes[1],
    )
    assert int(note[1]) == len(low)
    assert 50 < float(note[2]) <= 100


REFUSED = {
    "pool": ({"pool": "row"}, "--pool row takes the mean of numbers"),
    "a model in parts": ({"device": "auto"}, "2 processes have a part of each"),
    "a rank and blocks": ({"rank": 4, "blocks": 2}, "--rank 4 makes .* no --blocks 2"),
    "a rank of products": ({"rank": 4, "estimator": "kronecker"}, "no --estimator kronecker"),
    "blocks of numbers": (
        {"estimator": "ggn", "blocks": 2},
        "--blocks 2 cuts the matrices of --estimator inputs alone",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_do_not_go_with_matrices_are_refused(world, tmp_path, monkeypatch, kind):
    settings, message = REFUSED[kind]
    if "device" in settings:
        for module in (keeping, matrices):
            monkeypatch.setattr(module, "launched", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        estimate(world, "gpt2/a", output=str(tmp_path / "x"), **settings)


def test_adapters_are_refused(world, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(world / "llama" / "a")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"is an adapter.*Merge it into its base first"):
        estimate(world, str(tmp_path / "adapter"))


@pytest.mark.parametrize("rank", [None, 2])
def test_numbers_that_overflow_are_refused(tmp_path, world, rank):
    tiny_bert(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = tiny.read(file)
    file.unlink()
    weights["bert.pooler.dense.weight"] *= 0
    weights["bert.encoder.layer.1.output.LayerNorm.weight"][:] = 1e22
    tiny.write(file, weights)
    with pytest.raises(PrecisionError, match=r"bert.pooler.dense.weight.*not finite"):
        estimate(world, str(tmp_path / "m"), rank=rank)
    assert not (tmp_path / "m" / "posterior").exists()


@pytest.mark.parametrize("rank", [None, 4])
def test_a_stopped_estimate_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch, rank):
    common = {"save_every": 0, "rank": rank}
    estimate(world, "llama/a", output=str(tmp_path / "whole.posterior"), **common)
    add, calls = Sums.add_products, []

    def fails(self, *arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise CheckpointError("the plug was pulled")
        add(self, *arguments)

    monkeypatch.setattr(Sums, "add_products", fails)
    out = {"output": str(tmp_path / "x.posterior")}
    with pytest.raises(CheckpointError, match="the plug"):
        estimate(world, "llama/a", **common, **out)
    calls.clear()
    other, message = (
        ({"rank": 5}, "rank was 4 and is 5") if rank else ({"blocks": 2}, "blocks was 1")
    )
    with pytest.raises(ConfigError, match=message):
        estimate(world, "llama/a", resume=True, **(common | other), **out)
    estimate(world, "llama/a", resume=True, **common, **out)
    assert len(calls) == 8 * 3
    assert (tmp_path / "x.posterior").read_bytes() == (tmp_path / "whole.posterior").read_bytes()


def test_the_command_says_of_what_the_median_is(world, tmp_path):
    line = ["precision", str(world / "gpt2" / "a"), "--data", str(world / "t.jsonl")]
    for name, of in (("inputs", " of what has no matrices"), ("fisher-empirical", "")):
        out = str(tmp_path / f"{name}.posterior")
        done = CliRunner().invoke(app, [*line, "--estimator", name, "-o", out])
        assert done.exit_code == 0, done.output
        assert f"median precision{of} " in done.stderr.split("(1/weight^2)")[0]
        assert (" of what" in done.stderr) == bool(of)


def test_inspect_shows_the_diagonals(world):
    model = world / "gpt2" / "a"
    report = run_inspect(str(model))
    assert (report.precision.matrices, report.precision.covered, report.precision.bad) == (8, 1, 0)
    assert "draws are made entry by entry" in report.precision.not_samplable
    assert any("8 tensors have matrices" in note for note in report.notes)
    diagonals = [
        np.einsum("kii->ki", blocks).max()
        for name, (blocks, _) in matrices_of(model).items()
        if "h.1" in name
    ]
    (layer,) = [layer for layer in report.layers if layer.name.endswith("h.1")]
    assert layer.precision.quantiles[-1] == pytest.approx(max(diagonals), rel=1e-6)
    assert layer.precision.parameters == layer.parameters


def test_a_push_takes_them_as_they_are(world, tmp_path):
    model = world / "gpt2" / "a"
    with open_posterior(str(model)) as opened:
        write_pooled(opened.precision, opened.info, tmp_path, "row")
    before = tiny.read_precision(model)
    after = tiny.read_precision(model, tmp_path)
    for name in matrices_of(model):
        np.testing.assert_array_equal(after[name], before[name])
    assert after["transformer.wte.weight"].shape == (27, 1)


def test_what_reads_numbers_refuses_them_by_name(world):
    loaded = load_model(str(world / "gpt2" / "a"))
    with (
        open_posterior(str(world / "gpt2" / "a")) as opened,
        pytest.raises(PrecisionError, match=r"matrices \(--estimator inputs\).*--estimator ggn"),
    ):
        find_places(loaded.model, opened)
