"""IVON's weight samples: antithetic pairs, bfloat16 masters, redrawn noise."""

import copy
import math

import pytest
import torch

from mergekit_bayes.optim import BSAM, IVON, VOGN
from mergekit_bayes.optim.samples import redrawn_product
from tests.cases import SETTINGS, data, loss_of, net, train


def test_a_copied_optimizer_draws_the_same_noise():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, seed=3, **SETTINGS)
    twin_model = copy.deepcopy(model)
    twin_optimizer = IVON(twin_model.parameters(), lr=0.1, seed=3, **SETTINGS)
    with optimizer.sampled_params(), twin_optimizer.sampled_params():
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("restore", ["copy", "redraw"])
@pytest.mark.parametrize("kind", [IVON, VOGN, BSAM])
def test_a_temperature_scales_the_variance_and_training_has_none(kind, restore):
    def displaced(temperature):
        # One weight too large to be sampled together with others, and one that is not.
        weights = [torch.nn.Parameter(torch.ones(70_000)), torch.nn.Parameter(torch.ones(5))]
        optimizer = kind(weights, lr=0.1, ess=100.0, seed=4, restore=restore)
        with optimizer.sampled_params(temperature=temperature):
            moved = torch.cat([w.detach() - 1 for w in weights])
        assert all(torch.allclose(w, torch.ones_like(w), atol=1e-6) for w in weights)
        for bad in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="temperature"):
                optimizer.sampled_params(temperature=bad).__enter__()
        with pytest.raises(ValueError, match=r"temperature=3.0"):
            optimizer.sampled_params(train=True, temperature=3.0).__enter__()
        return moved

    plain = displaced(1.0)
    assert float(plain.std()) > 0.01
    torch.testing.assert_close(displaced(3.0), plain * math.sqrt(3), atol=1e-6, rtol=1e-4)


def curvature_of_one_step(loss, antithetic):
    """f of 2,000 independent weights, from one step of beta2 = 0 and two samples."""
    w = torch.nn.Parameter(torch.zeros(2000))
    optimizer = IVON(
        [w],
        lr=0.0,
        ess=100.0,
        hess_init=1.0,
        beta2=0.999999,
        weight_decay=0.0,
        mc_samples=2,
        antithetic=antithetic,
    )
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            loss(w).backward()
    return 100 * optimizer._transient.sampled[w].noise_grad / 2


def test_antithetic_pairs_cancel_the_gradients_own_noise():
    """A linear loss has f = 0, without pairs of sd sqrt(ess) |g|; a quadratic keeps A eps^2."""
    slope = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert curvature_of_one_step(lambda w: (slope * w).sum(), True).abs().max() < 1e-4
    plain = curvature_of_one_step(lambda w: (slope * w).sum(), False)
    assert float(plain.std()) == pytest.approx(math.sqrt(100 / 2), rel=0.1)
    both = curvature_of_one_step(lambda w: (3 * slope * w + 2 * w.square()).sum(), True)
    assert float(both.mean()) == pytest.approx(4, rel=0.1)
    assert float(both.std()) == pytest.approx(4 * math.sqrt(2), rel=0.1)


def test_pairs_stay_pairs_around_predictions_failures_and_a_resume():
    def make():
        model = net()
        return model, IVON(model.parameters(), lr=0.1, mc_samples=2, antithetic=True, **SETTINGS)

    def noise(model, optimizer):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        with optimizer.sampled_params(train=True):
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            loss_of(model, *data()).backward()
        return after - before

    model, optimizer = make()
    first = noise(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    with optimizer.sampled_params():
        pass
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    torch.testing.assert_close(noise(model, optimizer), -first, rtol=1e-4, atol=1e-6)
    optimizer.step()
    again, resumed = make()
    again.load_state_dict(weights)
    # Saved in the middle of a pair: the step is made again, from its first sample.
    resumed.load_state_dict(saved)
    for _ in range(2):
        noise(again, resumed)
    resumed.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert not torch.allclose(noise(model, optimizer), first)


def test_small_steps_add_up_in_bfloat16():
    """Each step is a hundredth of the rounding of the weight, which alone would never move."""
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = IVON(
        [w], lr=4e-5, ess=1e4, hess_init=1.0, weight_decay=0.0, rescale_lr=False, clip_radius=1.0
    )
    for _ in range(1000):
        with optimizer.sampled_params(train=True):
            (-2 * w).sum().backward()
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[w]["mean"], torch.full((8,), 1.04), rtol=1e-4, atol=0
    )
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w.detach(), torch.full((8,), 1.04, dtype=torch.bfloat16))


@pytest.mark.parametrize("restore", ["copy", "redraw"])
@pytest.mark.parametrize("ulps", [0.1, 1.0])
def test_in_bfloat16_the_curvature_is_right_even_where_rounding_hides_the_noise(ulps, restore):
    """Weights seldom move by noise of a tenth of a unit in the last place, but f = A on average."""
    sigma, n = ulps * 2**-8, 4000
    start = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.55
    w = torch.nn.Parameter(start.to(torch.bfloat16))
    optimizer = IVON(
        [w], lr=0.0, ess=1 / sigma**2, hess_init=1.0, weight_decay=0.0, restore=restore
    )
    with optimizer.sampled_params():
        # A mean between two bfloat16 numbers, as training leaves it.
        optimizer.state[w]["mean"].copy_(start)
    seen = torch.zeros(n)
    before = w.detach().clone()
    for _ in range(100):
        with optimizer.sampled_params(train=True):
            (1.5 * (w.float() - start).square()).sum().backward()
        sampled = optimizer._transient.sampled.pop(w)
        product = sampled.noise_grad
        if product is None:
            product = redrawn_product(sampled.moved, sampled.grad, optimizer._noise)
        seen += product / sigma**2
    assert torch.equal(w.float(), start.to(torch.bfloat16).float())
    assert (w != before).sum() == 0
    assert float(seen.mean() / 100) == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_redrawing_the_noise_trains_like_copying_the_mean(dtype, samples):
    """Under a float32 master bit for bit; else up to the rounding of adding and subtracting."""
    ends = []
    for restore in ("copy", "redraw"):
        model = net(dtype=dtype)
        optimizer = IVON(model.parameters(), lr=0.1, restore=restore, **SETTINGS)
        train(model, optimizer, 10, samples)
        ends.append([optimizer.state[p].get("mean", p.detach()) for p in model.parameters()])
        ends[-1] += [optimizer.state[p]["hess"] for p in model.parameters()]
    for a, b in zip(*ends, strict=True):
        assert (
            torch.equal(a, b)
            if dtype == torch.bfloat16
            else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        )


def test_redrawing_keeps_nothing_while_the_weights_are_sampled():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, restore="redraw", **SETTINGS)
    with optimizer.sampled_params(train=True):
        loss_of(model, *data()).backward()
    sums = optimizer._transient.sampled.values()
    assert len(sums) == 4
    assert all(sampled.noise_grad is None for sampled in sums)
    assert all(sampled.moved.saved is None for sampled in sums)
