"""IVON against its float64 twin, against ivon-opt, and against ordinary misuse."""

import contextlib
import copy
import math
import types

import ivon as ivon_opt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_bayes.optim.base as base
import mergekit_bayes.optim.ivon as module
from mergekit_bayes.optim.bsam import BSAM
from mergekit_bayes.optim.ivon import IVON, ivon_update
from mergekit_bayes.optim.vogn import VOGN
from tests.reference import ivon as twin

SETTINGS = {"ess": 50.0, "hess_init": 0.5, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)


def data(n=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, 5, generator=g).to(dtype), torch.randn(n, 1, generator=g).to(dtype)


def loss_of(model, x, y):
    return 0.5 * (model(x) - y).square().mean()


def train(model, optimizer, steps, samples=1):
    x, y = data(dtype=next(model.parameters()).dtype)
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("rescale_lr", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_ivon_agrees_with_ivon_opt_step_by_step(rescale_lr, debias, samples, monkeypatch):
    """Both get the same noise: ivon-opt draws one flat vector, ours takes it apart per parameter."""
    kw = {**SETTINGS, "lr": 0.1, "mc_samples": samples, "clip_radius": 2.0, "rescale_lr": rescale_lr, "debias": debias}
    theirs, ours = net(), net()
    reference = ivon_opt.IVON(theirs.parameters(), **kw)
    optimizer = IVON(ours.parameters(), **kw)
    x, y = data()
    noise = torch.Generator().manual_seed(3)
    draws, randn = [], torch.randn

    def flat(*size, **_):
        draws.append(randn(*size, generator=noise))
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
                patch.setattr(base, "fused_passes", lambda *tensors: None)
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
    torch.testing.assert_close(hess, reference.param_groups[0]["hess"].flatten(), rtol=2e-4, atol=2e-6)


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
            slow[i] = twin.step(*slow[i], pairs, k=k, lr=0.1, delta=0.1, clip=0.5, rescale_lr=rescale_lr,
                                debias=debias, **kw)  # fmt: skip
        ivon_update(mean, momentum, hess, grad, noise_grad, step=k, lr=0.1 * (0.4 if rescale_lr else 1), ess=20,
                    beta1=0.9, beta2=0.99, weight_decay=0.1, clip_radius=0.5, debias=debias)  # fmt: skip
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
    ivon_update(zero.clone(), zero.clone(), hess, zero, noise_grad, step=1, lr=0, ess=10, beta1=0.9, beta2=beta2,
                weight_decay=delta, clip_radius=math.inf, debias=True)  # fmt: skip
    assert hess.item() + delta >= 0.5 * (h + delta) * (1 - 1e-9) - 1e-9 * abs(f)


def test_the_posterior_of_a_linear_regression_is_found():
    """Stationary posterior of a quadratic: mean A c / (A + delta), precision ess (A + delta), for a diagonal A."""
    curvature, centre = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, -2.0, 3.0])
    w = torch.nn.Parameter(torch.zeros(3))
    ess, delta, beta2 = 100.0, 0.5, 0.999
    optimizer = IVON([w], lr=0.05, ess=ess, hess_init=1.0, beta2=beta2, weight_decay=delta, rescale_lr=False)
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


