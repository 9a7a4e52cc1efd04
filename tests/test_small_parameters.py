"""Small parameters are sampled and stepped together, to the same bits as each alone."""

import contextlib
import copy
import itertools

import pytest
import torch

from mergekit_bayes.draws import mix, mixes
from mergekit_bayes.optim import IVON, foreach, slicing, together

pointed = pytest.importorskip("mergekit_bayes.optim.pointed", reason="numba is not installed")

SHAPES = [(33,), (16, 48), (), (0, 4), (2048,), (70, 70), (3,), (16, 48), (5000,), (128, 127)]
KINDS = {
    "price": {},
    "pairs": {"mc_samples": 2, "antithetic": True},
    "three samples": {"mc_samples": 3},
    "ggn": {"curvature": "ggn", "curvature_every": 2},
    "ggn, two samples": {"curvature": "ggn", "curvature_every": 2, "mc_samples": 2},
    "no clip": {"clip_radius": float("inf")},
    "no debias": {"debias": False, "rescale_lr": False},
    "adapted prior": {"adapt_prior": True},
}
WAYS = {"pointed": pointed, "foreach": foreach}


def parameters(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    made = [0.02 * torch.randn(shape, generator=generator) for shape in SHAPES]
    transposed = (0.02 * torch.randn(9, 5, generator=generator)).to(device, dtype).t()
    made = [t.to(device, dtype) for t in made]
    return [torch.nn.Parameter(t) for t in [*made, transposed]]


def gradient(p, number):
    """A gradient in one of the layouts that a backward, or DDP, leaves."""
    values = (p.detach().float() * (1 + number) + 0.1).to(p.dtype)
    if number % 3 == 0 and values.ndim == 2:
        return values.t().contiguous().t()
    if number % 3 == 1:
        bucket = torch.zeros(values.numel() + 7, dtype=p.dtype, device=p.device)
        view = bucket[3 : 3 + values.numel()].view(values.shape)
        return view.copy_(values)
    return values


def run(dtype, kind, steps=5, device="cpu"):
    """Train on given gradients, and return weights, a sample, the state dict and the ways taken."""
    ps = parameters(dtype, device)
    settings = {"ess": 1e5, "hess_init": 0.1, "clip_radius": 0.1, **KINDS[kind]}
    groups = [{"params": ps[:6], "weight_decay": 1e-2}, {"params": ps[6:], "lr": 1e-2}]
    optimizer = IVON(groups, lr=1e-3, **settings)
    ways = set()
    for step in range(steps):
        for sample in range(settings.get("mc_samples", 1)):
            with optimizer.sampled_params(train=True):
                for k, p in enumerate(ps):
                    if (k + step + sample) % 5 != 4 and p.requires_grad:
                        p.grad = gradient(p, k + step)
                if optimizer.curvature_due:
                    optimizer.add_curvature(sum((3 * p.float()).sum() for p in ps), 2)
        ways |= {sampled.way for sampled in optimizer._transient.sampled.values()}
        optimizer.step()
        ps[1].requires_grad_(step % 2 == 1)  # frozen in between
        ps[4].data = ps[4].detach().clone()  # exchanged
        ps[0].data.mul_(1.5)  # changed from outside
        if step == 2:
            ps[5].data = ps[5].detach().t().contiguous().t()  # no longer contiguous
    with optimizer.sampled_params():
        sample = [p.detach().clone() for p in ps]
    return [p.detach() for p in ps], sample, optimizer.state_dict(), ways


def check_equal(ours, alone, noise=0.0):
    """All bits, except of the diagnostic `noise`, which may be a sum in another order."""
    for a, b in zip(ours[0] + ours[1], alone[0] + alone[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert ours[2]["param_groups"] == alone[2]["param_groups"]
    assert ours[2]["state"].keys() == alone[2]["state"].keys()
    for k, state in alone[2]["state"].items():
        assert ours[2]["state"][k].keys() == state.keys()
        for name, b in state.items():
            a, rtol = ours[2]["state"][k][name], noise if name == "noise" else 0
            torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_together_makes_the_bits_of_each_alone(kind, dtype, way, monkeypatch):
    if way == "foreach":
        monkeypatch.setattr(slicing, "passes_module", lambda: None)
    ours = run(dtype, kind)
    monkeypatch.setattr(together, "SMALL", -1)
    alone = run(dtype, kind)
    assert (ours[3], alone[3]) == ({WAYS[way], None}, {None})
    check_equal(ours, alone, noise=1e-5 if way == "foreach" else 0)


@pytest.mark.parametrize("kind", ["price", "ggn"])
def test_no_bit_depends_on_how_many_go_together(kind, monkeypatch):
    monkeypatch.setattr(slicing, "passes_module", lambda: None)
    whole = run(torch.float32, kind)
    monkeypatch.setattr(slicing, "GPU_SLICE", 3000)  # on a CPU slices of one parameter are SLICE
    check_equal(run(torch.float32, kind), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("slice_size", [1 << 24, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_together_is_as_each_alone(kind, dtype, slice_size, monkeypatch):
    monkeypatch.setattr(slicing, "GPU_SLICE", slice_size)
    ours = run(dtype, kind, device="cuda")
    monkeypatch.setattr(together, "SMALL", -1)
    alone = run(dtype, kind, device="cuda")
    assert (ours[3], alone[3]) == ({foreach, None}, {None})
    tolerance = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    for a, b in zip(ours[0] + ours[1], alone[0] + alone[1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
    for k, state in alone[2]["state"].items():
        for name, b in state.items():
            a = ours[2]["state"][k][name]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinite_gradients_stay_where_they_are(dtype, way, monkeypatch):
    if way == "foreach":
        monkeypatch.setattr(slicing, "passes_module", lambda: None)
    results = []
    for small in (together.SMALL, -1):
        monkeypatch.setattr(together, "SMALL", small)
        ps = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=dtype)) for n in (40, 40)]
        optimizer = IVON(ps, lr=0.1, ess=1e4, clip_radius=0.1)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                for p in ps:
                    p.grad = p.detach().clone()
                ps[0].grad[3], ps[0].grad[20], ps[0].grad[39] = torch.nan, torch.inf, -torch.inf
            optimizer.step()
        results.append([*ps, *(optimizer.state[p][n] for p in ps for n in ("hess", "momentum"))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert results[0][0].isnan().sum() == 3
    assert not results[0][1].isnan().any()


@contextlib.contextmanager
def interrupted(monkeypatch, way, number):
    """Ctrl-C before or after the call number `number` of all calls that move small parameters."""
    seen = itertools.count()

    def wrap(inner):
        def call(*arguments, **settings):
            if next(seen) == number:
                raise KeyboardInterrupt
            result = inner(*arguments, **settings)
            if next(seen) == number:
                raise KeyboardInterrupt
            return result

        return call

    with monkeypatch.context() as patch:
        if way == "pointed":
            for name in ("_leave", "_come_back"):
                patch.setattr(pointed, name, wrap(getattr(pointed, name)))
        else:
            patch.setattr(slicing, "passes_module", lambda: None)
            for name in ("copy_", "add_", "sub", "mul_"):
                name = f"_foreach_{name}"
                patch.setattr(torch, name, wrap(getattr(torch, name)))
        yield seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_mean_is_restored_when_an_interrupt_comes_between_two_calls(
    samples, dtype, way, monkeypatch
):
    """At every call in turn; then the step is repeated."""

    def make():
        ps = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=dtype)) for n in (40, 7)]
        return ps, IVON(ps, lr=0.1, ess=1e3, mc_samples=samples)

    def sample(ps, optimizer):
        with optimizer.sampled_params(train=True):
            for p in ps:
                p.grad = p.detach() * 0.3 + 0.1

    def step(ps, optimizer):
        for _ in range(samples):
            sample(ps, optimizer)
        optimizer.step()
        return [p.detach() for p in ps]

    with interrupted(monkeypatch, way, None):
        expected = step(*make())
    for number in itertools.count():
        ps, optimizer = make()
        means = [p.detach().clone() for p in ps]
        was_interrupted = False
        with interrupted(monkeypatch, way, number) as seen:
            try:
                for _ in range(samples):
                    sample(ps, optimizer)
            except KeyboardInterrupt:
                was_interrupted = True
            calls = next(seen)
        for p, mean in zip(ps, means, strict=True):
            assert torch.equal(p, mean), number
        if not was_interrupted:
            assert number >= calls
            assert number >= 4 * samples
            return
        for p in ps:
            p.grad = None
        optimizer.forget_samples()
        with interrupted(monkeypatch, way, None):
            for a, b in zip(step(ps, optimizer), expected, strict=True):
                assert torch.equal(a, b), number


def test_what_does_not_fit_goes_alone():
    ps = [
        torch.nn.Parameter(torch.ones(together.SMALL)),
        torch.nn.Parameter(torch.ones(together.SMALL + 1)),
        torch.nn.Parameter(torch.ones(5, dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(5, dtype=torch.float16)),
        torch.nn.Parameter(torch.ones(3, 4).t()),
        torch.nn.Parameter(torch.ones(7)),
        torch.nn.Parameter(torch.ones(6)),
    ]
    optimizer = IVON(ps, lr=0.1, ess=1e3, prior={ps[5]: (None, torch.ones(7))})
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            assert not any(bool((p == 1).any()) for p in ps[:2])
            for p in ps:
                p.grad = torch.ones_like(p)
        ways = [optimizer._transient.sampled[p].way for p in ps]
        assert ways == [pointed, None, None, None, None, None, pointed]
        optimizer.step()
    redrawn = IVON(ps, lr=0.1, ess=1e3, restore="redraw")
    with redrawn.sampled_params(train=True):
        for p in ps:
            p.grad = torch.ones_like(p)
    assert {sampled.way for sampled in redrawn._transient.sampled.values()} == {None}


@pytest.mark.parametrize("name", ["hess", "momentum"])
@pytest.mark.parametrize("shape", [(2,), (5,), (2, 2)])
def test_a_state_of_another_shape_is_refused(name, shape):
    """The passes believe sizes: a checkpoint of another model must not reach them."""
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = IVON([w], lr=0.1, ess=1e3)
    with optimizer.sampled_params():
        pass
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = torch.ones(shape)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 .*\[4\]"):
        optimizer.load_state_dict(saved)


def test_the_memory_of_samples_is_used_again():
    ps = parameters(torch.float32)[:-1]
    optimizer = IVON(ps, lr=0.1, ess=1e3, mc_samples=2)

    def step():
        addresses = set()
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                for p in ps:
                    p.grad = torch.ones_like(p)
            addresses |= {s.noise_grad.data_ptr() for s in optimizer._transient.sampled.values()}
        optimizer.step()
        return addresses

    assert step() == step()
    assert len(optimizer._transient.arenas.free) == 2
    with torch.inference_mode(), optimizer.sampled_params():
        pass
    assert step() == step()
    assert not optimizer._transient.arenas.taken


def test_memory_that_is_given_back_twice_serves_one_sample():
    """As an interrupt right after it was given back has it."""
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = IVON([w], lr=0.1, ess=1e3)
    inner, interrupts = optimizer._restore, [KeyboardInterrupt]

    def restore(at):
        inner(at)
        if interrupts:
            raise interrupts.pop()

    optimizer._restore = restore
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
        pass
    arenas = optimizer._transient.arenas
    first, second = arenas.take([w]), arenas.take([w])
    assert first[0].data_ptr() != second[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["half", "double", "strided", "shorter"])
def test_weights_that_are_exchanged_while_they_are_away_come_back_or_are_refused(change, dtype):
    """As by `model.half()` for a prediction: the compiled pass would write past their end."""
    changes = {
        "half": lambda data: data.half(),
        "double": lambda data: data.double(),
        "strided": lambda data: torch.stack([data, data], 1)[:, 0],
        "shorter": lambda data: data[:10].clone(),
    }
    w, other = (torch.nn.Parameter(torch.ones(1000, dtype=dtype)) for _ in range(2))
    optimizer = IVON([w, other], lr=0.1, ess=1e3)
    refused = pytest.raises(RuntimeError, match="size of tensor") if change == "shorter" else None
    with refused or contextlib.nullcontext(), optimizer.sampled_params():
        w.data = changes[change](w.data)
    if change != "shorter":
        assert bool((w == 1).all())
        assert bool((other == 1).all())


def test_a_backward_after_the_sample_is_told_that_the_weights_have_changed():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = IVON([w], lr=0.1, ess=1e3)
    with optimizer.sampled_params():
        loss = w.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_seeds_are_those_of_mix():
    head, numbers = (3, 1, 1 << 62, (1 << 64) - 1), [0, 1, 147, 1 << 40]
    assert mixes(head, numbers, 5) == [mix(*head, n, 5) for n in numbers]
    assert mixes((), [], 0) == []
