"""IVON's steps against its float64 twin, ivon-opt and exact results."""

import math

import ivon as ivon_opt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.optim import IVON, ivon_update, noise, slicing, together
from mergekit_bayes.optim.samples import Sampled
from tests.cases import SETTINGS, data, loss_of, net, train
from tests.reference import ivon as twin


@pytest.mark.parametrize("rescale_lr", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("alone", [True, False])
def test_ivon_agrees_with_ivon_opt_step_by_step(rescale_lr, debias, samples, alone, monkeypatch):
    """Both get the same noise: ivon-opt draws one flat vector, ours splits it by parameter."""
    if alone:
        monkeypatch.setattr(together, "SMALL", -1)
    else:
        monkeypatch.setattr(slicing, "passes_module", lambda: None)
    kw = {
        **SETTINGS,
        "lr": 0.1,
        "mc_samples": samples,
        "clip_radius": 2.0,
        "rescale_lr": rescale_lr,
        "debias": debias,
    }
    theirs, ours = net(), net()
    reference = ivon_opt.IVON(theirs.parameters(), **kw)
    optimizer = IVON(ours.parameters(), **kw)
    x, y = data()
    generator = torch.Generator().manual_seed(3)
    draws, randn = [], torch.randn

    def flat(*size, **_):
        draws.append(randn(*size, generator=generator))
        return draws[-1].clone()

    monkeypatch.setattr(torch, "randn", flat)
    left = []

    def same_noise(tensor, **_):
        tensor.copy_(left[0][: tensor.numel()].view_as(tensor))
        left[0] = left[0][tensor.numel() :]
        return tensor

    for _ in range(12):
        for _ in range(samples):
            with reference.sampled_params(train=True):
                reference.zero_grad()
                loss_of(theirs, x, y).backward()
            left[:] = [torch.cat([d.flatten() for d in draws])]
            draws.clear()
            with monkeypatch.context() as patch:
                patch.setattr(noise, "compiled_passes", lambda *tensors: None)
                patch.setattr(torch.Tensor, "normal_", same_noise)
                context = optimizer.sampled_params(train=True)
                context.__enter__()
            optimizer.zero_grad()
            loss_of(ours, x, y).backward()
            context.__exit__(None, None, None)
        reference.step()
        optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    hess = torch.cat([optimizer.state[p]["hess"].flatten() for p in ours.parameters()])
    torch.testing.assert_close(
        hess, reference.param_groups[0]["hess"].flatten(), rtol=2e-4, atol=2e-6
    )


@pytest.mark.parametrize("rescale_lr", [True, False])
@pytest.mark.parametrize("debias", [True, False])
def test_ivon_agrees_with_its_twin_for_ten_steps(rescale_lr, debias):
    torch.manual_seed(0)
    kw = {"ess": 20.0, "beta1": 0.9, "beta2": 0.99, "hess_init": 0.3}
    mean, momentum, hess = torch.randn(6), torch.zeros(6), torch.full((6,), 0.3)
    slow = [(float(m), 0.0, 0.3) for m in mean]
    for k in range(1, 11):
        noise, curvature = torch.randn(2, 6), torch.rand(6) * 3
        sigma = 1 / (20 * (hess + 0.1)).sqrt()
        grads = curvature * (mean + noise * sigma - 1)
        grad, noise_grad = grads.mean(0), (noise * sigma * grads).mean(0)
        for i in range(6):
            pairs = [(float(noise[s, i]), float(grads[s, i])) for s in range(2)]
            slow[i] = twin.step(
                *slow[i],
                pairs,
                k=k,
                lr=0.1,
                delta=0.1,
                clip=0.5,
                rescale_lr=rescale_lr,
                debias=debias,
                **kw,
            )
        ivon_update(
            mean,
            momentum,
            hess,
            grad,
            noise_grad,
            step=k,
            lr=0.1 * (0.4 if rescale_lr else 1),
            ess=20,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            clip_radius=0.5,
            debias=debias,
        )
    expected = torch.tensor(slow).T
    torch.testing.assert_close(torch.stack([mean, momentum, hess]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rescale_lr", "mean"), [(True, 0.844913771450), (False, 0.612284428625)])
def test_one_step_by_hand(rescale_lr, mean):
    kw = {"lr": 0.05, "ess": 100, "beta1": 0.9, "beta2": 0.99, "delta": 0.1, "hess_init": 0.3}
    sigma = 1 / math.sqrt(100 * 0.4)
    gradient = 2 * (1 + 0.5 * sigma + 1)
    assert (sigma, gradient) == pytest.approx((0.158113883008, 4.158113883008))
    slow = twin.step(1.0, 0.0, 0.3, [(0.5, gradient)], k=1, rescale_lr=rescale_lr, **kw)
    assert slow[0] == pytest.approx(mean, abs=1e-12)
    assert slow[2] == pytest.approx(0.449128561939, abs=1e-12)
    assert 1 / (100 * (slow[2] + 0.1)) == pytest.approx(0.018210671768, abs=1e-12)
    m, g, h = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 0.0, 0.3))
    ivon_update(
        m,
        g,
        h,
        torch.tensor([gradient], dtype=torch.float64),
        torch.tensor([0.5 * sigma * gradient], dtype=torch.float64),
        step=1,
        lr=0.05 * (0.4 if rescale_lr else 1),
        ess=100,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        clip_radius=math.inf,
        debias=True,
    )
    assert m.item() == pytest.approx(mean, abs=1e-12)


@given(h=st.floats(0.0, 1e3), f=st.floats(-1e6, 1e6), beta2=st.floats(0.0, 0.99999))
@settings(deadline=None, max_examples=200)
def test_the_hessian_never_loses_more_than_half(h, f, beta2):
    delta = 1e-3
    hess = torch.tensor([h], dtype=torch.float64)
    noise_grad = torch.tensor([f / (10 * (h + delta))], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    ivon_update(
        zero.clone(),
        zero.clone(),
        hess,
        zero,
        noise_grad,
        step=1,
        lr=0,
        ess=10,
        beta1=0.9,
        beta2=beta2,
        weight_decay=delta,
        clip_radius=math.inf,
        debias=True,
    )
    assert hess.item() + delta >= 0.5 * (h + delta) * (1 - 1e-9) - 1e-9 * abs(f)


def test_the_posterior_of_a_linear_regression_is_found():
    """With a diagonal A: mean A c / (A + delta), precision ess (A + delta)."""
    curvature, centre = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, -2.0, 3.0])
    w = torch.nn.Parameter(torch.zeros(3))
    ess, delta, beta2 = 100.0, 0.5, 0.999
    optimizer = IVON(
        [w], lr=0.05, ess=ess, hess_init=1.0, beta2=beta2, weight_decay=delta, rescale_lr=False
    )
    means = []
    for i in range(6000):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * curvature * (w - centre).square()).sum().backward()
        optimizer.step()
        if i >= 3000:
            means.append(w.detach().clone())
    torch.testing.assert_close(
        torch.stack(means).mean(0), curvature * centre / (curvature + delta), rtol=0.01, atol=0.01
    )
    precision = optimizer.precision([("w", w)])["w"]
    torch.testing.assert_close(precision, ess * (curvature + delta), rtol=0.15, atol=0)