def test_the_mean_is_restored_exactly_also_after_an_exception():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, **SETTINGS)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params():
        assert not torch.equal(next(model.parameters()), before[0])
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step()  # the failed sample left nothing to step with
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", [{}, {"curvature": "ggn"}, {"restore": "redraw"}])
def test_the_mean_is_restored_when_an_interrupt_comes_between_two_slices(kind, monkeypatch):
    """Ctrl-C at every slice of moving, taking and restoring, in turn; then the step is made again."""
    parameters = [torch.nn.Parameter(torch.randn(600_000, generator=torch.Generator().manual_seed(k))) for k in (0, 1)]
    means = [p.detach().clone() for p in parameters]
    inner, interrupts, seen = base.slices, 0, 0
    rounding = 1e-6 if "restore" in kind else 0.0  # which redrawing leaves

    def make():
        for p, mean in zip(parameters, means, strict=True):
            p.data.copy_(mean)
            p.grad = None
        made = IVON(parameters, lr=0.1, ess=1e4, **kind)
        for group in made.param_groups:
            for *_, state in made._trainable(group):
                if "estimates" in state:
                    state["estimates"] += 1  # else the sample would be the mean
        return made

    def step(optimizer):
        """With another loss than that of the sample which is interrupted."""
        with optimizer.sampled_params(train=True):
            sum((p**4).sum() for p in parameters).backward()
            if optimizer.curvature_due:
                optimizer.add_curvature(sum((0.1 * p).sum() for p in parameters), 1)
        optimizer.step()
        return [p.detach().clone() for p in parameters]

    expected = step(make())

    def slices(*items):
        nonlocal seen
        for piece in inner(*items):
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt
            yield piece

    for number in range(1, 30):
        optimizer, seen, stop = make(), 0, number
        before = interrupts
        with monkeypatch.context() as patch:
            patch.setattr(base, "slices", slices)
            patch.setattr(module, "slices", slices)
            try:
                with optimizer.sampled_params(train=True):
                    assert not torch.equal(parameters[0], means[0])
                    sum(p.square().sum() for p in parameters).backward()
            except KeyboardInterrupt:
                interrupts += 1
        for p, mean in zip(parameters, means, strict=True):
            torch.testing.assert_close(p.detach(), mean, rtol=0, atol=rounding)
        if interrupts > before:
            for p in parameters:
                p.grad = None
            for found, wanted in zip(step(optimizer), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=2 * rounding)
    assert interrupts >= 6


