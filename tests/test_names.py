"""Names of one checkpoint as names of another, and what is no parameter."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint import names
from mergekit_bayes.checkpoint.layers import group_layers
from mergekit_bayes.checkpoint.names import is_buffer, is_vocabulary, output_layer
from mergekit_bayes.checkpoint.renaming import NameChange, Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MemorySource, TensorSpec
from mergekit_bayes.checkpoint.ties import find_ties, stored_copies
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny


def specs(shapes):
    return {name: TensorSpec("F32", shape) for name, shape in shapes.items()}


def test_one_common_prefix_is_found_in_both_directions():
    short = specs({"wte.weight": (5, 2), "h.0.attn.weight": (2, 2), "ln_f.bias": (2,)})
    long = {f"transformer.{n}": s for n, s in short.items()} | specs({"lm_head.weight": (5, 2)})
    for donor, other, before, after in (
        (short, long, "transformer.*", "*"),
        (long, short, "*", "transformer.*"),
    ):
        renaming = find_renaming(donor, other)
        assert {renaming(n) for n in other} <= {*donor, "lm_head.weight"}
        assert renaming.changes == (NameChange(before, after, 3),)


def test_names_that_agree_are_left_alone():
    names = specs({"a.b": (2,), "b": (2,), "a.c": (2,)})
    assert find_renaming(names, names) == Renaming()


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("h.0.attn.bias", True),
        ("h.0.attn.masked_bias", True),
        ("embeddings.position_ids", True),
        ("model.rotary_emb.inv_freq", True),
        ("h.0.attn.c_attn.bias", False),
        ("position_embeddings.weight", False),
    ],
)
def test_buffers_are_known_by_name(name, buffer):
    assert is_buffer(name) == buffer


def test_a_tied_head_is_known_by_name_and_content():
    wte = np.arange(6, dtype=np.float32).reshape(3, 2)
    tied = MemorySource({"wte.weight": wte, "lm_head.weight": wte})
    untied = MemorySource({"wte.weight": wte, "lm_head.weight": wte + 1})
    assert stored_copies(tied) == {"lm_head.weight": "wte.weight"}
    assert stored_copies(untied) == {}


# Tied tensors of transformers whose rows are no tokens of text, or with two tensors for one table.
NO_TOKENS = re.compile(
    r"bbox|class_embed|codec|relative|patch|positional|entity|encoder\.out|ctc|eoi_|additional|layers"
    r"|norm|audio|embedding_projection|mim_head|mmm_image_head|^head\.weight"
)


OUTPUTS = r"head|proj|pred|loss|score|output\.|decoder\.(weight|bias)$"


def tied_names():
    """The names that transformers ties, read from its source: importing all of it takes minutes."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    for file in Path(folder, "models").glob("*/modeling_*.py"):
        for ties in re.findall(r"_tied_weights_keys\b[^={]*=\s*\{(.*?)\}", file.read_text(), re.S):
            yield from re.findall(r'"([^"]+)":\s*"([^"]+?)\$?"', ties)


def test_every_table_of_tokens_in_transformers_is_known_as_one():
    pairs = {pair for pair in tied_names() if not any(map(NO_TOKENS.search, pair))}
    assert len(pairs) > 60
    unknown = {name for pair in pairs for name in pair if not is_vocabulary(name)}
    assert not unknown
    heads = {head for pair in pairs for head in pair if re.search(OUTPUTS, head)}
    assert not {head for head in heads if not output_layer(head)}


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("transformer.word_embedding.weight", "lm_loss.weight"),
        ("transformer.tokens_embed.weight", "lm_head.weight"),
        ("transformer.embeddings.weight", "pred_layer.proj.weight"),
        ("model.decoder.embed_tokens.weight", "output_projection.weight"),
        ("decoder.embed_tokens.weight", "decoder.output_projection.weight"),
        ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"),
        ("vilt.embeddings.text_embeddings.word_embeddings.weight", "mlm_score.decoder.weight"),
        ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
        ("rwkv.embeddings.weight", "head.weight"),
    ],
)
def test_one_list_of_names_serves_ties_and_vocabularies_and_output_layers(
    tmp_path, embedding, head
):
    shapes = {embedding: (7, 4), head: (7, 4), "q.weight": (4, 4)}
    (tie,) = find_ties(shapes)
    assert (tie.source, tie.heads) == (embedding, (head,))
    assert output_layer(head)
    assert group_layers(shapes)["head"] == [head]
    if head == "head.weight":  # a classifier's in models of images
        return
    assert is_vocabulary(embedding)
    assert is_vocabulary(head)
    base = tiny.write(tmp_path / "b.safetensors", tiny.arrays(0, shapes))
    longer = {name: (9, 4) if shape[0] == 7 else shape for name, shape in shapes.items()}
    task = tiny.write(tmp_path / "x.safetensors", tiny.arrays(1, longer))
    out = tmp_path / "out.safetensors"
    run_merge(MergeConfig(models=(str(task),), base=str(base), out=str(out), vocab="common"))
    assert {name: values.shape for name, values in tiny.read(out).items()} == longer


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.proj_out.weight",
        "h.0.attn.output_projection.weight",
        "entity_predictions.decoder.weight",
        "model.layers.0.decoder.weight",
        "head.weight",
        "score.weight",
        "classifier.weight",
    ],
)
def test_other_layers_of_these_names_have_no_rows_of_tokens(name):
    assert not is_vocabulary(name)


def test_an_output_layer_is_named_by_the_word_that_says_so_and_is_in_no_numbered_layer():
    assert output_layer("cls.predictions.decoder.bias") == "cls"
    assert output_layer("model.score.weight") == "model.score"
    assert output_layer("classifier.out_proj.weight") == "classifier"
    assert output_layer("h.0.attn.score.weight") is None
    assert output_layer("decoder.layers.weight") is None
    assert output_layer("encoder.pre_norm.weight") is None
    assert names.is_label_head("classifier.out_proj.weight")
    assert not names.is_label_head("classifier.out_proj.bias")
