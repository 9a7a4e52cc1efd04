"""Adapters of models whose vocabulary was resized are read as PEFT merges them, or refused."""

import json
from itertools import product

import numpy as np
import pytest
import torch
import transformers

from mergekit_bayes.checkpoint import ties
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.lora import kept_heads, open_adapted, open_adapter
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior
from tests import tiny
from tests.adapters import BASE, factors, tensors_of, written

PREFIX = "base_model.model."
EMBEDDING, HEAD, WTE = "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"
ADVICE = "save_embedding_layers=True"
SAVED = ("", "embed_tokens", "lm_head", "embed_tokens lm_head")
QUICK = ((True, 10, "embed_tokens", "q_proj"), (False, 10, SAVED[3], "q_proj"))
CASES = (
    *QUICK,
    *product((True, False), (10, 6), SAVED, ("q_proj",)),
    *product((True, False), (10, 6), SAVED[:2], ("q_proj lm_head",)),
)


def values(ref):
    """All tensors of an adapted base."""
    with open_adapted(ref) as opened:
        return {name: read_tensor(opened.mean, name) for name in opened.mean.specs}


def resized_by_peft(folder, tied, rows, saved, targets, save):
    """A base and an adapter in `folder`; returns the tensors that PEFT merges."""
    peft = pytest.importorskip("peft")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    settings = peft.LoraConfig(
        r=2, target_modules=targets.split(), modules_to_save=saved.split() or None
    )
    model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "a", save_embedding_layers=save)
    return {n: t.numpy() for n, t in model.merge_and_unload().state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tied", "rows", "saved", "targets"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in dict.fromkeys(CASES)
    ],
)
def test_what_peft_writes_after_resizing_is_what_peft_merges_or_refused_with_advice_that_works(
    tmp_path, tied, rows, saved, targets
):
    errors = {}
    for save in (True, "auto", False):
        if not saved and save is False:
            continue  # nothing in the adapter tells of the resizing
        folder = tmp_path / str(save)
        merged = resized_by_peft(folder, tied, rows, saved, targets, save)
        try:
            found = values(f"{folder / 'base'}+{folder / 'a'}")
        except MismatchError as error:
            errors[save] = str(error)
            assert "resized" in errors[save] or "ties its head" in errors[save]
            continue
        for name, expected in merged.items():
            # A head that is not stored is the embedding.
            own = found[EMBEDDING if name == HEAD and HEAD not in found else name]
            np.testing.assert_allclose(own, expected, atol=2e-6, err_msg=f"{save} {name}")
    assert bool(errors.get(True)) == ("lm_head" in targets and not saved)
    assert ADVICE not in errors.get(True, "")
    if errors.keys() == {False} and "lm_head" not in targets:
        assert ADVICE in errors[False]


@pytest.mark.parametrize("order", [1, -1])
def test_equal_copies_of_one_tensor_count_once_and_the_one_with_a_precision_does(tmp_path, order):
    shapes = BASE | {EMBEDDING: (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(9, shapes))
    embedding = np.float32(np.arange(32).reshape(8, 4))
    plain, saved = PREFIX + EMBEDDING, f"{PREFIX}model.embed_tokens.modules_to_save.weight"
    copies = [plain, saved, f"{PREFIX}model.embed_tokens.original_module.weight"]
    stored = tensors_of(factors(0))
    second = {n.replace(".weight", ".default.weight"): t.copy() for n, t in stored.items()}
    stored |= {name: embedding.copy() for name in copies[::order]} | second
    folder = written(tmp_path / "a", stored, modules_to_save=["embed_tokens"])
    np.testing.assert_array_equal(values(f"{tmp_path / 'base'}+{folder}")[EMBEDDING], embedding)
    with open_adapter(str(folder)) as opened:
        assert opened.replacements == {EMBEDDING: saved}
        assert {plain, copies[2]} < {*opened.unused}
        assert len(opened.unused) == 2 + len(second)
        note = opened.unused_note
    assert f"the base's own copies of modules that it replaces ('{copies[2]}', 1 such)" in note
    assert f"second copies of tensors under other names ('{opened.unused[0]}'" in note or order < 0
    with SafetensorsSource(checkpoint_files(folder)) as source:
        info = {"estimator": "ggn", "unit": "token", "observations": 10.0, "ess": 10.0}
        record = PosteriorInfo(mean=identify(source), **info)
    save_posterior(folder, {plain: embedding + 1}, record)
    with open_adapter(str(folder)) as opened:
        assert opened.replacements == {EMBEDDING: plain}
    for name in (plain, saved, next(iter(second))):  # which of two different ones is unknown
        other = tmp_path / name
        different = stored | {name: stored[name] + np.float32(1)}
        written(other, different, modules_to_save=["embed_tokens"])
        with pytest.raises(CheckpointError, match="are one tensor of the model, and their values"):
            open_adapter(str(other))


def causal(folder, shapes):
    """A causal language model, which ties its head where it stores none."""
    tiny.write(folder / "model.safetensors", tiny.arrays(9, BASE | shapes))
    settings = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 6}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
