"""Rows of embeddings are merged only where they stand for one token in all models."""

import json
from itertools import permutations

import numpy as np
import pytest

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny
from tests.adapters import adapter, factors

TOKENS = 5  # that all models have
NAME = "wte.weight"


def model(folder, rows, tokens=None, seed=0, config=True):
    """A model whose embedding has so many rows, with these tokens after the common ones."""
    shapes = {NAME: (rows, 4), "h.0.w.weight": (3, 3)}
    tiny.write(folder / "model.safetensors", tiny.arrays(seed, shapes))
    if tokens is not None:
        listed = [f"t{i}" for i in range(TOKENS)] + list(tokens)
        vocabulary = {token: i for i, token in enumerate(listed)}
        content = json.dumps({"model": {"vocab": vocabulary}})
        (folder / "tokenizer.json").write_text(content)
    if config:
        content = {"model_type": "own", "vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def merge(out, *models, **settings):
    return run_merge(MergeConfig(models=models, out=str(out), force=True, **settings))


def written(out):
    """The embedding, its tokens by number, and `vocab_size`."""
    tokens = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((out / "config.json").read_text())
    return tiny.read(out)[NAME], {i: t for t, i in tokens.items()}, config["vocab_size"]


@pytest.mark.parametrize("sizes", [(7, 8), (8, 7), (7, 7)])
@pytest.mark.parametrize("base_rows", [TOKENS, 8])
@pytest.mark.parametrize("base", ["folder", "file", "no tokenizer", "none", "a task"])
def test_different_tokens_of_two_tasks_are_refused_whatever_the_base_is(
    tmp_path, sizes, base_rows, base
):
    rows = [max(n, base_rows) if base_rows > TOKENS else n for n in sizes]
    tasks = [
        model(tmp_path / name, n, [f"{name}{i}" for i in range(count - TOKENS)], seed)
        for seed, (name, n, count) in enumerate(zip("xy", rows, sizes, strict=True), start=1)
    ]
    has_tokens = base in ("folder", "a task")
    folder = model(tmp_path / "base", base_rows, () if has_tokens else None)
    if base == "file":
        folder = str((tmp_path / "base/model.safetensors").rename(tmp_path / "base.safetensors"))
    out = tmp_path / "out"
    for x, y in permutations(tasks):
        models = (folder, x, y) if base == "a task" else (x, y)
        settings = {"base": folder} if base not in ("a task", "none") else {}
        for vocab in ("error", "common"):
            with pytest.raises(MismatchError, match=rf"token number.* in '{y}' than in '{x}'"):
                merge(out, *models, vocab=vocab, **settings)
        if not has_tokens:
            continue
        merge(out, *models, vocab="base", **settings)
        embedding, tokens, size = written(out)
        np.testing.assert_array_equal(embedding, tiny.read(folder)[NAME])
        assert (len(tokens), size) == (TOKENS, base_rows)


def test_different_tokens_of_models_that_give_no_row_are_no_conflict(tmp_path):
    base = model(tmp_path / "base", TOKENS, ())
    x = model(tmp_path / "x", 7, ["x0", "x1"], 1)
    y = model(tmp_path / "y", 7, ["y0", "y1"], 2)
    out = tmp_path / "out"
    for scale in ((-1.0, 1.0), (0.0, 1.0)):
        merge(out, x, y, base=base, vocab="common", scale=scale)
        embedding, tokens, size = written(out)
        assert (tokens[5], tokens[6], size) == ("y0", "y1", 7)
        np.testing.assert_array_equal(embedding[5:], tiny.read(y)[NAME][5:])
    # A token without a row of its own.
    z = model(tmp_path / "z", TOKENS, ["<pad>"], 3)
    merge(out, z, y, base=base, vocab="common")
    assert written(out)[1][5] == "y0"


@pytest.mark.parametrize("order", ["".join(o) for o in permutations("abx")])
def test_the_rows_and_the_tokenizer_are_of_the_model_that_lists_the_most_tokens(tmp_path, order):
    base = model(tmp_path / "base", TOKENS, ())
    made = {
        "a": model(tmp_path / "a", 9, ["new0"], 1),  # three rows without a token
        "b": model(tmp_path / "b", 5, (), 2),
        "x": model(tmp_path / "x", 8, ["new0", "new1", "new2"], 3),
    }
    models = [made[name] for name in order]
    out = tmp_path / "out"
    for settings in ({"base": base}, {"base": base, "side_files": made["x"]}, {}):
        merge(out, *(models if settings else [base, *models]), vocab="common", **settings)
        embedding, tokens, size = written(out)
        np.testing.assert_array_equal(embedding[5:], tiny.read(made["x"])[NAME][5:])
        assert embedding.shape == (size, 4) == (8, 4)
        assert [tokens[i] for i in range(5, 8)] == ["new0", "new1", "new2"]


def test_a_named_tokenizer_must_agree_with_the_rows_that_are_written(tmp_path):
    base = model(tmp_path / "base", TOKENS, ())
    x = model(tmp_path / "x", 7, ["x0", "x1"], 1)
    y = model(tmp_path / "y", 7, ["y0", "y1"], 2)
    out = tmp_path / "out"
    settings = {"base": base, "vocab": "common", "scale": (0.0, 1.0)}
    with pytest.raises(MismatchError, match=rf"--side-files {x}: .* has other tokens than '{y}'"):
        merge(out, x, y, side_files=x, **settings)
    file = tmp_path / "base/model.safetensors"
    with pytest.raises(MismatchError, match=rf"--side-files {x}: .* has other tokens than '{y}'"):
        merge(
            out,
            x,
            y,
            side_files=x,
            **settings | {"base": str(file.rename(tmp_path / "b.safetensors"))},
        )


SHAPES = {"model.embed_tokens.weight": (5, 4), "lm_head.weight": (5, 4), "model.w.weight": (3, 3)}


@pytest.mark.parametrize(("embedding", "head"), [(7, 9), (9, 7), (7, 5), (5, 7)])
def test_an_embedding_and_a_head_with_different_rows_are_refused(tmp_path, embedding, head):
    longer = {"model.embed_tokens.weight": (embedding, 4), "lm_head.weight": (head, 4)}
    for name, shapes in (("base", SHAPES), ("x", SHAPES | longer)):
        tiny.write(tmp_path / name / "model.safetensors", tiny.arrays(len(name), shapes))
        content = {"model_type": "own", "vocab_size": 5, "tie_word_embeddings": False}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    base, x = str(tmp_path / "base"), str(tmp_path / "x")
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        with pytest.raises(MismatchError, match=rf"would have .*{embedding}.*{head} in '{x}'"):
            merge(out, x, base=base, vocab="common")
    merge(tmp_path / "out", x, base=base, vocab="base")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 5
    assert {t.shape for n, t in tiny.read(tmp_path / "out").items() if n != "model.w.weight"} == {
        (5, 4)
    }


def test_a_head_that_is_merged_without_its_embedding_is_refused(tmp_path):
    for name, rows in (("base", 5), ("x", 7)):
        shapes = {n: (rows, 4) if s == (5, 4) else s for n, s in SHAPES.items()}
        tiny.write(tmp_path / name / "model.safetensors", tiny.arrays(len(name), shapes))
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": false}')
    base, x = str(tmp_path / "base"), str(tmp_path / "x")
    with pytest.raises(MismatchError, match=r"'lm_head\.weight' would have 7 rows"):
        merge(tmp_path / "out", x, base=base, vocab="common", only="lm_head|model.w")
    merge(tmp_path / "out", x, base=base, vocab="common")
    assert {len(t) for t in tiny.read(tmp_path / "out").values()} == {7, 3}


@pytest.mark.parametrize(("said", "size"), [(5, 7), (4, 4), (6, None)])
def test_the_size_is_that_of_the_vocabulary_of_which_the_config_speaks(tmp_path, said, size):
    """Two vocabularies, of which one has more rows in the task."""
    for name, rows in (("base", 5), ("x", 7)):
        shapes = {"encoder.embed_tokens.weight": (rows, 4), "decoder.embed_tokens.weight": (4, 4)}
        tiny.write(tmp_path / name / "model.safetensors", tiny.arrays(len(name), shapes))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": said}))
    merge(tmp_path / "out", str(tmp_path / "x"), base=str(tmp_path / "base"), vocab="common")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"vocab_size": size or 7}


