"""Precisions and models that do not belong together are refused before a merge."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import three_models, tiny
from tests.three_models import merge

world = three_models.world


def test_only_asks_for_the_precisions_that_it_needs(world):
    partial = {k: v for k, v in tiny.precisions(1).items() if k != "wte.weight"}
    tiny.posterior("p.safetensors", tiny.arrays(1), partial)
    merge("p", base="base", weights="precision", only="attn", out="x.safetensors")
    with pytest.raises(PrecisionError, match=r"no precision for 'wte\.weight'"):
        merge("p", base="base", weights="precision", out="y.safetensors")


def test_a_file_without_a_precision_is_told_to_run_its_models_folder(world):
    tiny.write("bare.safetensors", tiny.arrays(1))
    with pytest.raises(
        PrecisionError,
        match=r"`bmerge precision FOLDER --data TEXTS -o bare\.posterior`",
    ):
        merge("bare", "b", weights="precision", out="x.safetensors")


def test_a_precision_of_other_weights_is_refused(world):
    tiny.write("a.safetensors.new", {k: v + 1 for k, v in world["a"][0].items()})
    Path("a.safetensors.new").rename("a.safetensors")
    with pytest.raises(PrecisionError, match=r"'a.safetensors' .*other weights"):
        merge("a", "b", weights="precision")


def test_one_model_that_is_named_twice_is_told(world):
    tiny.posterior("copy.safetensors", *world["a"])
    for models, is_told in ((("a", "copy"), True), (("a", "a"), True), (("a", "b"), False)):
        out = f"{'-'.join(models)}-out.safetensors"
        notes = merge(*models, weights="precision", out=out).notes
        assert any("hold the same weights: one model" in note for note in notes) == is_told


def test_verify_sees_a_change_between_the_sampled_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = {"w": (400, 400)}
    for i, name in enumerate("ab"):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
    raw = bytearray(Path("a.safetensors").read_bytes())
    at = len(raw) - 400 * 400 * 4 + 30_000  # between two of the sixteen blocks
    raw[at] ^= 1
    Path("a.safetensors").write_bytes(raw)
    merge("a", "b", weights="precision", out="x.safetensors")
    with pytest.raises(PrecisionError, match="differs from the weights"):
        merge("a", "b", weights="precision", verify=True, out="y.safetensors")


def test_different_estimators_or_units_are_refused(world):
    tiny.posterior("e.safetensors", *world["a"], unit="example")
    with pytest.raises(PrecisionError, match="different kinds"):
        merge("e", "b", weights="precision")
    tiny.posterior("f.safetensors", *world["a"], estimator="fisher")
    command = r"`bmerge precision b\.safetensors --data TEXTS --estimator fisher -o OTHER`"
    with pytest.raises(PrecisionError, match=command):
        merge("f", "b", weights="precision")
    tiny.posterior("m.safetensors", *world["a"], estimator="adam")
    with pytest.raises(PrecisionError, match=r"`bmerge precision m\.safetensors --data"):
        merge("m", "f", weights="precision")


def test_regmean_without_a_precision_names_the_command_of_the_kind_that_it_needs(world):
    Path("a.posterior").unlink()
    with pytest.raises(PrecisionError, match=r"a\.posterior --estimator inputs`.*--precision"):
        merge("a", "b", method="regmean")


SOFTMAX, SQUARED = "softmax cross-entropy", "squared error, mean over the outputs"


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ((SOFTMAX, SOFTMAX), None),
        ((SOFTMAX, SQUARED), f"different losses.*'a' has that of {SOFTMAX}, 'b' has .*{SQUARED}"),
        ((None, SQUARED), "'a': .*does not record its loss.*make it again"),
        ((None, SOFTMAX), None),  # the unit of softmax has always been the same
        ((None, None), None),
    ],
)
def test_precisions_of_different_losses_are_told(world, tmp_path, losses, note):
    folder = tmp_path / "losses"
    for name, loss in zip("ab", losses, strict=True):
        training = {} if loss is None else {"loss": loss}
        tiny.posterior(folder / f"{name}.safetensors", *world[name], training=training)
    refs = [str(folder / f"{name}.safetensors") for name in "ab"]
    report = merge_of(refs, folder / "ab.safetensors")
    notes = [n.replace(f"{folder}/", "").replace(".safetensors", "") for n in report.notes]
    told = [n for n in notes if "loss" in n]
    assert [bool(re.search(note or "^$", n)) for n in told] == [True] * (note is not None)
    # A merge is of the losses of its terms, and tells of them where it is merged again.
    recorded = read_info_of(folder / "ab.safetensors").training
    assert recorded == ({"loss": "; ".join(sorted(set(losses) - {None}))} if any(losses) else {})
    report = merge_of([str(folder / "ab.safetensors"), refs[1]], folder / "abb.safetensors")
    assert any("different losses" in n for n in report.notes) == (
        SOFTMAX in losses and note is not None
    )


def merge_of(refs, out):
    return run_merge(MergeConfig(models=refs, weights="precision", out=str(out)))


def read_info_of(path):
    with open_posterior(str(path)) as posterior:
        return posterior.info


def with_tokenizer(folder, name, words):
    """A model folder whose tokenizer gives these words the numbers 0, 1, ..."""
    tiny.write(folder / name / "model.safetensors", tiny.arrays(len(name)))
    vocabulary = {word: i for i, word in enumerate(words)}
    content = {
        "model": {"vocab": vocabulary},
        "added_tokens": [{"id": len(words), "content": "<pad>"}],
    }
    (folder / name / "tokenizer.json").write_text(json.dumps(content))
    return str(folder / name)


def test_models_whose_token_numbers_mean_other_tokens_are_refused(tmp_path):
    one = with_tokenizer(tmp_path, "one", ["the", "cat", "sat"])
    same = with_tokenizer(
        tmp_path, "same", ["the", "cat", "sat", "on"]
    )  # 3 is <pad> in one, and a word here
    other = with_tokenizer(tmp_path, "other", ["cat", "the", "sat"])
    out = str(tmp_path / "out")
    with pytest.raises(MismatchError, match=r"2 token numbers .* \(0 is 'cat' there, 'the' here"):
        run_merge(MergeConfig(models=(one, other), out=out))
    with pytest.raises(MismatchError, match="1 token number stands"):
        run_merge(MergeConfig(models=(one, same), out=out))
    report = run_merge(MergeConfig(models=(one, other), out=out, vocab="base"))
    assert report.copied == {"wte.weight": "tokenizers differ; --vocab base"}
    (tmp_path / "same" / "tokenizer.json").write_text(
        (tmp_path / "one" / "tokenizer.json").read_text() + "\n"
    )
    run_merge(MergeConfig(models=(one, same), out=out, force=True))  # another file, the same tokens


def test_a_recipe_notices_that_a_model_changed(world):
    merge("a", "b", base="base", out="x.safetensors")
    recipe = MergeConfig(**yaml.safe_load(Path("x.merge_recipe.yaml").read_text()))
    run_merge(recipe.model_copy(update={"out": "again.safetensors"}))
    assert Path("again.safetensors").read_bytes() == Path("x.safetensors").read_bytes()
    Path("a.safetensors").unlink()
    tiny.write("a.safetensors", tiny.arrays(99))
    with pytest.raises(
        MismatchError, match=r"'a\.safetensors' is not what the recipe was made with"
    ):
        run_merge(recipe.model_copy(update={"out": "more.safetensors"}))
