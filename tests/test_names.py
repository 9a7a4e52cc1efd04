"""Names of one checkpoint as names of another, and what is no parameter."""

import numpy as np
import pytest

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.checkpoint.ties import stored_copies


def test_one_common_prefix_is_found_in_both_directions():
    short = {"wte.weight", "h.0.attn.weight", "ln_f.bias"}
    long = {f"transformer.{n}" for n in short} | {"lm_head.weight"}
    assert find_renaming(short, long) == Renaming(strip="transformer.")
    assert find_renaming(long, short) == Renaming(add="transformer.")
    rename = find_renaming(short, long)
    assert {rename(n, short) for n in long} == short | {"lm_head.weight"}


def test_names_that_agree_are_left_alone():
    names = {"a.b", "b", "a.c"}
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