@pytest.mark.parametrize("curvature", ["price", "ggn"])
def test_a_gradient_may_have_strides_of_its_own(curvature):
    results = []
    gradient = torch.arange(30.0).reshape(6, 5).t()
    for turned in (gradient, gradient.contiguous()):
        w = torch.nn.Parameter(torch.ones(5, 6))
        optimizer = IVON([w], lr=0.1, ess=1e3, curvature=curvature)
        with optimizer.sampled_params(train=True):
            w.grad = turned
            if optimizer.curvature_due:
                optimizer.add_curvature((2 * w).sum(), 1)
        optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results)


def test_a_step_is_a_change_that_autograd_sees():
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = IVON([w], lr=0.1, ess=1e3)
    with optimizer.sampled_params(train=True):
        w.square().sum().backward()
    loss = (w**3).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulated_inside_one_context_are_one_batch():
    one, many = net(), net()
    a, b = (IVON(m.parameters(), lr=0.1, seed=1, **SETTINGS) for m in (one, many))
    x, y = data()
    with a.sampled_params(train=True):
        loss_of(one, x, y).backward()
    with b.sampled_params(train=True):
        for i in range(4):
            (loss_of(many, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) / 4).backward()
    a.step()
    b.step()
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_large_tensors_are_updated_slice_by_slice_to_the_same_result(monkeypatch):
    results = []
    for size in (1 << 17, 100):
        monkeypatch.setattr(slicing, "SLICE", size)
        model = torch.nn.Linear(50, 30)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        state = ivon_update_of(model)
        results.append(state)
    torch.testing.assert_close(results[0], results[1])


