"""The mean is restored exactly, whatever interrupts a sample."""

import pytest
import torch

from mergekit_bayes.optim import IVON, moves, noise, samples, slicing, steps, together
from tests.cases import SETTINGS, net, train


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
    """Ctrl-C at every slice of moving, taking and restoring in turn; then the step is repeated."""
    parameters = [
        torch.nn.Parameter(torch.randn(600_000, generator=torch.Generator().manual_seed(k)))
        for k in (0, 1)
    ]
    means = [p.detach().clone() for p in parameters]
    inner, interrupts, seen = slicing.slices, 0, 0
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
            for module in (moves, noise, samples, steps):
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
            for a, b in zip(step(optimizer), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2 * rounding)
    assert interrupts >= 6


@pytest.mark.parametrize(
    "kind", [{}, {"antithetic": True}, {"curvature": "ggn", "curvature_every": 1}]
)
def test_a_step_that_is_interrupted_after_a_backward_begins_again_from_its_first_sample(
    kind, monkeypatch
):
    results = []
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
            IVON._restore(optimizer, at)
            if vars(optimizer).pop("_restore", None):
                raise KeyboardInterrupt

        for _ in range(2):
            if interrupted:
                sample(4)
                optimizer._restore = interrupt
                with pytest.raises(KeyboardInterrupt):
                    sample(4)
            sample(2)
            sample(2)
            optimizer.step()
        results.append([w.detach(), optimizer.state[w]["hess"], optimizer.state[w]["momentum"]])
    for a, b in zip(*results, strict=True):
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


def test_an_interrupt_while_the_means_are_put_back_waits_until_all_are(monkeypatch):
    parameters = [
        torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(size)))
        for size in (5, 6, 3, 2)
    ]
    monkeypatch.setattr(together, "SMALL", 4)  # two go alone, and two together
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
    with (
        optimizer.sampled_params(),
        pytest.raises(RuntimeError, match="nested"),
        optimizer.sampled_params(),
    ):
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