@pytest.mark.parametrize(("base_rows", "rows"), [(5, 7), (7, 5), (7, 7)])
def test_the_size_of_the_vocabulary_is_true_where_the_config_is_not_the_bases(
    tmp_path, base_rows, rows
):
    model(tmp_path / "base", base_rows)
    base = (tmp_path / "base/model.safetensors").rename(tmp_path / "base.safetensors")
    x = model(tmp_path / "x", rows, seed=1)
    merge(tmp_path / "out", x, base=str(base), vocab="common")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == max(base_rows, rows) == len(tiny.read(tmp_path / "out")[NAME])


def test_an_adapter_that_trained_a_longer_embedding_alone_is_refused(tmp_path):
    shapes = {"m.wte.weight": (5, 4), "m.lm_head.weight": (5, 4), "m.q.weight": (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, shapes))
    (tmp_path / "base/config.json").write_text('{"vocab_size": 5, "tie_word_embeddings": false}')
    made = factors(0, layers={"m.q": (6, 4)})
    whole = tiny.arrays(1, {"m.wte.weight": (8, 4)})
    base = str(tmp_path / "base")
    ref = f"{base}+{adapter(tmp_path / 'a', made, whole=whole, modules_to_save=['wte'])}"
    with pytest.raises(MismatchError, match="rows are equal in a model"):
        merge(tmp_path / "out", ref, base=base, vocab="common")