@pytest.mark.parametrize("kind", [{}, {"antithetic": True}, {"curvature": "ggn", "curvature_every": 1}])
def test_a_step_that_is_interrupted_after_a_backward_begins_again_from_its_first_sample(kind, monkeypatch):
    found = []
    for interrupted in (False, True):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = IVON([w], lr=0.1, ess=1e3, mc_samples=2, **kind)

        def sample(power, w=w, optimizer=optimizer):
            with optimizer.sampled_params(train=True):
                w.grad = None
                if optimizer.curvature_due:
                    optimizer.add_curvature((power * w).sum(), 1)
                (w**power).sum().backward()

        def interrupt(at, optimizer=optimizer):
            monkeypatch.setattr(optimizer, "_restore", types.MethodType(IVON._restore, optimizer))
            raise KeyboardInterrupt

        for _ in range(2):
            if interrupted:
                sample(4)
                monkeypatch.setattr(optimizer, "_restore", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    sample(4)
            sample(2)
            sample(2)
            optimizer.step()
        found.append([w.detach(), optimizer.state[w]["hess"], optimizer.state[w]["momentum"]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_sample_in_inference_mode_leaves_nothing_behind():
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = IVON([w], lr=0.1, ess=1e3)

    def step():
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
        return float(w[0].detach())

    first = step()
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.inference_mode(), optimizer.sampled_params():
        pass
    assert step() < first


@pytest.mark.parametrize("curvature", ["price", "ggn"])
def test_a_gradient_may_have_strides_of_its_own(curvature):
    found = []
    gradient = torch.arange(30.0).reshape(6, 5).t()
    for turned in (gradient, gradient.contiguous()):
        w = torch.nn.Parameter(torch.ones(5, 6))
        optimizer = IVON([w], lr=0.1, ess=1e3, curvature=curvature)
        with optimizer.sampled_params(train=True):
            w.grad = turned
            if optimizer.curvature_due:
                optimizer.add_curvature((2 * w).sum(), 1)
        optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(*found)


def test_a_step_is_a_change_that_autograd_sees():
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = IVON([w], lr=0.1, ess=1e3)
    with optimizer.sampled_params(train=True):
        w.square().sum().backward()
    loss = (w**3).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_group_that_a_distributed_checkpoint_has_not_found_is_not_taken_for_another_optimizers():
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = IVON([{"params": []}, {"params": [w]}], lr=0.1, ess=1e3)
    saved = optimizer.state_dict()
    saved["param_groups"][0] = {"params": []}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["ess"] == 1e3


def test_an_interrupt_while_the_means_are_put_back_waits_until_all_are(monkeypatch):
    parameters = [torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(k))) for k in range(3)]
    means = [p.detach().clone() for p in parameters]
    optimizer = IVON(parameters, lr=0.1, ess=10.0)
    inner, calls = optimizer._restore, []

    def restore(at):
        calls.append(at)
        if len(calls) == 2:
            raise KeyboardInterrupt
        inner(at)

    monkeypatch.setattr(optimizer, "_restore", restore)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
        pass
    assert all(torch.equal(p, m) for p, m in zip(parameters, means, strict=True))


def test_contexts_do_not_nest():
    optimizer = IVON(net().parameters(), lr=0.1, **SETTINGS)
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params():
        pass


def test_frozen_and_unused_parameters_are_left_alone():
    model = net()
    model[0].bias.requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([*model.parameters(), unused], lr=0.1, **SETTINGS)
    frozen = model[0].bias.detach().clone()
    with optimizer.sampled_params():
        assert torch.equal(model[0].bias, frozen)
    train(model, optimizer, 3)
    assert torch.equal(model[0].bias, frozen)
    assert torch.equal(unused, torch.ones(3))
    assert model[0].bias not in optimizer.state
    assert "w" not in optimizer.precision([("w", model[0].bias)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype, tmp_path):
    def make():
        model = net(dtype=dtype)
        return model, IVON(model.parameters(), lr=0.1, seed=5, **SETTINGS)

    model, optimizer = make()
    train(model, optimizer, 10)
    again, resumed = make()
    train(again, resumed, 4)
    torch.save({"m": again.state_dict(), "o": resumed.state_dict()}, tmp_path / "c.pt")
    last, optimizer_2 = make()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    last.load_state_dict(saved["m"])
    optimizer_2.load_state_dict(saved["o"])
    train(last, optimizer_2, 6)
    for p, q in zip(model.parameters(), last.parameters(), strict=True):
        assert torch.equal(p, q)
        for name in ("momentum", "hess", "step"):
            assert torch.equal(optimizer.state[p][name], optimizer_2.state[q][name])
            assert optimizer_2.state[q][name].dtype == torch.float32


def test_scratch_stays_out_of_checkpoints():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, **SETTINGS)
    train(model, optimizer, 1)
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        loss_of(model, *data()).backward()
    entries = {key for state in optimizer.state_dict()["state"].values() for key in state}
    assert entries == {"step", "momentum", "hess", "noise"}


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
    from mergekit_bayes.optim import base

    results = []
    for size in (1 << 17, 100):
        monkeypatch.setattr(base, "_SLICE", size)
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
            optimizer._samples[p] = type_of_sample(p)
            optimizer._trainable(optimizer.param_groups[0])
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def type_of_sample(p):
    from mergekit_bayes.optim.ivon import _Sampled

    return _Sampled(1, p.grad.clone(), 0.01 * p.grad, None)


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


def test_a_copied_optimizer_draws_the_same_noise():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, seed=3, **SETTINGS)
    twin_model = copy.deepcopy(model)
    twin_optimizer = IVON(twin_model.parameters(), lr=0.1, seed=3, **SETTINGS)
    with optimizer.sampled_params(), twin_optimizer.sampled_params():
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(p, q)


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
            slow[i] = twin.step(*slow[i], [(epsilon, 2 * (at - 1))], k=k, delta=delta, centre=float(centre[i]),
                                rescale_lr=False, **kw)  # fmt: skip
    expected = torch.tensor(slow).T
    state = optimizer.state[w]
    torch.testing.assert_close(
        torch.stack([w.detach(), state["momentum"], state["hess"]]), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(optimizer.precision([("w", w)])["w"], 20 * expected[2] + precision, rtol=1e-4, atol=1e-4)


def settled(optimizer, w, k, c, steps=3000):
    """Where the run on the sum of 0.5 k (w - c)^2 settles: mean and precision over its second half and all entries."""
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
    """Test 9 of the reference page; 500 independent copies of one weight average the noise out."""
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
        prior = {"plain": None, "numbers": dict.fromkeys(ones, (None, 5.0)),
                 "tensors": {p: (0 * one, 5.0 * one) for p, one in ones.items()}}[kind]  # fmt: skip
        train(model, IVON(model.parameters(), lr=0.1, prior=prior, **SETTINGS), 5)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(runs[1], runs[0])
    torch.testing.assert_close(runs[2], runs[0])


def test_a_resumed_run_needs_the_same_prior():
    def make(prior=True):
        model = net()
        given = {p: (p.detach().clone(), torch.full_like(p, 3.0)) for p in model.parameters()} if prior else None
        return model, IVON(model.parameters(), lr=0.1, prior=given, **SETTINGS)

    model, optimizer = make()
    train(model, optimizer, 6)
    half, saved = make()
    train(half, saved, 3)
    again, resumed = make()
    again.load_state_dict(half.state_dict())
    resumed.load_state_dict(saved.state_dict())
    train(again, resumed, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="another prior"):
        make(prior=False)[1].load_state_dict(saved.state_dict())


@pytest.mark.parametrize("other", ["permuted precision", "negated mean", "exchanged parameters"])
def test_a_prior_of_the_same_size_is_still_another(other):
    def make(there):
        g = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.ones(200_000)) for _ in range(2)]
        given = [(torch.randn(200_000, generator=g), torch.rand(200_000, generator=g)) for _ in range(2)]
        if there:
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


