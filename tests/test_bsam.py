"""bSAM against its float64 twin, its fixed point, and ordinary misuse."""

import math

import pytest
import torch

from mergekit_bayes.optim.bsam import BSAM
from tests.reference import bsam as twin


def train(optimizer, w, steps, curvature, centre):
    def loss():
        return (0.5 * curvature * (w - centre).square()).sum()

    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            loss().backward()
        with optimizer.ascended_params():
            loss().backward()
        optimizer.step()


def test_steps_agree_with_the_twin():
    start, precision = [0.3, -0.2, 1.0], torch.tensor([1.0, 2.0, 30.0])
    w = torch.nn.Parameter(torch.tensor(start))
    prior_mean = torch.tensor([0.1, 0.0, -1.0])
    curvature, centre = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, 2.0, 3.0])
    kw = {"lr": 0.1, "ess": 50.0, "beta1": 0.8, "beta2": 0.9, "rho": 0.05, "damping": 0.02}
    optimizer = BSAM([w], hess_init=0.4, prior={w: (prior_mean, precision)}, **kw)
    slow = [(m, 0.0, 0.4) for m in start]
    for _ in range(6):
        with optimizer.sampled_params(train=True):
            sampled = w.detach().tolist()
            (0.5 * curvature * (w - centre).square()).sum().backward()
        with optimizer.ascended_params():
            (0.5 * curvature * (w - centre).square()).sum().backward()
        optimizer.step()
        for i in range(3):
            delta, a, c = float(precision[i]) / 50, float(curvature[i]), float(centre[i])
            epsilon = (sampled[i] - slow[i][0]) * math.sqrt(50 * (slow[i][2] + delta))
            slow[i] = twin.step(
                *slow[i],
                lambda t, a=a, c=c: a * (t - c),
                epsilon,
                delta=delta,
                centre=float(prior_mean[i]),
                **kw,
            )
    state = optimizer.state[w]
    torch.testing.assert_close(
        torch.stack([w.detach(), state["momentum"], state["hess"]]),
        torch.tensor(slow).T,
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_fixed_point_of_a_quadratic_is_the_papers():
    """Mean A c / (A + delta) up to rho; s = A sqrt(2 / (pi ess)) + damping + delta, no Hessian."""
    n, ess, delta, damping = 2000, 50.0, 1e-4, 0.01
    curvature = torch.tensor([0.5, 2.0, 8.0]).repeat_interleave(n)
    centre = torch.tensor([1.0, -2.0, 3.0]).repeat_interleave(n)
    w = torch.nn.Parameter(centre.clone())  # far away s follows the gradient, and w hardly moves
    optimizer = BSAM(
        [w], lr=0.005, ess=ess, beta2=0.98, weight_decay=delta, rho=1e-4, damping=damping
    )
    train(optimizer, w, 1000, curvature, centre)
    s = optimizer.precision([("w", w)])["w"].view(3, n).mean(1) / ess
    a = torch.tensor([0.5, 2.0, 8.0])
    torch.testing.assert_close(
        s, a * math.sqrt(2 / (math.pi * ess)) + damping + delta, rtol=0.05, atol=0
    )
    torch.testing.assert_close(
        w.detach().view(3, n).mean(1), torch.tensor([1.0, -2.0, 3.0]), rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restore", ["copy", "redraw"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype, restore):
    def make():
        w = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        return w, BSAM([w], lr=0.1, ess=100.0, seed=4, restore=restore)

    w, optimizer = make()
    train(optimizer, w, 6, 2.0, 1.0)
    half, saved = make()
    train(saved, half, 3, 2.0, 1.0)
    again, resumed = make()
    again.data.copy_(half.data)
    resumed.load_state_dict(saved.state_dict())
    train(resumed, again, 3, 2.0, 1.0)
    assert torch.equal(w, again)
    assert torch.equal(optimizer.state[w]["hess"], resumed.state[again]["hess"])


def test_the_mean_is_restored_from_both_passes_after_an_exception():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = BSAM([w], lr=0.1, ess=10.0)
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    with optimizer.sampled_params(train=True):
        w.square().sum().backward()
    with pytest.raises(ZeroDivisionError), optimizer.ascended_params():  # noqa: PT012
        assert not torch.equal(w, torch.ones(3))
        raise ZeroDivisionError
    assert torch.equal(w, torch.ones(3))


def test_passes_out_of_order_are_refused():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = BSAM([w], lr=0.1, ess=10.0)
    with pytest.raises(RuntimeError, match="follows one"), optimizer.ascended_params():
        pass
    with optimizer.sampled_params(train=True):
        w.square().sum().backward()
    with pytest.raises(RuntimeError, match="is missing"):
        optimizer.step()
    with (
        pytest.raises(RuntimeError, match="one sampled_params"),
        optimizer.sampled_params(train=True),
    ):
        w.square().sum().backward()
    assert torch.equal(w, torch.ones(3))
    with pytest.raises(ValueError, match="rho"):
        BSAM([w], lr=0.1, ess=10.0, rho=-1.0)
