"""Names of one checkpoint as names of another, and what is no parameter."""

import numpy as np
import pytest

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.renaming import NameChange, Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MemorySource, TensorSpec
from mergekit_bayes.checkpoint.ties import stored_copies


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
