"""The estimators of curvature besides root-GGN, against dense matrices and transformers' losses."""

import doctest
import math
import weakref

import pytest
import torch

from mergekit_bayes.curvature import ESTIMATORS, fisher, fisher_empirical, fisher_exact
from mergekit_bayes.curvature.fisher import fisher_diagonal, sampled_score
from mergekit_bayes.curvature.fisher_empirical import empirical_fisher_diagonal
from mergekit_bayes.curvature.fisher_exact import exact_fisher_diagonal, exact_roots
from mergekit_bayes.curvature.ivon import ivon_diagonal, summed_loss
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from tests.cases import CASES, flat, output_factor
from tests.test_trained_loss import IDS, MENU, head_of

LIKELIHOODS = ("gaussian", "bernoulli", "categorical")

of_every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
of_every_loss = pytest.mark.parametrize("kind", MENU)


def batch_of(case, rows=slice(None)):
    """A batch as estimators take it, with the labels of the case."""
    targets = case.targets if case.likelihood == "categorical" else case.targets.float()
    return {"input_ids": case.inputs[rows].float(), "labels": targets[rows]}


def singles(case):
    """Batches of one observation each."""
    return [batch_of(case, slice(i, i + 1)) for i in range(len(case.inputs))]


def mean_diagonal(estimate):
    return flat(estimate.total.values()) / estimate.observations


