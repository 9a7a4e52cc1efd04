"""The token that is drawn without a sort is that of the sorted nucleus, to the bit."""

import numpy as np
import pytest
import torch

from mergekit_bayes.draws import word
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.generation.nucleus import gumbel, pick


def by_sorting(logits, keys, top_p):
    """The same token from the definition: falling probabilities, summed in float64."""
    p = logits.softmax(-1).numpy()
    falling = -np.sort(-p, axis=1)
    crossing = (np.cumsum(falling, axis=1, dtype=np.float64) < top_p).sum(axis=1)
    bound = falling[np.arange(len(p)), np.minimum(crossing, p.shape[1] - 1)]
    kept = p >= np.maximum(bound, np.finfo(np.float32).tiny)[:, None]
    tokens = np.arange(p.shape[1], dtype=np.uint64)
    with np.errstate(divide="ignore"):
        heights = np.log(p, dtype=np.float64) + gumbel(word(keys[:, None], tokens))
    return np.where(kept, heights, -np.inf).argmax(axis=1)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.9999, 1.0])
def test_tokens_are_those_of_the_sorted_nucleus(top_p):
    """Of flat, sharp and one-sided distributions, alone and in blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 0.3, 3.0, 40.0]).repeat_interleave(50)[:, None]
    logits = spread * torch.randn(200, 3000, generator=generator)
    keys = np.random.default_rng(1).integers(2**64, size=200, dtype=np.uint64)
    expected = by_sorting(logits, keys, top_p).tolist()
    assert pick(logits, keys, top_p).tolist() == expected
    assert [int(pick(logits[i : i + 1], keys[i : i + 1], top_p)) for i in range(200)] == expected


def test_tokens_tied_with_the_last_of_the_nucleus_are_all_drawn():
    """Of eight tokens of 1/16 and one of 1/2, a nucleus of 0.7 needs four; all eight tie."""
    logits = torch.tensor([[0.5] + [1 / 16] * 8]).log().expand(3000, -1)
    keys = np.random.default_rng(0).integers(2**64, size=3000, dtype=np.uint64)
    for top_p, drawn in ((0.7, 9), (0.5, 1)):
        tokens = pick(logits, keys, top_p).numpy()
        assert len(np.unique(tokens)) == drawn
        assert (tokens == by_sorting(logits, keys, top_p)).all()


def test_probabilities_that_are_no_numbers_are_refused():
    logits = torch.zeros(3, 8)
    logits[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        pick(logits, np.arange(3, dtype=np.uint64), 0.9)
