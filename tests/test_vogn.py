"""VOGN against its float64 twin, its fixed point, ordinary misuse, and in a merge."""

import numpy as np
import pytest
import torch

from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.optim.bsam import BSAM
from mergekit_bayes.optim.vogn import VOGN
from tests.reference import vogn as twin
from tests.tiny import posterior, read


def regression(n=64, seed=0):
    """Orthogonal inputs, residuals +1 and -1: the empirical Fisher is the Hessian exactly."""
    signs = torch.tensor(
        [
            [1.0 if bin(i & mask).count("1") % 2 == 0 else -1.0 for mask in (1, 2, 4)]
            for i in range(n)
        ]
    )
    inputs = signs * torch.tensor([0.5, 1.0, 2.0])
    residual = torch.tensor([1.0 if bin(i & 56).count("1") % 2 == 0 else -1.0 for i in range(n)])
    return inputs, inputs @ torch.tensor([1.0, -2.0, 0.5]) + residual


def train(optimizer, w, steps, inputs, targets):
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.backward(0.5 * (inputs @ w - targets).square())
        optimizer.step()


def test_steps_agree_with_the_twin():
    w = torch.nn.Parameter(torch.tensor([0.3, -0.2, 1.0]))
    centre, precision = torch.tensor([0.1, 0.0, -1.0]), torch.tensor([1.0, 2.0, 30.0])
    kw = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9}
    optimizer = VOGN([w], ess=50.0, hess_init=0.4, prior={w: (centre, precision)}, **kw)
    inputs, targets = regression(8)
    slow = [(float(m), 0.0, 0.4) for m in w.detach()]
    for _ in range(6):
        with optimizer.sampled_params(train=True):
            gradients = ((inputs @ w - targets)[:, None] * inputs).detach().double()
            optimizer.backward(0.5 * (inputs[:3] @ w - targets[:3]).square())
            optimizer.backward(0.5 * (inputs[3:] @ w - targets[3:]).square())
        optimizer.step()
        slow = [
            twin.step(
                *slow[i],
                gradients[:, i].tolist(),
                delta=float(precision[i]) / 50,
                centre=float(centre[i]),
                **kw,
            )
            for i in range(3)
        ]
    state = optimizer.state[w]
    torch.testing.assert_close(
        torch.stack([w.detach(), state["momentum"], state["hess"]]),
        torch.tensor(slow).T,
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_posterior_of_a_linear_regression_is_found():
    inputs, targets = regression()
    w = torch.nn.Parameter(torch.zeros(3))
    ess, delta = 1e6, 0.05
    optimizer = VOGN([w], lr=0.1, ess=ess, beta2=0.98, weight_decay=delta)
    train(optimizer, w, 500, inputs, targets)
    a = inputs.square().mean(0)
    torch.testing.assert_close(
        w.detach(), (inputs.T @ targets / 64) / (a + delta), rtol=2e-3, atol=2e-3
    )
    # the prior's pull leaves residuals that are not exactly +1 and -1
    torch.testing.assert_close(
        optimizer.precision([("w", w)])["w"], ess * (a + delta), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype):
    inputs, targets = (t.to(dtype) for t in regression(8))

    def make():
        w = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        return w, VOGN([w], lr=0.1, ess=100.0, seed=4)

    w, optimizer = make()
    train(optimizer, w, 6, inputs, targets)
    half, saved = make()
    train(saved, half, 3, inputs, targets)
    again, resumed = make()
    again.data.copy_(half.data)
    resumed.load_state_dict(saved.state_dict())
    train(resumed, again, 3, inputs, targets)
    assert torch.equal(w, again)
    assert torch.equal(optimizer.state[w]["hess"], resumed.state[again]["hess"])
    assert resumed.state[again]["hess"].dtype == torch.float32


def test_the_mean_is_restored_after_an_exception_and_nothing_of_it_is_used():
    inputs, targets = regression(8)
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = VOGN([w], lr=0.1, ess=10.0)
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):  # noqa: PT012
        optimizer.backward(0.5 * (inputs @ w - targets).square())
        raise ZeroDivisionError
    optimizer.step()
    assert torch.equal(w, torch.ones(3))


def test_plain_backward_and_a_mean_loss_are_refused():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = VOGN([w], lr=0.1, ess=10.0)
    with pytest.raises(RuntimeError, match="per-example"), optimizer.sampled_params(train=True):
        w.square().sum().backward()
    assert torch.equal(w, torch.ones(3))
    with pytest.raises(ValueError, match="one loss an example"):
        optimizer.backward(w.square().sum())
    with pytest.raises(ValueError, match="beta2"):
        VOGN([w], lr=0.1, ess=10.0, beta2=1.0)


def small_run(kind, c):
    w = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([w], lr=0.1, ess=100.0, beta2=0.95, weight_decay=0.0)
    for _ in range(40):
        with optimizer.sampled_params(train=True):
            if kind is VOGN:
                optimizer.backward((0.5 * (w - c).square()).sum(-1))
            else:
                (0.5 * (w - c).square()).sum(-1).mean().backward()
        if kind is BSAM:
            with optimizer.ascended_params():
                (0.5 * (w - c).square()).sum(-1).mean().backward()
        optimizer.step()
    assert optimizer.health(4)["bad_entries"] == 0
    return w.detach().numpy(), optimizer.precision([("w", w)])["w"].numpy()


@pytest.mark.parametrize("kind", [VOGN, BSAM])
def test_their_posteriors_merge_like_any_other(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    posteriors = [small_run(kind, c) for c in (1.0, -0.5)]
    for i, (mean, precision) in enumerate(posteriors):
        posterior(
            f"{i}.safetensors", {"w": mean}, {"w": precision}, estimator=kind.__name__.lower()
        )
    run_merge(MergeConfig(models=("0.safetensors", "1.safetensors"), weights="precision"))
    (m, s), (n, t) = [(np.float64(mean), np.float64(precision)) for mean, precision in posteriors]
    np.testing.assert_allclose(
        read("merged.safetensors")["w"], (s * m + t * n) / (s + t), rtol=1e-5, atol=1e-6
    )