# The Fisher by sampled labels.


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_second_moment_of_sampled_scores_is_the_hessian_in_the_outputs(likelihood):
    draws, z = 200_000, torch.tensor([2.0, 0.0, -1.0])
    scores = sampled_score(z.expand(draws, 3), likelihood, torch.Generator().manual_seed(0))
    scores = scores.double()
    products = (scores[:, :, None] * scores[:, None, :]).flatten(1)
    error = products.mean(0) - output_factor(likelihood, z.double()).flatten()
    assert (error.abs() < 5 * products.std(0) / draws**0.5 + 1e-12).all()
    assert (scores.mean(0).abs() < 5 * scores.std(0) / draws**0.5).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_how_much_is_drawn_follows_from_the_shape(likelihood):
    """So that a process can skip what another one draws, whose logits it does not have."""
    states = []
    for logits in (torch.zeros(7, 5), 9 * torch.randn(7, 5), torch.full((7, 5), -50.0)):
        generator = torch.Generator().manual_seed(0)
        sampled_score(logits, likelihood, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@of_every_case
def test_the_fisher_is_the_squared_projection_of_sampled_scores(case):
    """With the second moment of the scores the estimate is right exactly."""
    model = case.model()
    outputs, generator = case.outputs(model).detach(), torch.Generator().manual_seed(3)
    scores = [sampled_score(outputs, case.likelihood, generator) for _ in range(3)]
    estimate = fisher_diagonal(model, [batch_of(case)] * 3, seed=3)
    jacobian = case.jacobian(model)
    expected = sum(torch.einsum("nc,ncp->p", s.double(), jacobian).square() for s in scores)
    assert estimate.observations == 3 * len(case.inputs)
    torch.testing.assert_close(flat(estimate.total.values()), expected, rtol=1e-4, atol=1e-5)


def test_the_fisher_averages_to_the_diagonal_of_the_ggn():
    """Over 25 parts of 50 batches, whose own spread gives the deviation of their mean."""
    case = CASES["perceptron, three classes"]
    model = case.model()
    parts = torch.stack(
        [
            mean_diagonal(fisher_diagonal(model, [batch_of(case)] * 50, seed=seed))
            for seed in range(25)
        ]
    )
    exact, deviation = case.ggn(model).diagonal(), parts.std(0) / 25**0.5
    assert (deviation / exact).max() < 0.08  # so that the next line says something
    assert ((parts.mean(0) - exact).abs() / deviation).max() < 5


# The exact Fisher.


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_roots_are_those_of_the_hessian_in_the_outputs(likelihood):
    z = torch.tensor([2.0, 0.0, -1.0])
    (roots,) = exact_roots(z[None], likelihood).double()
    assert len(roots) == (2 if likelihood == "categorical" else 3)
    factor = output_factor(likelihood, z.double())
    torch.testing.assert_close(roots.T @ roots, factor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("logits", [(40, 0, -40), (-40, 0, 40), (0, 30, 0), (700, 0, -700)])
def test_exact_roots_keep_the_digits_of_a_confident_model(logits):
    """p (1 - p) as float64 has it is 0 here, so 1 - p is summed up instead."""
    z = torch.tensor([logits], dtype=torch.float32)
    p = z[0].double().softmax(-1)
    others = torch.stack([p[torch.arange(3) != i].sum() for i in range(3)])
    factor = torch.diag(p * others) - torch.outer(p, p).fill_diagonal_(0)
    (roots,) = exact_roots(z, "categorical").double()
    torch.testing.assert_close(roots.T @ roots, factor, rtol=1e-5, atol=1e-30)


@of_every_case
def test_the_exact_fisher_is_the_diagonal_of_the_ggn(case):
    model = case.model()
    estimate = exact_fisher_diagonal(model, [batch_of(case)])
    exact = case.ggn(model).diagonal()
    assert estimate.observations == len(case.inputs)
    torch.testing.assert_close(mean_diagonal(estimate), exact, rtol=1e-5, atol=1e-7)


@of_every_loss
def test_the_exact_fisher_is_the_hessian_of_a_head_by_transformers_loss(kind):
    """Where logits are linear in the weights, the Fisher is the Hessian."""
    model, head, batch = loss_of(kind)
    estimate = exact_fisher_diagonal(model, [batch])
    loss = model(**batch).loss * estimate.observations
    gradients = torch.autograd.grad(loss, head, create_graph=True)
    expected = [
        torch.autograd.grad(g, p, retain_graph=True)[0].flatten()[i]
        for p, gradient in zip(head, gradients, strict=True)
        for i, g in enumerate(gradient.flatten())
    ]
    found = flat(estimate.total.values()).float()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_a_pass_holds_two_vectors_at_a_time(monkeypatch):
    """Of the exact Fisher of a row of tokens there are thousands, each as large as the logits."""
    case, alive, most = CASES["perceptron, three classes"], weakref.WeakSet(), 0
    roots = fisher_exact._roots

    def watched(scored):
        nonlocal most
        for vector in roots(scored):
            alive.add(vector)
            most = max(most, len(alive))
            yield vector
            del vector

    monkeypatch.setattr(fisher_exact, "_rows", lambda batches: batches)
    monkeypatch.setattr(fisher_exact, "_roots", watched)
    model = case.model()
    estimate = exact_fisher_diagonal(model, [batch_of(case)])
    torch.testing.assert_close(
        mean_diagonal(estimate), case.ggn(model).diagonal(), rtol=1e-5, atol=1e-7
    )
    assert most <= 3


def test_the_exact_fisher_refuses_many_outputs():
    case = CASES["softmax of three classes"]
    model = case.model()
    model.module = torch.nn.Linear(3, 65)
    with pytest.raises(ConfigError, match=r"fisher-exact: the model has 65 outputs.*ggn"):
        exact_fisher_diagonal(model, [batch_of(case)])


# The empirical Fisher.


@of_every_case
def test_the_empirical_fisher_of_single_observations_is_exact(case):
    model = case.model()
    estimate = empirical_fisher_diagonal(model, singles(case))
    expected = case.gradients(model).square().mean(0)
    torch.testing.assert_close(mean_diagonal(estimate), expected, rtol=1e-4, atol=1e-7)


@of_every_case
def test_random_signs_part_the_observations_of_a_batch(case):
    """Without them the expectation would be the square of the sum; the draws are as of root-GGN."""
    draws, model = 400, case.model()
    estimate = empirical_fisher_diagonal(model, [batch_of(case)] * draws, seed=1)
    gradients = case.gradients(model)
    expected = gradients.square().mean(0)
    tolerance = 5 * (2 / draws) ** 0.5
    torch.testing.assert_close(mean_diagonal(estimate), expected, rtol=tolerance, atol=0)
    together = gradients.sum(0).square() / len(gradients)
    assert ((together / expected - 1).abs() > tolerance).any()  # the test would see it


def loss_of(kind):
    """A model, the weights of its head, which alone are trained, and a batch with labels."""
    model_class, config, labels, _ = MENU[kind]
    problem = config.problem_type
    torch.manual_seed(0)
    model = model_class(config).eval()
    head = head_of(model)
    for p in head:
        p.requires_grad_(True)
    assert config.problem_type == problem
    return model, head, {"input_ids": IDS, "labels": labels}


@of_every_loss
def test_the_empirical_fisher_squares_the_gradients_of_transformers_loss(kind):
    """Row by row, and of models of tokens label by label; C times a mean over C sigmoids."""
    model, head, batch = loss_of(kind)
    parts = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(len(IDS))]
    if batch["labels"].shape == IDS.shape and kind != "several labels":
        parts = [
            {**part, "labels": torch.where(torch.arange(4) == j, part["labels"], -100)}
            for part in parts
            for j in range(1 if kind == "next tokens" else 0, 4)
            if part["labels"][0, j] != -100
        ]
    estimate = empirical_fisher_diagonal(model, parts)
    assert estimate.observations == len(parts)
    factor = 3 if kind.startswith("several labels") else 1
    expected = 0
    for part in parts:
        gradients = torch.autograd.grad(model(**part).loss, head)
        expected = expected + flat(gradients).square() * factor
    torch.testing.assert_close(flat(estimate.total.values()), expected, rtol=1e-4, atol=1e-9)


def test_the_empirical_fisher_needs_labels():
    case = CASES["softmax of three classes"]
    with pytest.raises(MismatchError, match="fisher-empirical: the data have no labels"):
        empirical_fisher_diagonal(case.model(), [{"input_ids": case.inputs.float()}])


# IVON's curvature at a frozen mean.


@of_every_case
def test_ivon_follows_the_dense_hessian(case):
    """A twin of three steps: noise s e sees f = e (H (s e)) / s, up to the square of s."""
    model, steps = case.model(), 3
    labels = batch_of(case)
    estimate = ivon_diagonal(model, [labels] * steps, seed=2)
    matrices = sorted(p.square().mean().sqrt().item() for p in model.parameters() if p.ndim > 1)
    size = 0.01 * matrices[len(matrices) // 2]
    parts = [p.numel() for p in model.parameters()]
    generator, hessian = torch.Generator().manual_seed(2), case.hessian(model)

    def seen_by(deviation):
        e = torch.cat([torch.empty(n).normal_(generator=generator) for n in parts]).double()
        return e * (hessian @ (deviation * e)) / deviation

    first = seen_by(torch.full((len(hessian),), size, dtype=torch.float64))
    levels = torch.stack([f.mean().abs() for f in first.split(parts)])
    h = levels.repeat_interleave(torch.tensor(parts))
    typical, count = h.mean(), len(case.inputs)
    for step in range(1, steps + 1):
        f = seen_by(size * (typical / (h + 0.01 * typical)).sqrt())
        weight = count / (step * count + 8 * count)
        h = h + weight * (f - h) + weight**2 * (f - h).square() / (2 * h)
    assert estimate.observations == steps * count
    torch.testing.assert_close(mean_diagonal(estimate), h, rtol=0.01, atol=0.01 * float(h.mean()))


def test_ivon_averages_to_the_diagonal_of_the_hessian(caplog):
    """Its bias goes with log(batches) / batches, and its deviation with one over their root."""
    case, draws = CASES["softmax of three classes"], 500
    model = case.model()
    estimate = ivon_diagonal(model, [batch_of(case)] * draws, seed=1)
    hessian = case.hessian(model)
    exact = hessian.diagonal()
    variance = exact.square() + hessian.square().sum(1)
    bias = variance * math.log(1 + draws / 8) / (2 * draws * exact)
    bound = 5 * (variance / draws).sqrt() + bias
    assert (bound / exact).max() < 0.6
    assert ((mean_diagonal(estimate) - exact).abs() < bound).all()
    assert not caplog.records


def test_ivon_says_where_noise_decides(caplog):
    """Many weights that one output depends on equally see each other's noise: V = 200 H^2."""
    model = CASES["linear regression"].model()
    model.module = torch.nn.Linear(200, 1, bias=False)
    batch = {"input_ids": torch.ones(4, 200), "labels": torch.zeros(4, 1)}
    estimate = ivon_diagonal(model, [batch] * 20)
    assert "noise decides its size. Look at more batches" in caplog.text
    assert mean_diagonal(estimate).mean() > 2  # where 1 would be right


@of_every_loss
def test_the_loss_that_ivon_disturbs_is_that_of_transformers(kind):
    model, _, batch = loss_of(kind)
    loss, count = summed_loss(model, batch)
    torch.testing.assert_close(loss, model(**batch).loss * count)


def test_ivon_refuses_what_hides_its_noise_and_puts_weights_back():
    case = CASES["softmax of three classes"]
    model = case.model()
    with pytest.raises(MismatchError, match="ivon: the data have no labels"):
        ivon_diagonal(model, [{"input_ids": case.inputs.float()}])
    before, calls = flat(model.parameters()), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ivon_diagonal(model, [batch_of(case)])
    assert torch.equal(flat(model.parameters()), before)
    with pytest.raises(ConfigError, match=r"bfloat16, in whose rounding.*--dtype float32"):
        ivon_diagonal(model.bfloat16(), [batch_of(case)])


# All of them.


@pytest.mark.parametrize("name", ESTIMATORS)
def test_outputs_that_are_not_numbers_are_refused(name):
    case = CASES["perceptron, three classes"]
    model = case.model()
    next(iter(model.parameters())).data[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"not numbers\. Its weights hold NaN"):
        ESTIMATORS[name](model, [batch_of(case)])
    if name != "ivon":
        model = case.model(torch.float16)
        model.module[-1].bias.data[0] = torch.finfo(torch.float16).max
        model.module[-1].weight.data[0] = 1e4
        model.module[0].bias.data[:] = 10.0  # tanh is 1
        half = {**batch_of(case), "input_ids": case.inputs.half()}
        with pytest.raises(CheckpointError, match="overflow in float16"):
            ESTIMATORS[name](model, [half])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_leaves_the_model_as_it_was_and_repeats_itself(name):
    case = CASES["perceptron, three classes"]
    model = case.model().train()
    before = flat(model.parameters())
    first, again = (ESTIMATORS[name](model, [batch_of(case)] * 3, seed=5) for _ in range(2))
    assert torch.equal(flat(model.parameters()), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(flat(first.total.values()), flat(again.total.values()))
    assert all(t.dtype == torch.float32 for t in first.total.values())
    diagonals = [t for n, t in first.total.items() if n not in first.matrices]
    assert all(bool((t >= 0).all()) for t in diagonals)


@pytest.mark.parametrize("module", [fisher, fisher_empirical, fisher_exact])
def test_the_examples_of_the_estimators_run(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)
