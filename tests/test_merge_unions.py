"""`--vocab union`: tokens of all models in one output, from the plan to the loaded files."""

import json

import numpy as np
import pytest

from mergekit_bayes.checkpoint.tokenizer_parts import read_parts
from mergekit_bayes.checkpoint.tokenizers import read_tokens
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.merge.run import plan_hash
from mergekit_bayes.plan import plan_merge
from tests import tiny, tokenized
from tests.adapters import adapter, factors
from tests.tokenized import EMBEDDING, HEAD, bpe

MERGES = [("a", "b"), ("c", "d")]


def merge(out, *models, **settings):
    config = MergeConfig(models=tuple(map(str, models)), out=str(out), vocab="union", **settings)
    return run_merge(config)


@pytest.fixture
def folders(tmp_path):
    """A base, and two tasks that added tokens of their own; the second has another order."""
    return [
        tokenized.model(tmp_path / name, bpe(MERGES, added, alphabet=list(alphabet)), i)
        for i, (name, added, alphabet) in enumerate(
            (("base", [], "abcd"), ("x", ["<x>"], "abcd"), ("y", ["<y>", "<x>"], "dcba"))
        )
    ]


def rows_of(folder, out, name=EMBEDDING):
    """The rows of a model by the output's numbers, as float64; NaN where it lacks the token."""
    numbers, own = read_parts(out).numbers, read_parts(folder).numbers
    stored = tiny.read(folder)[name].astype(np.float64)
    rows = np.full((max(numbers.values()) + 1, stored.shape[1]), np.nan)
    for token, number in numbers.items():
        if token in own:
            rows[number] = stored[own[token]]
    return rows


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_of_the_same_token_are_merged(tmp_path, folders, dtype):
    for i, folder in enumerate(folders):
        rows = read_tokens(folder).count
        tokenized.tensors(folder, rows, i, dtype=dtype)
    base, x, y = folders
    out = tmp_path / "out"
    report = merge(out, x, y, base=str(base), scale=(0.5, 0.25))
    tokens = read_tokens(base).tokens
    assert read_tokens(out).tokens == {**tokens, 9: "<x>", 10: "<y>"}
    for name in (EMBEDDING, HEAD):
        of_base, of_x, of_y = (rows_of(folder, out, name) for folder in folders)
        of_x[10] = of_y[10]
        of_base[9], of_base[10] = (of_x[9] + of_y[9]) / 2, of_y[10]
        expected = of_base + 0.5 * (of_x - of_base) + 0.25 * (of_y - of_base)
        found = tiny.read(out)[name]
        precision = 2e-6 if dtype == "F32" else 2.0**-8
        np.testing.assert_allclose(found, expected, rtol=precision, atol=precision)
    with plan_merge(
        MergeConfig(models=(str(x),), base=str(base), out=str(tmp_path / "2"), vocab="union")
    ) as plan:
        assert {step.spec.dtype for step in plan.steps} == {dtype}
    loaded = tokenized.ids(out)
    assert loaded.tokenize("ab<y>cd<x>") == ["ab", "<y>", "cd", "<x>"]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 11
    assert any("new" in note for note in report.notes)


def test_the_same_merge_follows_from_its_recipe(tmp_path, folders):
    base, x, y = folders
    merge(tmp_path / "one", x, y, base=str(base))
    from mergekit_bayes.recipes import read_recipe

    recipe = read_recipe(tmp_path / "one/merge_recipe.yaml")
    run_merge(MergeConfig(**{**recipe, "out": str(tmp_path / "two")}))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_merge_does_not_go_on_by_other_numbers_of_tokens(tmp_path, folders):
    base, x, y = folders
    config = MergeConfig(
        models=(str(x), str(y)), base=str(base), out=str(tmp_path / "out"), vocab="union"
    )
    hashes = set()
    for tokenizer in (None, bpe(MERGES, ["<y>", "<x>"], alphabet=list("cdba"))):
        if tokenizer is not None:
            tokenized.save(y, tokenizer)
        for _ in range(2):
            with plan_merge(config) as plan:
                hashes.add(plan_hash(plan))
                assert plan.made_files["tokenizer.json"]
    assert len(hashes) == 2