BERT = {
    WORDS: (6, 4),
    "cls.predictions.transform.dense.weight": (4, 4),
    "cls.predictions.bias": (6,),
}
RESIZED = {WORDS: (8, 4), f"{DECODER}.weight": (8, 4), f"{DECODER}.bias": (8,)}


@pytest.mark.parametrize(
    ("stored", "held", "advice"),
    [
        ({WTE: (6, 4)}, {WTE: (8, 4)}, ADVICE),
        ({WTE: (6, 4)}, {WTE: (5, 4)}, ADVICE),
        ({WTE: (6, 4)}, {HEAD: (8, 4)}, ADVICE),
        ({WTE: (6, 4)}, {WTE: (8, 4), HEAD: (7, 4)}, ADVICE),
        ({WTE: (6, 4), HEAD: (6, 4)}, {WTE: (8, 4)}, ADVICE),
        ({WTE: (6, 4), HEAD: (6, 4)}, {HEAD: (8, 4)}, ADVICE),
        (BERT, {WORDS: (8, 4)}, ADVICE),
        (BERT, RESIZED, r"resized\. Fold it"),
    ],
)
def test_an_embedding_and_a_head_of_different_rows_are_never_written(
    tmp_path, stored, held, advice
):
    folder = causal(tmp_path / "base", stored)
    whole = {PREFIX + n: t for n, t in tiny.arrays(5, held).items()}
    ref = f"{folder}+{written(tmp_path / 'a', tensors_of(factors(0)) | whole)}"
    config = MergeConfig(models=(ref,), base=str(folder), vocab="common", out=str(tmp_path / "out"))
    with pytest.raises(MismatchError, match=f"whose rows are equal.*{advice}"):
        run_merge(config)
    # A task without such a head does not use the base's.
    headless = written(tmp_path / "b", tensors_of(factors(0)) | whole, task_type="SEQ_CLS")
    assert {n: t.shape for n, t in values(f"{folder}+{headless}").items()}.items() >= held.items()


def test_rows_that_differ_in_the_base_and_equal_ones_are_read(tmp_path):
    for i, (stored, held) in enumerate(
        (
            ({WTE: (6, 4), HEAD: (8, 4)}, {WTE: (7, 4)}),
            ({WTE: (6, 4), HEAD: (6, 4)}, {WTE: (8, 4), HEAD: (8, 4)}),
            ({WTE: (6, 4)}, {WTE: (8, 4), HEAD: (8, 4)}),
            ({WTE: (6, 4)}, {WTE: (6, 4)}),
        )
    ):
        folder = causal(tmp_path / f"base{i}", stored)
        whole = {PREFIX + n: t for n, t in tiny.arrays(5, held).items()}
        ref = f"{folder}+{written(tmp_path / f'a{i}', tensors_of(factors(0)) | whole)}"
        assert {n: t.shape for n, t in values(ref).items()}.items() >= held.items()


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_opening_an_adapted_base_looks_at_each_name_a_few_times(tmp_path, monkeypatch, count):
    looked_at = []

    def find_ties(shapes):
        looked_at.append(len(shapes))
        return ties.find_ties(shapes)

    monkeypatch.setattr(kept_heads, "find_ties", find_ties)
    one = np.ones((1, 1), np.float32)
    modules = [f"m.{i}.q" for i in range(count)]
    causal(tmp_path / "base", {f"{m}.weight": (1, 1) for m in modules} | {WTE: (6, 1)})
    made = {f"{PREFIX}{m}.lora_{side}.weight": one.copy() for m in modules for side in "AB"}
    made[PREFIX + WTE] = np.ones((6, 1), np.float32)
    written(tmp_path / "a", made, r=1)
    with open_adapted(f"{tmp_path / 'base'}+{tmp_path / 'a'}") as opened:
        assert HEAD in opened.mean.specs  # it stays the base's embedding
    assert sum(looked_at) < 8 * count