@pytest.mark.parametrize("kinds", [("price", "ggn"), ("ggn", "price")])
@pytest.mark.parametrize("old", [False, True])  # whether the checkpoint is from before the kind was kept
def test_a_run_does_not_go_on_with_another_curvature(kinds, old):
    first, second = (IVON(net().parameters(), lr=0.1, ess=1e3, curvature=kind) for kind in kinds)
    with first.sampled_params():
        pass
    saved = copy.deepcopy(first.state_dict())
    if old:
        del saved["param_groups"][0]["ggn"]
    with pytest.raises(ValueError, match=f"made with curvature='{kinds[0]}'"):
        second.load_state_dict(saved)
    IVON(net().parameters(), lr=0.1, ess=1e3, curvature=kinds[0]).load_state_dict(saved)


@pytest.mark.parametrize("first", [IVON, VOGN, BSAM, torch.optim.AdamW])
@pytest.mark.parametrize("second", [IVON, VOGN, BSAM])
def test_a_run_does_not_go_on_with_another_optimizer(first, second):
    kind = {} if first is torch.optim.AdamW else {"ess": 1e3}
    saved = first(net().parameters(), lr=0.1, **kind).state_dict()
    guard = pytest.raises(ValueError, match=f"^{second.__name__}: the checkpoint is another optimizer's")
    with contextlib.nullcontext() if first is second else guard:
        second(net().parameters(), lr=0.1, ess=1e3).load_state_dict(saved)


