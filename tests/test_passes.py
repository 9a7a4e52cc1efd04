"""The compiled passes: their noise, and the same steps as those in torch."""

import math

import numpy as np
import pytest
import torch

from mergekit_bayes.optim import IVON, ggn_update, ivon_update, slicing, together
from tests.reference import noise as twin

passes = pytest.importorskip("mergekit_bayes.optim.passes", reason="numba is not installed")


def normals(n, seed=1, start=0):
    out = torch.empty(n)
    passes.noise(out, torch.zeros(n), 1.0, 1.0, seed, start)
    return out


def test_the_twin_gives_the_published_words():
    ones = 0xFFFFFFFF
    assert twin.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert twin.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 25])
@pytest.mark.parametrize("start", [0, passes.BLOCK * 7, passes.BLOCK << 23, passes.BLOCK << 40])
def test_the_noise_is_that_of_its_twin(seed, start):
    n = 2 * passes.BLOCK + 700
    expected = torch.tensor([twin.normal(seed, start + i) for i in range(n)], dtype=torch.float64)
    torch.testing.assert_close(normals(n, seed, start).double(), expected, rtol=2e-6, atol=5e-7)


def test_compiled_and_interpreted_give_the_same_bits():
    """So that nothing is contracted or reassociated, which would depend on the processor."""
    lanes = np.arange(passes.BLOCK // 4, dtype=np.uint32)
    a, b, c, d = passes._philox(lanes, *(np.array([word], np.uint32) for word in (0, 1, 0)))
    rows = [*passes._normal_pair(a, b), *passes._normal_pair(c, d)]
    assert np.array_equal(
        np.concatenate(rows).view(np.uint32), normals(passes.BLOCK).numpy().view(np.uint32)
    )


def test_the_noise_is_normal():
    n = 1 << 22
    eps = normals(n)
    z = eps.double()
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((z**3).mean())) < 5 * (15 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float((torch.special.ndtr(z.sort().values) - steps).abs().max())
    assert distance < 2 / n**0.5  # Kolmogorov and Smirnov
    for apart in (1, 2, 512, 1024, 2048):
        assert abs(float((z[apart:] * z[:-apart]).mean())) < 5 / n**0.5, apart
        assert (
            abs(float((z[apart:].square() * z[:-apart].square()).mean()) - 1) < 5 * (8 / n) ** 0.5
        ), apart


@pytest.mark.parametrize("n", [1, 5, 511, 2047, 2048, 2049])
def test_any_slice_can_be_drawn_alone(n):
    whole = normals(3 * passes.BLOCK)
    assert torch.equal(normals(n), whole[:n])
    assert torch.equal(
        normals(n, start=passes.BLOCK)[: 2 * passes.BLOCK], whole[passes.BLOCK :][:n]
    )
    assert not torch.equal(normals(n, seed=2), whole[:n])


@pytest.mark.parametrize("entries", [False, True])
def test_the_noise_has_the_posteriors_deviation(entries):
    n = 5000
    hess = torch.rand(n) + 0.01
    decay = torch.rand(n) if entries else 0.3
    out = torch.empty(n)
    passes.noise(out, hess, decay, -0.5, 7, 0)
    torch.testing.assert_close(out, -0.5 * normals(n, 7) / (hess + decay).sqrt())


@pytest.mark.parametrize(
    ("clip", "beta1", "share"), [(math.inf, 0.9, 0.3), (0.01, 0.9, 0.9), (0.01, 0.0, 1.0)]
)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("kind", ["price", "ggn", "ggn without an estimate"])
def test_a_compiled_step_is_that_of_torch(kind, prior, clip, beta1, share):
    torch.manual_seed(0)
    n = 3001
    mean, momentum, grad, seen, centre = (torch.randn(n) for _ in range(5))
    hess, decay = torch.rand(n) + 0.1, torch.rand(n) if prior else 0.2
    grad[5] = math.nan
    momentum[7:9], grad[7:9] = 1e4, 1e-4  # of which nothing must be lost
    settings = {
        "step": 3,
        "lr": 0.1,
        "beta1": beta1,
        "weight_decay": decay,
        "clip_radius": clip,
        "debias": True,
        "prior_mean": centre if prior else None,
    }
    results = []
    for module in (None, passes):
        state = [mean.clone(), momentum.clone(), hess.clone()]
        if kind == "price":
            update = module.ivon_update if module else ivon_update
            update(*state, grad, 0.01 * seen, ess=50.0, beta2=0.9, **settings)
        else:
            update = module.ggn_update if module else ggn_update
            update(*state, grad, seen.square() if kind == "ggn" else None, share=share, **settings)
        results.append(torch.stack(state))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert results[1][0, 5].isnan()
    assert not results[1][:, 6].isnan().any()


@pytest.mark.parametrize("curvature", ["price", "ggn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_steps_as_without_the_compiled_passes(dtype, curvature, monkeypatch):
    """With noise that the test gives; a tensor of several slices and a small one, each alone."""
    monkeypatch.setattr(together, "SMALL", -1)
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        parameters = [
            torch.nn.Parameter((0.1 * torch.randn(*shape)).to(dtype))
            for shape in ((700, 900), (3,))
        ]
        optimizer = IVON(
            parameters, lr=0.1, ess=1e4, hess_init=0.1, clip_radius=0.1, curvature=curvature
        )
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(slicing, "passes_module", lambda: None)
            assert bool(slicing.compiled_passes(parameters[0].float())) == compiled
            patch.setattr(optimizer, "_noise", given_noise)
            for _ in range(3):
                with optimizer.sampled_params(train=True):
                    for p in parameters:
                        p.grad = (p.detach() * 0.3 + 0.01).to(dtype)
                    if optimizer.curvature_due:
                        squares = {p: p.grad.float().square() for p in parameters}
                        optimizer._transient.squares.update(squares)
                        optimizer._transient.observations = 2
                optimizer.step()
        states = [optimizer.state[p][name] for p in parameters for name in ("momentum", "hess")]
        results.append(states + [p.detach().float() for p in parameters])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def given_noise(at, *others):
    shape = at.state["hess"].shape
    yield 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(at.index[1])), *others


def test_noise_does_not_depend_on_how_a_tensor_is_sliced(monkeypatch):
    results = []
    for size in (1 << 20, 2 * passes.BLOCK):
        monkeypatch.setattr(slicing, "SLICE", size)
        w = torch.nn.Parameter(torch.zeros(5 * passes.BLOCK + 3))
        with IVON([w], lr=0.1, ess=10.0).sampled_params():
            results.append(w.detach().clone())
    assert torch.equal(*results)
    assert results[0].std() > 0


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "kind", [{}, {"restore": "redraw"}, {"curvature": "ggn", "curvature_every": 1}]
)
def test_no_bit_depends_on_the_number_of_threads(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(slicing, "passes_module", lambda: None)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        w = torch.nn.Parameter(torch.linspace(-1, 1, (1 << 20) + 5))
        optimizer = IVON([w], lr=0.1, ess=1e4, clip_radius=0.1, **kind)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                w.grad = w.detach() - 0.1
                if optimizer.curvature_due:
                    optimizer._transient.squares[w] = w.detach().square()
                    optimizer._transient.observations = 2
            optimizer.step()
        results.append({"w": w.detach(), **optimizer.state[w]})
        torch.set_num_threads(before)
    for name, value in results[0].items():
        if name == "noise":  # a sum over slices
            torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=0)
        else:
            assert torch.equal(value, results[1][name]), name


def test_tensors_that_do_not_fit_are_left_to_torch():
    flat = torch.zeros(4, 4)
    assert passes.fits(flat, flat)
    assert not passes.fits(flat, flat.double())
    assert not passes.fits(flat.T[:2])
    assert not slicing.compiled_passes(torch.zeros((), device="meta"), 0.1)
    w = torch.nn.Parameter(torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last))
    with IVON([w], lr=0.1, ess=10.0).sampled_params():
        assert float(w.detach().std()) > 0
    assert not w.detach().any()
