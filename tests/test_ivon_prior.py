"""IVON under a general prior, one that is checked on resuming, and one that is adapted."""

import copy
import math

import pytest
import torch

from mergekit_bayes.optim import IVON
from tests.cases import SETTINGS, net, train
from tests.reference import ivon as twin


def test_a_step_under_a_general_prior_agrees_with_the_twin():
    torch.manual_seed(1)
    start, centre, precision = torch.randn(5), torch.randn(5), torch.rand(5) * 9 + 1
    w = torch.nn.Parameter(start.clone())
    kw = {"lr": 0.1, "ess": 20.0, "hess_init": 0.3, "beta1": 0.9, "beta2": 0.9}
    optimizer = IVON([w], rescale_lr=False, prior={w: (centre, precision)}, **kw)
    slow = [(float(m), 0.0, 0.3) for m in start]
    for k in range(1, 6):
        with optimizer.sampled_params(train=True):
            applied = [float(a) for a in w.detach()]
            (w - 1).square().sum().backward()
        optimizer.step()
        for i, at in enumerate(applied):
            delta = float(precision[i]) / 20
            epsilon = (at - slow[i][0]) * math.sqrt(20 * (slow[i][2] + delta))
            slow[i] = twin.step(
                *slow[i],
                [(epsilon, 2 * (at - 1))],
                k=k,
                delta=delta,
                centre=float(centre[i]),
                rescale_lr=False,
                **kw,
            )
    expected = torch.tensor(slow).T
    state = optimizer.state[w]
    torch.testing.assert_close(
        torch.stack([w.detach(), state["momentum"], state["hess"]]), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        optimizer.precision([("w", w)])["w"], 20 * expected[2] + precision, rtol=1e-4, atol=1e-4
    )


def settled(optimizer, w, k, c, steps=3000):
    """Mean and precision of the sum 0.5 k (w - c)^2, over the second half and all entries."""
    means, precisions = [], []
    for i in range(steps):
        with optimizer.sampled_params(train=True):
            (0.5 * k * (w - c).square() / optimizer.defaults["ess"]).sum().backward()
        optimizer.step()
        if i >= steps // 2:
            means.append(float(w.detach().mean()))
            precisions.append(float(optimizer.precision([("w", w)])["w"].mean()))
    return sum(means) / len(means), sum(precisions) / len(precisions)


def test_one_task_after_the_other_with_its_posterior_as_prior_is_both_at_once():
    """500 independent copies of one weight average the noise out."""
    kw = {"lr": 0.05, "ess": 10.0, "hess_init": 0.5, "beta2": 0.998, "rescale_lr": False}
    w = torch.nn.Parameter(torch.zeros(500))
    first = settled(IVON([w], weight_decay=0.05, **kw), w, 4.0, 3.0)
    assert first == pytest.approx((8 / 3, 4.5), rel=0.03)
    prior = {w: (torch.full_like(w, 8 / 3), torch.full_like(w, 4.5))}
    second = settled(IVON([w], prior=prior, **kw), w, 6.0, -1.0)
    assert second == pytest.approx((4 / 7, 10.5), rel=0.03)


def test_a_prior_of_numbers_equals_one_of_tensors_and_the_plain_one():
    runs = []
    for kind in ("plain", "numbers", "tensors"):
        model = net()
        ones = {p: torch.ones_like(p) for p in model.parameters()}
        prior = {
            "plain": None,
            "numbers": dict.fromkeys(ones, (None, 5.0)),
            "tensors": {p: (0 * one, 5.0 * one) for p, one in ones.items()},
        }[kind]
        train(model, IVON(model.parameters(), lr=0.1, prior=prior, **SETTINGS), 5)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(runs[1], runs[0])
    torch.testing.assert_close(runs[2], runs[0])