def test_a_prior_of_parameters_that_were_exchanged_is_not_forgotten():
    """A launcher that shards the model puts other tensors into the groups."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([w], lr=0.1, ess=10.0, prior={w: (None, 5.0)})
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="after sharding"), optimizer.sampled_params(train=True):
        pass


@pytest.mark.parametrize(
    ("prior", "match"),
    [((torch.zeros(2), None), "mean is"), ((None, torch.zeros(2)), "precision is"), ((None, -1.0), "negative"),
     ((None, torch.full((3,), math.nan)), "not finite")],
)  # fmt: skip
def test_priors_that_do_not_fit_are_refused(prior, match):
    w = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=match):
        IVON([w], lr=0.1, ess=1.0, prior={w: prior})
    with pytest.raises(ValueError, match="not optimized"):
        IVON([w], lr=0.1, ess=1.0, prior={torch.zeros(3): (None, None)})


def curvature_of_one_step(loss, antithetic):
    """f of 2,000 independent weights, from one step of beta2 = 0 and two samples."""
    w = torch.nn.Parameter(torch.zeros(2000))
    optimizer = IVON([w], lr=0.0, ess=100.0, hess_init=1.0, beta2=0.999999, weight_decay=0.0, mc_samples=2,
                     antithetic=antithetic)  # fmt: skip
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            loss(w).backward()
    return 100 * optimizer._samples[w].noise_grad / 2


def test_antithetic_pairs_cancel_the_gradients_own_noise():
    """Reference page 2.7: a linear loss has f = 0 (else sd sqrt(ess) |g|); a quadratic keeps A eps^2, sd sqrt(2) A."""
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
    resumed.load_state_dict(saved)  # in the middle of a pair: the step is made again, from its first sample
    for _ in range(2):
        noise(again, resumed)
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.allclose(noise(model, optimizer), first)


def test_small_steps_add_up_in_bfloat16():
    """Each step is a hundredth of the rounding of the weight, which alone would never move."""
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = IVON([w], lr=4e-5, ess=1e4, hess_init=1.0, weight_decay=0.0, rescale_lr=False, clip_radius=1.0)
    for _ in range(1000):
        with optimizer.sampled_params(train=True):
            (-2 * w).sum().backward()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["mean"], torch.full((8,), 1.04), rtol=1e-4, atol=0)
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w.detach(), torch.full((8,), 1.04, dtype=torch.bfloat16))


@pytest.mark.parametrize("restore", ["copy", "redraw"])
@pytest.mark.parametrize("ulps", [0.1, 1.0])
def test_in_bfloat16_the_curvature_is_right_even_where_rounding_hides_the_noise(ulps, restore):
    """Noise of a tenth of a unit in the last place: weights seldom move, f = A on average all the same."""
    sigma, n = ulps * 2**-8, 4000
    start = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.55
    w = torch.nn.Parameter(start.to(torch.bfloat16))
    optimizer = IVON([w], lr=0.0, ess=1 / sigma**2, hess_init=1.0, weight_decay=0.0, restore=restore)
    with optimizer.sampled_params():
        optimizer.state[w]["mean"].copy_(start)  # a mean between two bfloat16 numbers, as training leaves it
    seen = torch.zeros(n)
    before = w.detach().clone()
    for _ in range(100):
        with optimizer.sampled_params(train=True):
            (1.5 * (w.float() - start).square()).sum().backward()
        sampled = optimizer._samples.pop(w)
        product = sampled.noise_grad
        seen += (optimizer._redrawn_product(sampled.at, sampled.grad) if product is None else product) / sigma**2
    assert torch.equal(w.float(), start.to(torch.bfloat16).float())
    assert (w != before).sum() == 0
    assert float(seen.mean() / 100) == pytest.approx(3, rel=0.15)


def test_a_master_is_saved_in_float32_and_follows_weights_that_are_loaded():
    model = net(dtype=torch.bfloat16)
    optimizer = IVON(model.parameters(), lr=0.01, **SETTINGS)
    train(model, optimizer, 2)
    again = IVON(model.parameters(), lr=0.01, **SETTINGS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        assert again.state[p]["mean"].dtype == torch.float32
        assert torch.equal(again.state[p]["mean"], optimizer.state[p]["mean"])
        assert not torch.equal(again.state[p]["mean"], p.float())
    other = net(seed=9, dtype=torch.bfloat16)
    model.load_state_dict(other.state_dict())
    with optimizer.sampled_params():
        pass
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


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
        assert torch.equal(a, b) if dtype == torch.bfloat16 else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_redrawing_keeps_nothing_while_the_weights_are_sampled():
    model = net()
    optimizer = IVON(model.parameters(), lr=0.1, restore="redraw", **SETTINGS)
    with optimizer.sampled_params(train=True):
        loss_of(model, *data()).backward()
    assert all(sampled.noise_grad is None for sampled in optimizer._samples.values())
    assert all(sampled.at.saved is None for sampled in optimizer._samples.values())


def test_the_noise_number_is_the_variance_of_the_curvature_seen():
    """Gradients of sd s unrelated to the noise: (f - h) / (h + d) has variance ess s^2 / (h + d), mean -h / (h + d)."""
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


def test_an_adapted_prior_settles_at_the_optimum_of_the_evidence():
    """delta = 1 / (ess mean(m^2 + sigma^2)) for matrices; vectors keep theirs, and a checkpoint keeps it."""
    centres = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * 0.5
    w, bias = torch.nn.Parameter(torch.zeros(30, 40)), torch.nn.Parameter(torch.zeros(40))
    ess = 20.0
    optimizer = IVON([w, bias], lr=0.1, ess=ess, hess_init=1.0, beta2=0.99, weight_decay=0.5, rescale_lr=False,
                     adapt_prior=True)  # fmt: skip
    for _ in range(1500):
        with optimizer.sampled_params(train=True):
            (0.5 * (w - centres).square().sum() + 0.5 * bias.square().sum()).backward()
        optimizer.step()
    delta = float(optimizer.state[w]["weight_decay"])
    sigma2 = 1 / (ess * (optimizer.state[w]["hess"] + delta))
    assert delta == pytest.approx(float(1 / (ess * (w.detach().square() + sigma2).mean())), rel=0.03)
    assert "weight_decay" not in optimizer.state[bias]
    torch.testing.assert_close(
        optimizer.precision([("w", w)])["w"], ess * (optimizer.state[w]["hess"] + delta), rtol=1e-6, atol=0
    )
    again = IVON([w, bias], lr=0.1, ess=ess, adapt_prior=True)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[w]["weight_decay"]) == delta


def fit_exactly(k, c, start, **settings):
    """Mean and precision of the sum 0.5 k (w - c)^2, its curvature from one observation of output sqrt(k) w."""
    w = torch.nn.Parameter(start.clone())
    prior = settings.pop("prior", None)
    optimizer = IVON([w], lr=1.0, ess=1.0, beta1=0.0, beta2=0.9, curvature="ggn", curvature_every=2, mc_samples=2,
                     antithetic=True, prior=prior and {w: prior}, **settings)  # fmt: skip
    for _ in range(6):
        while optimizer._sample < 2:
            with optimizer.sampled_params(train=True):
                if optimizer.curvature_due:
                    optimizer.add_curvature((k**0.5 * w).sum(), 1)
                (0.5 * k * (w - c).square()).sum().backward()
        optimizer.step()
    return w.detach(), optimizer.precision([("w", w)])["w"]


def test_with_the_ggn_one_task_after_the_other_is_both_at_once_exactly():
    """Test 9 of the reference page: pairs cancel the noise of a quadratic's gradient, so nothing is random."""
    first = fit_exactly(4.0, 3.0, torch.zeros(3), weight_decay=0.5)
    torch.testing.assert_close(torch.stack(first)[:, 0], torch.tensor([2.666666666667, 4.5]), rtol=1e-6, atol=0)
    second = fit_exactly(6.0, -1.0, first[0], prior=first)
    torch.testing.assert_close(torch.stack(second)[:, 0], torch.tensor([0.571428571429, 10.5]), rtol=1e-6, atol=0)


