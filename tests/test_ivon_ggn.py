"""IVON with the curvature of `add_curvature`."""

import copy

import pytest
import torch

from mergekit_bayes.optim import IVON
from tests.cases import data, loss_of, net


def fit_exactly(k, c, start, **settings):
    """Mean and precision of the sum 0.5 k (w - c)^2, of one observation with output sqrt(k) w."""
    w = torch.nn.Parameter(start.clone())
    prior = settings.pop("prior", None)
    optimizer = IVON(
        [w],
        lr=1.0,
        ess=1.0,
        beta1=0.0,
        beta2=0.9,
        curvature="ggn",
        curvature_every=2,
        mc_samples=2,
        antithetic=True,
        prior=prior and {w: prior},
        **settings,
    )
    for _ in range(6):
        while optimizer._transient.samples < 2:
            with optimizer.sampled_params(train=True):
                if optimizer.curvature_due:
                    optimizer.add_curvature((k**0.5 * w).sum(), 1)
                (0.5 * k * (w - c).square()).sum().backward()
        optimizer.step()
    return w.detach(), optimizer.precision([("w", w)])["w"]


def test_with_the_ggn_one_task_after_the_other_is_both_at_once_exactly():
    """Pairs cancel the noise of a quadratic's gradient, so nothing is random."""
    first = fit_exactly(4.0, 3.0, torch.zeros(3), weight_decay=0.5)
    torch.testing.assert_close(
        torch.stack(first)[:, 0], torch.tensor([2.666666666667, 4.5]), rtol=1e-6, atol=0
    )
    second = fit_exactly(6.0, -1.0, first[0], prior=first)
    torch.testing.assert_close(
        torch.stack(second)[:, 0], torch.tensor([0.571428571429, 10.5]), rtol=1e-6, atol=0
    )


def test_the_ggn_is_averaged_from_zero_without_a_trace_of_the_start():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = IVON(
        [w], lr=0.0, ess=10.0, beta2=0.8, weight_decay=0.1, curvature="ggn", curvature_every=1
    )
    seen = []
    for i in range(5):
        with optimizer.sampled_params(train=True):
            if i == 0:
                assert torch.equal(w, torch.ones(4))  # nothing known yet, so no noise
            slope = torch.arange(1.0, 5) * (i + 1)
            optimizer.add_curvature((slope * w).sum(), 3)
            optimizer.add_curvature((2 * slope * w).sum(), 7)
            w.square().sum().backward()
        optimizer.step()
        seen.append(5 * slope.square() / 10)
        weights = torch.tensor([0.8 ** (i - j) for j in range(i + 1)])
        expected = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
        torch.testing.assert_close(optimizer.state[w]["hess"], expected, rtol=1e-5, atol=0)
    assert optimizer.health(1)["init_fraction"] == 0


def test_a_ggn_run_resumes_bit_for_bit_and_wants_its_first_estimate():
    def make():
        model = net()
        return model, IVON(
            model.parameters(),
            lr=0.1,
            ess=1e3,
            beta2=0.9,
            weight_decay=0.1,
            curvature="ggn",
            curvature_every=3,
            clip_radius=0.1,
        )

    def go(model, optimizer, steps):
        x, y = data()
        for _ in range(steps):
            with optimizer.sampled_params(train=True):
                z = model(x)
                if optimizer.curvature_due:
                    signs = torch.Generator().manual_seed(optimizer.param_groups[0]["steps"])
                    optimizer.add_curvature(
                        (z * (torch.rand(z.shape, generator=signs) - 0.5).sign()).sum(), len(z)
                    )
                (0.5 * (z - y).square().mean()).backward()
            optimizer.step()

    model, optimizer = make()
    go(model, optimizer, 8)
    half, saved = make()
    go(half, saved, 4)
    again, resumed = make()
    again.load_state_dict(half.state_dict())
    resumed.load_state_dict(saved.state_dict())
    go(again, resumed, 4)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(
            torch.equal(optimizer.state[p][n], resumed.state[q][n])
            for n in ("hess", "momentum", "estimates")
        )
    model, optimizer = make()
    with optimizer.sampled_params(train=True):
        loss_of(model, *data()).backward()
    with pytest.raises(RuntimeError, match="add_curvature"):
        optimizer.step()


def ggn_step(optimizer, loss, outputs=None, observations=1):
    with optimizer.sampled_params(train=True):
        if optimizer.curvature_due and outputs is not None:
            optimizer.add_curvature(outputs(), observations)
        loss().backward()
    optimizer.step()


def test_a_parameter_that_is_first_used_between_two_estimates_waits_for_its_own():
    """A second head, silent in the first step: its momentum gathers, and its mean waits."""
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = IVON(
        [first, second],
        lr=0.1,
        ess=1e6,
        weight_decay=0.1,
        beta1=0.5,
        curvature="ggn",
        curvature_every=4,
    )
    ggn_step(optimizer, lambda: first.square().sum(), lambda: first.sum())
    for k in range(1, 4):
        before = first.detach().clone()
        ggn_step(optimizer, lambda: (first + 3 * second).square().sum())
        assert not torch.equal(first, before)
        assert torch.equal(second, torch.ones(4))
        assert optimizer.state[second]["step"] == k
    assert (optimizer.state[second]["momentum"] > 0).all()
    ggn_step(
        optimizer, lambda: (first + 3 * second).square().sum(), lambda: (first + 3 * second).sum()
    )
    assert (second < 1).all()
    assert optimizer.state[second]["estimates"] == 1


def test_a_step_without_its_first_estimate_changes_nothing():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, ess=1e3, weight_decay=0.1, curvature="ggn")
    with optimizer.sampled_params(train=True):
        loss_of(model, *data()).backward()
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="add_curvature"):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for ours, theirs in zip(after["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_an_estimate_of_no_observations_is_none():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([w], lr=0.1, ess=100.0, weight_decay=0.1, curvature="ggn", curvature_every=1)
    ggn_step(optimizer, lambda: w.square().sum(), lambda: (w * torch.zeros(0, 3)).sum(), 0)
    assert torch.equal(w, torch.ones(3))
    ggn_step(optimizer, lambda: w.square().sum(), lambda: w.sum(), 1)
    hess = optimizer.state[w]["hess"].clone()
    assert w.isfinite().all()
    assert (hess > 0).all()
    ggn_step(optimizer, lambda: w.square().sum(), lambda: (w * torch.zeros(0, 3)).sum(), 0)
    assert torch.equal(optimizer.state[w]["hess"], hess)
    assert w.isfinite().all()
