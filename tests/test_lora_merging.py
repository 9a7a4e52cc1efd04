"""Adapters merge as their products do, and the result is an adapter that PEFT loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.lora import merge_adapters, open_adapted, products
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import identify
from tests import tiny
from tests.adapters import LAYERS, adapter, base, factors, peft_adapter, precise, product
from tests.reference import lora as twin
from tests.tiny_models import tiny_gpt2


def two(tmp_path, **config):
    """Two adapters with precisions; the second holds no `m.k` and has another rank and scaling."""
    one, other = factors(1), factors(2, rank=3, layers={"m.q": (6, 4), "m.wide": (3, 70)})
    adapter(tmp_path / "a", one, precision=precise(one, 1), **config)
    adapter(tmp_path / "b", other, alpha=5, use_rslora=True, precision=precise(other, 2), **config)
    return [str(tmp_path / n) for n in "ab"]


def test_concatenation_is_the_task_arithmetic_of_the_products(tmp_path):
    refs = two(tmp_path)
    report = merge_adapters(refs, tmp_path / "out", scales=(0.8, -0.5), space="concat")
    assert report.rank == 5
    assert report.largest_error < 1e-6
    for module in LAYERS:
        expected = 0.8 * product(refs[0], module) - (
            0.5 * product(refs[1], module) if module != "m.k" else 0
        )
        np.testing.assert_allclose(product(tmp_path / "out", module), expected, atol=1e-5)
    assert (
        json.loads((tmp_path / "out" / "merge_report.json").read_text())["layers"]["m.k"][
            "adapters"
        ]
        == 1
    )


def test_adapters_whose_names_differ_by_a_prefix_are_matched_and_their_bases_compared(tmp_path):
    made = factors(1)
    adapter(tmp_path / "a", made)
    adapter(
        tmp_path / "b",
        {f"model.{m}": f for m, f in factors(2).items()},
        base_model_name_or_path="other",
    )
    refs = [str(tmp_path / n) for n in "ab"]
    report = merge_adapters(refs, tmp_path / "out", rank=4)
    assert set(report.layers) == set(LAYERS)
    assert report.notes == (
        f"'{refs[0]}' names the base 'base', '{refs[1]}' 'other': taken to be the same",
    )
    expected = product(refs[0], "m.q") + product(refs[1], "model.m.q")
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=1e-5)
    for i, name in enumerate("cd"):
        with SafetensorsSource(
            [tiny.write(tmp_path / f"base{i}" / "model.safetensors", tiny.arrays(i))]
        ) as source:
            adapter(
                tmp_path / name, made, precision=precise(made, 0), info={"base": identify(source)}
            )
    with pytest.raises(MismatchError, match="trained on different weights"):
        merge_adapters([str(tmp_path / n) for n in "cd"], tmp_path / "no", weights="precision")


def test_product_space_at_full_rank_is_concatenation_and_below_it_the_best_of_its_rank(tmp_path):
    refs = two(tmp_path)
    merge_adapters(refs, tmp_path / "concat", scales=(0.8, -0.5), space="concat")
    for rank in (5, 2):
        report = merge_adapters(refs, tmp_path / f"svd{rank}", scales=(0.8, -0.5), rank=rank)
        for module in LAYERS:
            exact, found = (
                product(tmp_path / "concat", module),
                product(tmp_path / f"svd{rank}", module),
            )
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            np.testing.assert_allclose(error, twin.lost(exact, rank), atol=1e-6)
            np.testing.assert_allclose(report.layers[module].error, error, atol=1e-6)
            np.testing.assert_allclose(report.layers[module].norm, np.linalg.norm(exact), rtol=1e-5)
    assert merge_adapters(refs, tmp_path / "usual").rank == 3


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_precision_weights_are_those_of_the_products(tmp_path, monkeypatch, block):
    monkeypatch.setattr(products, "_BLOCK", block)
    refs = two(tmp_path)
    report = merge_adapters(refs, tmp_path / "out", weights="precision", scales=(1.0, 2.0), rank=4)
    pairs = [factors(1), factors(2, rank=3, layers={"m.q": (6, 4), "m.wide": (3, 70)})]
    spreads = [precise(pairs[0], 1), precise(pairs[1], 2)]
    strengths = [
        1 / twin.variance(*p["m.q"], *(1 / s for s in v["m.q"]), c)
        for p, v, c in zip(pairs, spreads, (1.5, 5 / np.sqrt(3)), strict=True)
    ]
    expected = twin.weighted([product(r, "m.q") for r in refs], strengths, (1.0, 2.0))
    np.testing.assert_allclose(product(tmp_path / "out", "m.q"), expected, atol=2e-5)
    assert report.layers["m.q"].error < 1e-6  # rank 4 is all of a 6 x 4 matrix
    np.testing.assert_allclose(product(tmp_path / "out", "m.k"), product(refs[0], "m.k"), atol=2e-5)


def test_equal_counts_take_every_precision_for_the_smallest_number_of_observations(tmp_path):
    made = factors(1)
    stored = precise(made, 1)
    adapter(tmp_path / "a", made, precision=stored)
    tenfold = {m: Factors(*(10 * s for s in p)) for m, p in stored.items()}
    adapter(
        tmp_path / "b", factors(2), precision=tenfold, info={"observations": 1000.0, "ess": 1000.0}
    )
    adapter(tmp_path / "c", factors(2), precision=stored)
    refs = [str(tmp_path / n) for n in "abc"]
    many = merge_adapters(refs[:2], tmp_path / "ab", weights="precision", rank=4)
    assert many.counts == (100.0, 100.0)
    merge_adapters([refs[0], refs[2]], tmp_path / "ac", weights="precision", rank=4)
    recorded = merge_adapters(
        refs[:2], tmp_path / "own", weights="precision", counts="recorded", rank=4
    )
    assert recorded.counts == (100.0, 1000.0)
    np.testing.assert_allclose(
        product(tmp_path / "ab", "m.q"), product(tmp_path / "ac", "m.q"), atol=1e-5
    )
    apart = [
        np.linalg.norm(product(tmp_path / out, "m.q") - product(refs[1], "m.q"))
        for out in ("own", "ab")
    ]
    assert apart[0] < apart[1]


def test_a_merged_adapter_loads_in_peft_and_does_what_the_products_do(tmp_path):
    peft = pytest.importorskip("peft")
    folder = tiny_gpt2(tmp_path / "base")
    common = {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": True,
        "base_model_name_or_path": str(folder),
    }
    peft_adapter(tmp_path / "a", folder, 1, r=2, lora_alpha=4, target_modules=["c_attn"], **common)
    peft_adapter(
        tmp_path / "b", folder, 2, r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], **common
    )
    refs = [str(tmp_path / n) for n in "ab"]
    tokens = torch.arange(12)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = name.removesuffix(".weight")
            for ref in refs:
                if name.endswith((".c_attn.weight", ".c_proj.weight")) and not (
                    ref == refs[0] and "c_proj" in name
                ):
                    weight += torch.from_numpy(0.5 * product(ref, module).T).float()
        expected = model(tokens).logits
        for space, rank in (("product", 5), ("concat", None)):
            merge_adapters(refs, tmp_path / space, scales=(0.5,), space=space, rank=rank)
            bare = transformers.AutoModelForCausalLM.from_pretrained(folder)
            loaded = peft.PeftModel.from_pretrained(bare, tmp_path / space)
            torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_fine_tuned_adapters_open_and_merge_with_the_posteriors_that_training_left(tmp_path):
    folder = tiny_gpt2(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text(
        "".join(f'{{"text": "the {w} sat on the mat"}}\n' for w in ("cat", "dog") * 8)
    )
    for i, name in enumerate("ab"):
        run_finetune(
            FinetuneConfig(
                model=str(folder),
                output=str(tmp_path / name),
                data=str(tmp_path / "t.jsonl"),
                batch_size=4,
                flush_batches=2,
                seed=i,
                lora={"r": 2, "target_modules": ["c_attn"]},
            ),
            quiet=True,
        )
    with open_adapted(f"{folder}+{tmp_path / 'a'}") as opened:
        assert opened.mean.notes == ()
        assert set(opened.precision.specs) == {
            f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)
        }
        for name in opened.precision.specs:
            found = read_tensor(opened.precision, name)
            assert np.isfinite(found).all()
            assert (found > 0).all()
    report = merge_adapters([str(tmp_path / n) for n in "ab"], tmp_path / "ab", weights="precision")
    assert report.notes == (report.rank_note,)
    assert report.counts[0] == report.counts[1] > 0
    assert load_model(str(tmp_path / "ab")).task == "causal-lm"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ab")


def test_side_files_travel_and_an_output_is_whole_or_absent(tmp_path):
    refs = two(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    merge_adapters(refs, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_recipe.yaml",
        "merge_report.json",
        "tokenizer.json",
    ]
    with pytest.raises(CheckpointError, match="exists"):
        merge_adapters(refs, tmp_path / "out")
    merge_adapters(refs, tmp_path / "out", scales=(2.0,), force=True)
    with pytest.raises(CheckpointError, match="would overwrite an adapter"):
        merge_adapters(refs, tmp_path / "a", force=True)
    made = factors(3, layers={"m.q": (6, 5)})
    adapter(tmp_path / "odd", made)
    with pytest.raises(MismatchError, match=r"\[6, 5\] in .* but of \[6, 4\]"):
        merge_adapters([refs[0], str(tmp_path / "odd")], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_options_that_contradict_each_other_are_named(tmp_path):
    refs = two(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="none below zero"):
        merge_adapters(refs, out, weights="precision", scales=(1, -1))
    with pytest.raises(ConfigError, match="weighs no entries"):
        merge_adapters(refs, out, weights="precision", space="concat")
    with pytest.raises(ConfigError, match="--rank is for"):
        merge_adapters(refs, out, space="concat", rank=4)
    with pytest.raises(ConfigError, match="3 given for 2"):
        merge_adapters(refs, out, scales=(1, 2, 3))
    places = {refs[0]: str(tmp_path / "b" / "posterior")}
    for given in ({"precision": places}, {"counts": "recorded"}):
        with pytest.raises(ConfigError, match="only matters where precisions weigh"):
            merge_adapters(refs, out, **given)
    with pytest.raises(ConfigError, match=r"--precision c=.*no such adapter"):
        merge_adapters(refs, out, weights="precision", precision={"c": places[refs[0]]})
    with pytest.raises(PrecisionError, match=r"b/posterior/.*taken at other weights"):
        merge_adapters(refs, out, weights="precision", precision=places)
    adapter(tmp_path / "c", factors(3))
    with pytest.raises(PrecisionError, match="no precision for"):
        merge_adapters([refs[0], str(tmp_path / "c")], out, weights="precision")
    adapter(
        tmp_path / "e", factors(3), precision=precise(factors(3), 0), info={"estimator": "ivon"}
    )
    with pytest.raises(PrecisionError, match="different kinds"):
        merge_adapters([refs[0], str(tmp_path / "e")], out, weights="precision")


def test_adapters_merge_whatever_their_configs_say_of_the_layout(tmp_path):
    """PEFT writes `fan_in_fan_out` as the last module needs it; factors are laid out alike."""
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, factors(seed), fan_in_fan_out=bool(seed))
    merge_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", space="concat")
    for module in LAYERS:
        expected = product(tmp_path / "a", module) + product(tmp_path / "b", module)
        np.testing.assert_allclose(product(tmp_path / "out", module), expected, atol=1e-6)


def test_adapters_that_record_other_bases_are_refused_though_no_precision_is_read(tmp_path):
    for seed, name in enumerate("ab"):
        folder = base(tmp_path / f"base-{name}", "F32" if seed else "BF16")
        with SafetensorsSource(checkpoint_files(folder)) as source:
            made, info = factors(seed), {"base": identify(source)}
            adapter(tmp_path / name, made, precision=precise(made, seed), info=info)
    with pytest.raises(MismatchError, match="were trained on different weights"):
        merge_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")


def test_adapters_whose_precisions_are_of_different_losses_are_told(tmp_path):
    for seed, (name, loss) in enumerate((("a", "one"), ("b", "one"), ("c", "another"))):
        made = factors(seed)
        adapter(
            tmp_path / name, made, precision=precise(made, seed), info={"training": {"loss": loss}}
        )
    for other, is_told in (("b", False), ("c", True)):
        refs = [str(tmp_path / "a"), str(tmp_path / other)]
        report = merge_adapters(refs, tmp_path / f"a{other}", weights="precision")
        assert any("different losses" in note for note in report.notes) == is_told


def test_a_recipe_of_adapters_gives_the_same_bytes_and_notices_a_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two(tmp_path)
    runner = CliRunner()
    line = [
        "merge",
        "a",
        "b",
        "--weights",
        "precision",
        "--scale",
        "0.25",
        "--scale",
        "0.75",
        "--rank",
        "3",
    ]
    done = runner.invoke(app, [*line, "-o", "one"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (
        runner.invoke(
            app, ["merge", "one/merge_recipe.yaml", "-o", "two"], catch_exceptions=False
        ).exit_code
        == 0
    )
    for file in ("adapter_model.safetensors", "merge_recipe.yaml"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    changed = runner.invoke(app, ["merge", "one/merge_recipe.yaml", "--rank", "1", "-o", "three"])
    assert changed.exit_code == 0
    assert (
        Path("three/adapter_model.safetensors").read_bytes()
        != Path("one/adapter_model.safetensors").read_bytes()
    )
    shutil.rmtree("a")
    adapter(tmp_path / "a", factors(7))
    broken = runner.invoke(app, ["merge", "one/merge_recipe.yaml", "-o", "four"])
    assert broken.exit_code == 2
    assert "not what the recipe was made with" in " ".join(broken.output.split())


def test_forcing_never_takes_away_what_is_no_output(tmp_path):
    refs = two(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="folder without a model"):
        merge_adapters(refs, tmp_path / "docs", force=True)
    with pytest.raises(CheckpointError, match=r"without a model|would overwrite"):
        merge_adapters(refs, tmp_path, force=True)
    with pytest.raises(ConfigError, match="an adapter is a folder"):
        merge_adapters(refs, tmp_path / "x.safetensors")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_adapters_load_no_heavy_library():
    code = (
        "import mergekit_bayes.lora, sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert not {"torch", "transformers", "peft", "safetensors", "scipy", "numba"} & set(
        done.stdout.split()
    )


@pytest.mark.parametrize("space", ["product", "core"])
def test_no_rank_is_stored_that_no_layer_can_have(tmp_path, space):
    made = factors(1, 7)  # above the ranks of all layers, of which the largest is 4
    refs = [str(adapter(tmp_path / "a", made))]
    for rank, notes in (
        (4000, ("rank 4 in place of 4000: no layer has a larger one",)),
        (None, ()),
    ):
        report = merge_adapters(refs, tmp_path / "out", space=space, rank=rank, force=True)
        assert (report.rank, report.exact_rank, report.notes) == (4, 4, notes)
        assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4
        for module in LAYERS:
            np.testing.assert_allclose(
                product(tmp_path / "out", module), product(refs[0], module), atol=1e-4
            )
    assert merge_adapters(refs, tmp_path / "factors", space="factor").rank == 7


def test_the_file_of_an_adapter_means_its_folder(tmp_path):
    refs = two(tmp_path)
    for name, given in (("x", refs), ("y", [f"{ref}/adapter_model.safetensors" for ref in refs])):
        for count in (1, 2):
            out = str(tmp_path / f"{name}{count}")
            done = CliRunner().invoke(app, ["merge", *given[:count], "--rank", "4", "-o", out])
            assert done.exit_code == 0, done.output
    for count in (1, 2):
        one, other = (
            (tmp_path / f"{name}{count}" / "adapter_model.safetensors").read_bytes()
            for name in "xy"
        )
        assert one == other