def test_the_ggn_is_averaged_from_zero_without_a_trace_of_the_start():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = IVON([w], lr=0.0, ess=10.0, beta2=0.8, weight_decay=0.1, curvature="ggn", curvature_every=1)
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
        return model, IVON(model.parameters(), lr=0.1, ess=1e3, beta2=0.9, weight_decay=0.1, curvature="ggn",
                           curvature_every=3, clip_radius=0.1)  # fmt: skip

    def go(model, optimizer, steps):
        x, y = data()
        for _ in range(steps):
            with optimizer.sampled_params(train=True):
                z = model(x)
                if optimizer.curvature_due:
                    signs = torch.Generator().manual_seed(optimizer.param_groups[0]["steps"])
                    optimizer.add_curvature((z * (torch.rand(z.shape, generator=signs) - 0.5).sign()).sum(), len(z))
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
        assert all(torch.equal(optimizer.state[p][n], resumed.state[q][n]) for n in ("hess", "momentum", "estimates"))
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
    """A second head, silent in the first step: its momentum gathers, its mean waits, and the first one trains on."""
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = IVON([first, second], lr=0.1, ess=1e6, weight_decay=0.1, beta1=0.5, curvature="ggn", curvature_every=4)
    ggn_step(optimizer, lambda: first.square().sum(), lambda: first.sum())
    for k in range(1, 4):
        before = first.detach().clone()
        ggn_step(optimizer, lambda: (first + 3 * second).square().sum())
        assert not torch.equal(first, before)
        assert torch.equal(second, torch.ones(4))
        assert optimizer.state[second]["step"] == k
    assert (optimizer.state[second]["momentum"] > 0).all()
    ggn_step(optimizer, lambda: (first + 3 * second).square().sum(), lambda: (first + 3 * second).sum())
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


def test_float64_weights_are_trained_in_float64():
    """Steps too small for float32, with float32 state; nothing is rounded to float32 on the way."""
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    for kind in ({}, {"restore": "redraw"}, {"mc_samples": 2, "antithetic": True}):
        optimizer = IVON([w], lr=1e-9, ess=1e4, hess_init=1.0, weight_decay=0.0, rescale_lr=False, clip_radius=1.0,
                         **kind)  # fmt: skip
        before = w.detach().clone()
        for _ in range(10):
            for _ in range(optimizer.defaults["mc_samples"]):
                with optimizer.sampled_params(train=True):
                    (-2 * w).sum().backward()
            optimizer.step()
        torch.testing.assert_close(w.detach() - before, torch.full_like(w, 1e-8), rtol=1e-3, atol=0)
        assert optimizer.state[w]["hess"].dtype == torch.float32
