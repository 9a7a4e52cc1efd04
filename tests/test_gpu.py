"""On a CUDA device: the steps of the CPU, exact restores, and no third copy under "redraw"."""

import contextlib

import pytest
import torch

from mergekit_bayes.optim import BSAM, IVON, slicing, together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SHAPES = ((300, 400), (17,), (2, 3, 5), ())
SETTINGS = {
    "lr": 0.1,
    "ess": 1e4,
    "hess_init": 0.1,
    "clip_radius": 0.1,
    "beta2": 0.9,
    "weight_decay": 0.01,
}
KINDS = {
    "price": {},
    "pairs": {"antithetic": True, "mc_samples": 2},
    "redraw": {"restore": "redraw"},
    "adapted": {"adapt_prior": True},
    "ggn": {"curvature": "ggn", "curvature_every": 2},
}


def made(device, dtype=torch.float32, **kind):
    g = torch.Generator().manual_seed(0)
    start = [
        (0.1 * torch.randn(*shape, generator=g)).to(device=device, dtype=dtype) for shape in SHAPES
    ]
    parameters = [torch.nn.Parameter(values) for values in start]
    return parameters, IVON(parameters, **{**SETTINGS, **kind})


def train(parameters, optimizer, steps=4):
    for _ in range(steps):
        for _ in range(int(optimizer.defaults["mc_samples"])):
            with optimizer.sampled_params(train=True):
                for p in parameters:
                    p.grad = None
                if optimizer.curvature_due:
                    optimizer.add_curvature(
                        sum((0.3 * p.float()).square().sum() for p in parameters), 7
                    )
                sum((p.float() - 0.01).square().sum() for p in parameters).backward()
        optimizer.step()
    return [t.detach().float().cpu() for p in parameters for t in (p, *optimizer.state[p].values())]


def given_noise(at, *others):
    noise = 0.01 * torch.randn(
        at.state["hess"].shape, generator=torch.Generator().manual_seed(at.index[1])
    )
    yield (at.draw.scale * noise).to(at.parameter.device), *others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_cpu_with_the_same_noise(kind, dtype, monkeypatch):
    monkeypatch.setattr(together, "SMALL", -1)  # the noise is given to each parameter alone
    results = []
    for device in ("cpu", "cuda"):
        parameters, optimizer = made(device, dtype, **KINDS[kind])
        monkeypatch.setattr(optimizer, "_noise", given_noise)
        results.append(train(parameters, optimizer))
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding / 100)


@pytest.mark.parametrize("slice_size", [1 << 24, 1000])
def test_the_noise_is_normal_and_comes_again(slice_size, monkeypatch):
    monkeypatch.setattr(slicing, "GPU_SLICE", slice_size)
    drawn = []
    for _ in range(2):
        w = torch.nn.Parameter(torch.zeros(300_000, device="cuda"))
        with IVON([w], lr=0.1, ess=1.0, hess_init=1.0, weight_decay=1e-12, seed=3).sampled_params(
            train=True
        ):
            drawn.append(w.detach().clone())
    assert torch.equal(*drawn)
    z = drawn[0].double()
    assert abs(float(z.mean())) < 5 / 300_000**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / 300_000) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_restored_also_after_an_exception(kind):
    parameters, optimizer = made("cuda", **KINDS[kind])
    train(parameters, optimizer, steps=1)
    means = [p.detach().clone() for p in parameters]
    with contextlib.suppress(ZeroDivisionError), optimizer.sampled_params(train=True):
        assert not torch.equal(parameters[0], means[0])
        raise ZeroDivisionError
    for p, mean in zip(parameters, means, strict=True):
        torch.testing.assert_close(p.detach(), mean, rtol=0, atol=1e-6 if kind == "redraw" else 0)


@pytest.mark.parametrize("kind", ["price", "ggn"])
def test_a_run_resumes_to_the_same_bits(kind):
    parameters, optimizer = made("cuda", **KINDS[kind])
    train(parameters, optimizer, steps=3)
    again, resumed = made("cuda", **KINDS[kind])
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(parameters, again, strict=True):
        q.data.copy_(p)
    for a, b in zip(train(parameters, optimizer), train(again, resumed), strict=True):
        assert torch.equal(a, b)


def test_redrawing_keeps_nothing_but_momentum_and_hessian(monkeypatch):
    monkeypatch.setattr(slicing, "GPU_SLICE", 1 << 16)
    w = torch.nn.Parameter(torch.zeros(1 << 24, device="cuda"))
    optimizer = IVON([w], restore="redraw", **SETTINGS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            w.grad = torch.ones_like(w)
        optimizer.step()
    assert (
        torch.cuda.max_memory_allocated() - before < 3.1 * w.nbytes
    )  # gradient, momentum and Hessian
    assert torch.cuda.memory_allocated() - before < 2.1 * w.nbytes


def test_bsam_restores_after_both_passes():
    w = torch.nn.Parameter(torch.randn(1000, device="cuda"))
    mean = w.detach().clone()
    optimizer = BSAM([w], lr=0.0, ess=1e4)
    with optimizer.sampled_params(train=True):
        w.square().sum().backward()
    with optimizer.ascended_params():
        w.grad = None
        w.square().sum().backward()
    assert torch.equal(w.detach(), mean)
    optimizer.step()
    assert torch.equal(w.detach(), mean)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": "stored", "top_k": 8},
        {"lora": {"r": 2}},
        {"optimizer": "ivon", "prior": 10.0},
        {"bf16": True, "until": {"held_out_rise": 50.0}, "check_every": 2},
    ],
    ids=["copy", "stored", "adapter", "ivon", "bf16"],
)
def test_an_adaptation_runs_on_the_device(tmp_path, changes):
    """The start, the rows, the checks and the flush lie where the model lies."""
    from mergekit_bayes.adapt import AdaptConfig
    from mergekit_bayes.adapt.run import run_adapt
    from tests.finetuning import texts
    from tests.tiny_models import tiny_gpt2

    tiny_gpt2(tmp_path / "base", layers=1)
    texts(tmp_path / "remove.jsonl", rows=24, seed=1)
    texts(tmp_path / "memory.jsonl", rows=24, seed=2)
    settings = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "remove": {"data": str(tmp_path / "remove.jsonl")},
        "memory": {"data": str(tmp_path / "memory.jsonl")},
        "batch_size": 4,
        "max_steps": 4,
        **changes,
    }
    report = run_adapt(AdaptConfig.model_validate(settings), quiet=True)
    assert report.steps == 4
    has_precision = "lora" not in changes
    assert (tmp_path / "out" / "posterior").exists() == has_precision


def test_a_preview_forms_its_merges_on_the_device(tmp_path, monkeypatch):
    """The losses are those of the CPU, up to the order of sums."""
    from mergekit_bayes.preview import PreviewConfig, run_preview
    from tests import previews

    monkeypatch.chdir(tmp_path)
    previews.world(".")
    previews.recipe("r.yaml", weights="precision", dtype="BF16")
    settings = {"recipe": "r.yaml", "data": {"x": "cats.csv"}, "grid": (0.0, 0.5, 2.0)}
    here, there = (
        run_preview(PreviewConfig(**settings, device=device, output=device))
        for device in ("cpu", "cuda")
    )
    assert len(here.points) == 7
    for one, other in zip(here.points, there.points, strict=True):
        assert one.scales == other.scales
        assert one.loss["x"] == pytest.approx(other.loss["x"], abs=1e-4)
