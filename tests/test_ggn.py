"""Root-GGN of language models and classifiers against the exact diagonal."""

import doctest

import pytest
import torch

from mergekit_bayes.curvature import ggn
from mergekit_bayes.curvature.ggn import ggn_diagonal, random_root, random_signs
from mergekit_bayes.models.encode import Collate, batches, encode_rows, observations
from mergekit_bayes.models.load import load_model
from tests.cases import exact_ggn_diagonal, flat, output_factor
from tests.tiny_models import tiny_bert, tiny_gpt2

ROWS = {"text": ["the cat sat on the mat .", "a dog ran", "good film"]}


@pytest.mark.parametrize("kind", ["causal-lm", "classification", "multi-label"])
def test_many_draws_average_to_the_exact_diagonal(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "causal-lm":
        loaded = load_model(str(tiny_gpt2(tmp_path, layers=1, width=8)))
    else:
        problem = "multi_label_classification" if kind == "multi-label" else None
        loaded = load_model(str(tiny_bert(tmp_path, labels=3, problem_type=problem)))
    examples = encode_rows(ROWS, loaded)
    (batch,) = batches(examples, 3, Collate(2))

    logits = loaded.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if kind == "causal-lm":
        logits = logits[:, :-1][batch["labels"][:, 1:] != -100]
    likelihood = "bernoulli" if kind == "multi-label" else "categorical"
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    exact = exact_ggn_diagonal(likelihood, logits, parameters)
    if kind == "multi-label":  # transformers takes the mean over the three labels
        exact = [total / 3 for total in exact]
    draws = 600 if kind == "causal-lm" else 2000
    estimate = ggn_diagonal(loaded.model, [batch] * draws, seed=1)
    assert estimate.observations == draws * observations(examples, loaded.task)
    a = flat(exact)
    b = flat(estimate.total[n] for n, _ in loaded.model.named_parameters()) / draws
    assert (b[a == 0] == 0).all()
    big = a > a.max() * 1e-6
    deviation = (2 / draws) ** 0.5  # relative, of one entry; entries of one draw move together
    assert (b.sum() / a.sum()).item() == pytest.approx(1, abs=4 * deviation)
    assert ((b[big] / a[big]) - 1).abs().max() < 8 * deviation
    assert ((b[big] / a[big]) - 1).abs().mean() < 2 * deviation


def test_the_examples_of_the_estimator_run():
    assert doctest.testmod(ggn) == (0, 2)  # two lines, no failure


def test_the_random_root_has_the_right_second_moment():
    z = torch.tensor([[2.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    v = random_root(z.expand(200_000, 3), "categorical", generator)
    factor = output_factor("categorical", z[0])
    torch.testing.assert_close(v.T @ v / len(v), factor, rtol=0, atol=2e-3)
    assert v.abs().max() <= 2.0


def test_padding_and_unscored_labels_add_nothing(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path)))
    (long,) = batches(encode_rows({"text": [ROWS["text"][0]]}, loaded), 1, Collate(2))
    padded = {
        "input_ids": torch.nn.functional.pad(long["input_ids"], (0, 5), value=2),
        "attention_mask": torch.nn.functional.pad(long["attention_mask"], (0, 5)),
        "labels": torch.nn.functional.pad(long["labels"], (0, 5), value=-100),
    }
    a, b = (ggn_diagonal(loaded.model, [x], seed=0) for x in (long, padded))
    assert a.observations == b.observations
    for name, value in a.total.items():
        torch.testing.assert_close(value, b.total[name], rtol=1e-3, atol=1e-6)


def test_frozen_parameters_have_no_curvature_and_the_mode_is_kept(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path)))
    loaded.model.transformer.wte.weight.requires_grad_(False)
    loaded.model.train()
    examples = encode_rows(ROWS, loaded)
    estimate = ggn_diagonal(loaded.model, batches(examples, 2, Collate(2)))
    assert loaded.model.training
    assert "transformer.wte.weight" not in estimate.total
    assert "transformer.wpe.weight" in estimate.total


@pytest.mark.parametrize("draws_words", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (257, 513), (0, 4)])
def test_signs_are_those_of_torch_wherever_they_are_drawn(monkeypatch, shape, draws_words):
    if not draws_words:
        monkeypatch.setattr(ggn, "_draws_words", lambda: False)
    drawn, expected = (torch.Generator().manual_seed(9) for _ in range(2))
    for dtype in (torch.float32, torch.float64):  # the second starts where the first ended
        signs = random_signs(torch.empty(shape, dtype=dtype), drawn)
        torch_signs = torch.empty(shape, dtype=dtype).bernoulli_(0.5, generator=expected) * 2 - 1
        assert torch.equal(signs, torch_signs)


def test_signs_of_words_are_even_on_every_processor():
    signs = ggn._signs_of_words(torch.empty(400, 500), torch.Generator().manual_seed(2))
    assert torch.equal(signs.abs(), torch.ones(400, 500))
    assert abs(signs.mean()) < 4 / 200_000**0.5
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / 200_000**0.5