def test_a_resumed_run_needs_the_same_prior():
    def make(prior=True):
        model = net()
        given = (
            {p: (p.detach().clone(), torch.full_like(p, 3.0)) for p in model.parameters()}
            if prior
            else None
        )
        return model, IVON(model.parameters(), lr=0.1, prior=given, **SETTINGS)

    model, optimizer = make()
    train(model, optimizer, 6)
    half, saved = make()
    train(half, saved, 3)
    again, resumed = make()
    again.load_state_dict(half.state_dict())
    resumed.load_state_dict(saved.state_dict())
    train(again, resumed, 3)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="another prior"):
        make(prior=False)[1].load_state_dict(saved.state_dict())


@pytest.mark.parametrize("other", ["permuted precision", "negated mean", "exchanged parameters"])
def test_a_prior_of_the_same_size_is_still_another(other):
    def make(is_other):
        g = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.ones(200_000)) for _ in range(2)]
        given = [
            (torch.randn(200_000, generator=g), torch.rand(200_000, generator=g)) for _ in range(2)
        ]
        if is_other:
            m, s = given[0]
            given = {
                "permuted precision": [(m, s.flip(0)), given[1]],
                "negated mean": [(-m, s), given[1]],
                "exchanged parameters": given[::-1],
            }[other]
        return IVON(parameters, lr=0.1, ess=10.0, prior=dict(zip(parameters, given, strict=True)))

    saved = copy.deepcopy(make(False).state_dict())
    make(False).load_state_dict(saved)
    with pytest.raises(ValueError, match="another prior"):
        make(True).load_state_dict(saved)
    del saved["param_groups"][0]["prior_order"]  # as in checkpoints from before it was kept
    again = make(False)
    again.load_state_dict(saved)
    make(False).load_state_dict(again.state_dict())


def test_a_prior_of_parameters_that_were_exchanged_is_not_forgotten():
    """A launcher that shards the model puts other tensors into the groups."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([w], lr=0.1, ess=10.0, prior={w: (None, 5.0)})
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="after sharding"), optimizer.sampled_params(train=True):
        pass


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        ((torch.zeros(2), None), "mean is"),
        ((None, torch.zeros(2)), "precision is"),
        ((None, -1.0), "negative"),
        ((None, torch.full((3,), math.nan)), "not finite"),
    ],
)
def test_priors_that_do_not_fit_are_refused(prior, match):
    w = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=match):
        IVON([w], lr=0.1, ess=1.0, prior={w: prior})
    with pytest.raises(ValueError, match="not optimized"):
        IVON([w], lr=0.1, ess=1.0, prior={torch.zeros(3): (None, None)})


def test_an_adapted_prior_settles_at_the_optimum_of_the_evidence():
    """delta = 1 / (ess mean(m^2 + sigma^2)) for matrices, also resumed; vectors keep theirs."""
    centres = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * 0.5
    w, bias = torch.nn.Parameter(torch.zeros(30, 40)), torch.nn.Parameter(torch.zeros(40))
    ess = 20.0
    optimizer = IVON(
        [w, bias],
        lr=0.1,
        ess=ess,
        hess_init=1.0,
        beta2=0.99,
        weight_decay=0.5,
        rescale_lr=False,
        adapt_prior=True,
    )
    for _ in range(1500):
        with optimizer.sampled_params(train=True):
            (0.5 * (w - centres).square().sum() + 0.5 * bias.square().sum()).backward()
        optimizer.step()
    delta = float(optimizer.state[w]["weight_decay"])
    sigma2 = 1 / (ess * (optimizer.state[w]["hess"] + delta))
    assert delta == pytest.approx(
        float(1 / (ess * (w.detach().square() + sigma2).mean())), rel=0.03
    )
    assert "weight_decay" not in optimizer.state[bias]
    torch.testing.assert_close(
        optimizer.precision([("w", w)])["w"],
        ess * (optimizer.state[w]["hess"] + delta),
        rtol=1e-6,
        atol=0,
    )
    again = IVON([w, bias], lr=0.1, ess=ess, adapt_prior=True)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[w]["weight_decay"]) == delta
