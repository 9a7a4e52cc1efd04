"""The error of a K-prior's gradient, estimated without bias, falls as the memory grows."""

import itertools

import pytest
import torch

from mergekit_bayes.adapt.kprior import weight_penalty
from mergekit_bayes.adapt.reconstruction import Reconstruction, reconstruct
from mergekit_bayes.adapt.teacher import FrozenCopy
from tests.cases import Classifier, flat

COUNT = 700.0  # N_0


def moved_classifier(inputs=4, classes=3, problem=None, seed=0):
    """A generalised linear model away from its start, and the start."""
    torch.manual_seed(seed)
    model = Classifier(torch.nn.Linear(inputs, classes).double(), problem)
    start = FrozenCopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn(p.shape, dtype=p.dtype)
    return model, start


def inputs_of(count, width=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.linspace(0, 1, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def batch(inputs):
    return {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "labels": torch.zeros(len(inputs), dtype=torch.long),
    }


def gradient_of(model, start, inputs):
    """g of these inputs as all there are, of shape (P,), by J' (p - p_0)."""
    weights = list(model.parameters())
    logits, before = model(inputs).logits, start._model(inputs).logits
    if model.config.problem_type == "regression":
        residual = (logits - before).detach()
    else:
        residual = (logits.softmax(-1) - before.softmax(-1)).detach()
    return COUNT / len(inputs) * flat(torch.autograd.grad((residual * logits).sum(), weights))


def mean_over_pairs(model, start, memory, population, **options):
    """Mean of the estimates over all pairs of held-out rows that can be drawn: the expectation."""
    found = []
    for pair in itertools.product(range(len(population)), repeat=2):
        groups = [[batch(population[i : i + 1])] for i in pair]
        memory_batches = [batch(memory)] if len(memory) else []
        weights = {"memory_weight": COUNT, "base_weight": COUNT}
        found.append(reconstruct(model, start, memory_batches, groups, **weights, **options))
    return torch.tensor(found, dtype=torch.float64).mean(0)


def test_the_estimates_are_unbiased():
    """Exactly, over all pairs of held-out rows; products of a group with itself would not be."""
    model, start = moved_classifier()
    population = inputs_of(6)
    memory = population[:2]
    g, k = gradient_of(model, start, population), gradient_of(model, start, memory)
    single = torch.stack([gradient_of(model, start, row[None]) for row in population])
    variance = (single - g).square().sum(1).mean()
    expected = torch.stack([(k - g).square().sum(), g.square().sum(), variance / 2])
    assert (expected > 1).all()
    torch.testing.assert_close(
        mean_over_pairs(model, start, memory, population), expected, rtol=1e-9, atol=0
    )


def test_batches_of_a_memory_and_of_groups_do_not_change_the_estimate():
    model, start = moved_classifier()
    rows, memory = inputs_of(9), inputs_of(5, seed=2)
    whole, parted = (
        reconstruct(model, start, *inputs, memory_weight=COUNT, base_weight=COUNT)
        for inputs in (
            ([batch(memory)], [[batch(rows[:4])], [batch(rows[4:])]]),
            (
                [batch(memory[:2]), batch(memory[2:])],
                [[batch(rows[:3]), batch(rows[3:4])], [batch(rows[4:])]],
            ),
        )
    )
    assert parted == pytest.approx(whole, rel=1e-10)


def test_all_data_in_memory_rebuild_the_gradient():
    model, start = moved_classifier()
    population = inputs_of(5)
    error, gradient, _ = mean_over_pairs(model, start, population, population)
    assert abs(error) < 1e-10 * gradient


def test_the_exact_precision_of_a_regression_rebuilds_the_gradient_without_a_memory():
    model, start = moved_classifier(inputs=2, classes=1, problem="regression")
    population = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]]).double()
    first = dict(start._model.named_parameters())
    diagonal = {"module.weight": torch.tensor([[1.0, 4.0]]), "module.bias": torch.ones(1)}
    precision = {name: COUNT * values.double() for name, values in diagonal.items()}
    penalty = {"penalty": lambda: weight_penalty(dict(model.named_parameters()), first, precision)}
    error, gradient, _ = mean_over_pairs(model, start, population[:0], population, **penalty)
    assert abs(error) < 1e-10 * gradient
    error, gradient, _ = mean_over_pairs(model, start, population[:0], population)
    assert error == pytest.approx(gradient)  # nothing is rebuilt by nothing


def test_the_error_falls_as_the_memory_grows():
    """As 1 / |M|, the variance of a mean of rows."""
    model, start = moved_classifier()
    held_out, data = inputs_of(400, seed=3), inputs_of(2000, seed=4)
    groups = [[batch(held_out[i::8])] for i in range(8)]
    errors = []
    for size in (2, 8, 32, 128, 512):
        parts = [
            reconstruct(
                model, start, [batch(rows)], groups, memory_weight=COUNT, base_weight=COUNT
            ).relative
            for rows in data[: 2000 // size * size].split(size)[:20]
        ]
        errors.append(sum(parts) / len(parts))
    assert all(0 < b < 0.5 * a for a, b in itertools.pairwise(errors)), errors


def test_a_gradient_below_its_noise_tells_nothing():
    assert Reconstruction(error=1.0, gradient=0.9, noise=1.0).relative is None
    assert Reconstruction(error=1.0, gradient=2.0, noise=1.0).relative == 0.5
    model, start = moved_classifier(inputs=2, classes=1, problem="regression")
    with torch.no_grad():
        model.module.weight.copy_(start._model.module.weight + torch.tensor([[1.0, -1.0]]))
        model.module.bias.copy_(start._model.module.bias)
    first, second = torch.eye(2, dtype=torch.float64).split(1)  # whose gradients are opposed
    groups = [[batch(first)], [batch(second)]]
    opposed = reconstruct(
        model, start, [batch(first)], groups, memory_weight=COUNT, base_weight=COUNT
    )
    assert opposed.relative is None