def ivon_update_of(model):
    optimizer = IVON(model.parameters(), lr=0.1, **SETTINGS)
    x = torch.linspace(-1, 1, 100).view(2, 50)
    for _ in range(3):
        # Samples that are given: without the compiled passes, noise depends on the slices.
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for p in model.parameters():
            optimizer._transient.sampled[p] = Sampled(1, p.grad.clone(), 0.01 * p.grad)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_scheduler_and_a_closure_work():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.2, **{**SETTINGS, "ess": 1e6})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)
    x, y = data()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    for _ in range(19):
        schedule.step()
        last = optimizer.step(closure)
    assert last < first


@pytest.mark.parametrize("curvature", ["price", "ggn"])
def test_the_norm_is_that_of_the_mean_gradient_over_the_samples(curvature):
    model, (x, y) = net(), data()
    optimizer = IVON(model.parameters(), **SETTINGS, lr=0.1, mc_samples=3, curvature=curvature)
    assert optimizer.gradient_norm() == 0
    seen = []
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            model.zero_grad()
            loss_of(model, x, y).backward()
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = torch.stack(seen).mean(0).norm().item()
    assert optimizer.gradient_norm() == pytest.approx(expected, rel=1e-5)


def test_health_tells_forgotten_starts_and_noise():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, **SETTINGS)
    train(model, optimizer, 20)
    health = optimizer.health(batch_size=16)
    assert health["init_fraction"] == pytest.approx(0.95**20)
    assert health["kappa"] == pytest.approx(0.05 * 50 / 32)
    assert health["hess_min"] <= health["hess_median"] <= health["hess_max"]
    assert health["bad_entries"] == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"mc_samples": 3, "antithetic": True},
        {"restore": "never"},
        {"ess": 0},
        {"hess_init": 0},
        {"beta2": 1.0},
        {"lr": -1},
        {"mc_samples": 0},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        IVON(net().parameters(), **{"lr": 0.1, **SETTINGS, **bad})


def test_the_noise_number_is_the_variance_of_the_curvature_seen():
    """Gradients of sd s: (f - h) / (h + d) has mean -h / (h + d), variance ess s^2 / (h + d)."""
    w = torch.nn.Parameter(torch.zeros(40, 1000))
    ess, h, d, beta2 = 50.0, 2.0, 0.5, 0.99999
    optimizer = IVON([w], lr=0.0, ess=ess, hess_init=h, weight_decay=d, beta2=beta2)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        with optimizer.sampled_params(train=True):
            (w * torch.randn(w.shape, generator=g) * 3).sum().backward()
        optimizer.step()
    expected = 0.5 * (1 - beta2) * (ess * 9 / (h + d) + (h / (h + d)) ** 2)
    assert optimizer.health(1)["hess_noise"] == pytest.approx(expected, rel=0.05)


def test_float64_weights_are_trained_in_float64():
    """Steps too small for float32, with float32 state; nothing is rounded to float32 on the way."""
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    for kind in ({}, {"restore": "redraw"}, {"mc_samples": 2, "antithetic": True}):
        optimizer = IVON(
            [w],
            lr=1e-9,
            ess=1e4,
            hess_init=1.0,
            weight_decay=0.0,
            rescale_lr=False,
            clip_radius=1.0,
            **kind,
        )
        before = w.detach().clone()
        for _ in range(10):
            for _ in range(optimizer.defaults["mc_samples"]):
                with optimizer.sampled_params(train=True):
                    (-2 * w).sum().backward()
            optimizer.step()
        torch.testing.assert_close(w.detach() - before, torch.full_like(w, 1e-8), rtol=1e-3, atol=0)
        assert optimizer.state[w]["hess"].dtype == torch.float32