def test_special_tokens_in_configs_keep_their_meaning(tmp_path, folders):
    base, x, y = folders
    y_config = json.loads((y / "config.json").read_text()) | {"eos_token_id": 9}  # <y>
    (y / "config.json").write_text(json.dumps(y_config))
    generation = {"eos_token_id": [9, 2], "pad_token_id": 10, "bos_token_id": 1}
    (y / "generation_config.json").write_text(json.dumps(generation))
    merge(tmp_path / "out", y, x, base=str(base))
    numbers = read_parts(tmp_path / "out").numbers
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == numbers["<y>"]
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["eos_token_id"] == [numbers["<y>"], 2]
    assert written["pad_token_id"] == numbers["<x>"]


@pytest.mark.parametrize("place", ["config", "file"])
def test_the_chat_template_of_a_task_is_kept(tmp_path, folders, place):
    base, x, y = folders
    if place == "config":
        tokenized.save(y, bpe(MERGES, ["<y>", "<x>"], alphabet=list("dcba")), chat_template="<y>!")
    else:
        (y / "chat_template.jinja").write_text("<y>!")
    merge(tmp_path / "out", y, x, base=str(base))
    loaded = tokenized.ids(tmp_path / "out")
    text = loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<y>!"
    assert (
        loaded.encode(text, add_special_tokens=False)[0]
        == read_parts(tmp_path / "out").numbers["<y>"]
    )


def test_models_of_one_tokenizer_are_merged_as_without_the_flag(tmp_path, folders):
    base = folders[0]
    other = tokenized.model(tmp_path / "other", bpe(MERGES), 7)
    merge(tmp_path / "one", other, base=str(base))
    run_merge(MergeConfig(models=(str(other),), base=str(base), out=str(tmp_path / "two")))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_adapter_that_brings_tokens_is_a_model_with_them(tmp_path, folders):
    base, x, _ = folders
    adapter_folder = tmp_path / "adapter"
    tokenized.save(adapter_folder, bpe(MERGES, ["<z>"]))
    whole = tiny.arrays(8, {EMBEDDING: (10, tokenized.WIDTH), HEAD: (10, tokenized.WIDTH)})
    adapter(adapter_folder, factors(1, layers={tokenized.LINEAR: (4, 5)}), whole=whole)
    out = tmp_path / "out"
    merge(out, x, f"{base}+{adapter_folder}", base=str(base))
    numbers = read_parts(out).numbers
    assert (numbers["<x>"], numbers["<z>"]) == (9, 10)
    found = tiny.read(out)
    for name in (EMBEDDING, HEAD):
        np.testing.assert_allclose(found[name][10], whole[name][9], rtol=1e-6)
        np.testing.assert_allclose(found[name][9], tiny.read(x)[name][9], rtol=1e-6)
        of_base, of_x = tiny.read(base)[name], tiny.read(x)[name]
        expected = of_x[:9] + whole[name][:9] - of_base
        np.testing.assert_allclose(found[name][:9], expected, rtol=1e-5, atol=1e-6)


def test_precisions_of_other_rows_are_refused(tmp_path, folders):
    base, x, _ = folders
    isotropic = {str(base): 1.0, str(x): 2.0}
    with pytest.raises(MismatchError, match=r"'.*base' gets other rows by --vocab union"):
        merge(tmp_path / "out", x, base=str(base), weights="precision", isotropic=isotropic)
    assert not (tmp_path / "out").exists()


def test_stale_lists_of_tokens_are_not_copied(tmp_path, folders):
    base, x, _ = folders
    for folder in (base, x):
        (folder / "vocab.json").write_text("{}")
        (folder / "merges.txt").write_text("")
    merge(tmp_path / "out", x, base=str(base))
    assert {"vocab.json", "merges.txt"}.isdisjoint(p.name for p in (tmp_path / "out").iterdir())
