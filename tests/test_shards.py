"""Two processes with half of every parameter (FSDP2) train and store what one process does."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.draws import mix
from mergekit_bayes.optim import IVON, full_tensors
from mergekit_bayes.optim.shards import local
from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, open_posterior, save_posterior
from tests import tiny
from tests.two_ranks import found_by_two

WORDS, LENGTH, ROWS, STEPS = 11, 5, 8, 4
# Of the sharded and the unsharded run; `dtype` and `prior` are taken out by `build`.
MODES = {
    "price": {},
    "pairs": {"antithetic": True, "mc_samples": 2},
    "redraw": {"restore": "redraw", "mc_samples": 2},
    "prior": {"prior": True},
    "adapted": {"adapt_prior": True},
    "ggn": {"curvature": "ggn", "curvature_every": 2, "clip_radius": 0.05},
    "bfloat16": {"dtype": torch.bfloat16},
}
COMPARED = [
    m for m in MODES if m != "bfloat16"
]  # whose gradients are rounded where they are reduced
RESUMED = ("adapted", "ggn", "bfloat16")


class Tiny(torch.nn.Module):
    """A transformer with rows that two ranks cannot share evenly, and a parameter of one entry."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = torch.nn.Linear(6, WORDS)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden) * self.scale


class FixedNoise(IVON):
    """Takes its noise from a whole tensor that does not depend on how the parameter is sharded."""

    _gathers = False  # each parameter by `_noise`

    def _noise(self, at, *others):
        fixed = torch.Generator().manual_seed(mix(at.draw.number, at.draw.sample, *at.index))
        eps = torch.randn(at.parameter.shape, generator=fixed)
        if isinstance(at.parameter, DTensor):
            eps = distribute_tensor(
                eps, at.parameter.device_mesh, at.parameter.placements
            ).to_local()
        factor = at.draw.scale / at.group["ess"] ** 0.5 if at.state.get("estimates", 1) else 0.0
        curvature = local(at.state["hess"]) + self._prior_of(at.parameter, at.group, at.state)[1]
        yield (eps * factor / curvature.sqrt() if factor else torch.zeros_like(eps)), *others


def build(mode, *, sharded, seed=0, mesh=None, kind=FixedNoise, reshard=None):
    settings = {
        "lr": 0.1,
        "ess": 1e3,
        "hess_init": 0.1,
        "beta2": 0.9,
        "weight_decay": 1e-2,
        **MODES[mode],
    }
    dtype, general = settings.pop("dtype", torch.float32), settings.pop("prior", False)
    torch.manual_seed(seed)
    model = Tiny().to(dtype)
    centres = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    widths = {n: 50 * torch.rand(p.shape) + 1 for n, p in model.named_parameters()}
    if sharded:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    prior = {p: (centres[n], widths[n]) for n, p in model.named_parameters()} if general else None
    return model, kind(model.parameters(), prior=prior, **settings)


def own_rows(step):
    """Tokens, labels and signs of one step: all rows, or this rank's."""
    g = torch.Generator().manual_seed(step)
    rows = [torch.randint(WORDS, (ROWS, LENGTH), generator=g) for _ in range(2)]
    rows.append(torch.randn(ROWS, LENGTH, WORDS, generator=g))
    if dist.is_initialized():
        each = ROWS // dist.get_world_size()
        rows = [r[dist.get_rank() * each : (dist.get_rank() + 1) * each] for r in rows]
    return rows


def train(model, optimizer, steps):
    for step in steps:
        tokens, labels, roots = own_rows(step)
        for _ in range(int(optimizer.defaults["mc_samples"])):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                logits = model(tokens)
                if optimizer.curvature_due:
                    optimizer.add_curvature((roots * logits).sum(), labels.numel())
                torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), labels.flatten()
                ).backward()
        optimizer.step()


def trained(model, optimizer):
    """Everything that training has changed, by name; shards as they are."""
    reports = {}
    for name, p in model.named_parameters():
        reports[name] = p.detach()
        reports |= {f"{name}/{k}": v for k, v in optimizer.state[p].items()}
    return reports


def child(folder):
    """What each of two ranks does; rank 0 writes what the tests read."""
    dist.init_process_group("gloo")
    reports = {"world": dist.get_world_size()}
    for mode in COMPARED:
        model, optimizer = build(mode, sharded=True)
        train(model, optimizer, range(STEPS))
        whole = full_tensors(trained(model, optimizer))
        health = optimizer.health(ROWS)
        if dist.get_rank() == 0:
            torch.save((whole, health), folder / f"{mode}.pt")
        else:
            reports[f"{mode} elsewhere"] = len(whole)
    for mode in RESUMED:
        reports[f"{mode} resumed"] = resume(folder, mode)
    store(folder)
    reports |= {
        "replicas": replicas(),
        "noise": noise(),
        "prediction": prediction(),
        "unreduced": unreduced(),
    }
    everywhere = [None, None]
    dist.all_gather_object(everywhere, reports)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everywhere))
    dist.destroy_process_group()


def resume(folder, mode):
    """Names of tensors that differ after a run that was resumed from shards."""
    model, optimizer = build(mode, sharded=True, kind=IVON)
    train(model, optimizer, range(3))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder / mode)
    at_save = full_tensors(trained(model, optimizer))
    full = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        torch.save((at_save, full), folder / f"{mode}-full.pt")
    train(model, optimizer, range(3, 5))
    other, again = build(mode, sharded=True, kind=IVON, seed=9)
    load(other, again, folder / mode)
    train(other, again, range(3, 5))
    ours, theirs = trained(model, optimizer), trained(other, again)
    return [n for n in ours if n not in theirs or not torch.equal(local(ours[n]), local(theirs[n]))]


def load(model, optimizer, folder):
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def store(folder):
    """As a user would: gather, and write on rank 0."""
    model, optimizer = build("price", sharded=True)
    train(model, optimizer, range(STEPS))
    mean = full_tensors(model.state_dict())
    precision = full_tensors(optimizer.precision(model.named_parameters()))
    if dist.get_rank() == 0:
        path = tiny.write(folder / "stored.safetensors", {n: t.numpy() for n, t in mean.items()})
        source = SafetensorsSource([path])
        info = PosteriorInfo(
            estimator="ivon",
            unit="token",
            observations=1e3,
            ess=1e3,
            mean=identify(source),
            prior=Prior(kind="isotropic", precision=10.0),
        )
        source.close()
        save_posterior(path, {n: t.numpy() for n, t in precision.items()}, info)


def replicas():
    """Under a mesh of two replicas with one shard each, which tensors differ between the ranks."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model, optimizer = build("price", sharded=True, mesh=mesh, kind=IVON)
    train(model, optimizer, range(2))
    differ = []
    for name, tensor in trained(model, optimizer).items():
        both = [torch.empty_like(local(tensor)) for _ in range(2)]
        dist.all_gather(both, local(tensor))
        differ += [] if torch.equal(*both) else [name]
    return differ


def noise():
    """The correlation of the noise of two shards of equal size."""
    layer = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.zeros_(layer.weight)
    fully_shard(layer)
    with IVON(layer.parameters(), lr=0.1, ess=1.0).sampled_params():
        first, second = layer.weight.full_tensor().flatten().chunk(2)
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def prediction():
    """Whether a sample for prediction reaches every parameter, and leaves nothing behind."""
    model, optimizer = build("price", sharded=True, reshard=True)
    tokens = own_rows(0)[0]
    with torch.no_grad():
        before = model(tokens)
        with optimizer.sampled_params():
            whole = {n: p.full_tensor() for n, p in model.named_parameters()}
            sampled = model(tokens)
        after = model(tokens)
        plain = Tiny()
        plain.load_state_dict(whole)
        expected = plain(tokens)
    return [
        torch.equal(before, after),
        float((sampled - expected).abs().max()),
        float((before - sampled).abs().max()),
    ]


def unreduced():
    """The message where gradients are kept back in the micro-batch whose curvature is asked for."""
    model, optimizer = build("ggn", sharded=True)
    model.set_requires_gradient_sync(False)
    try:
        train(model, optimizer, range(1))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two gloo processes have trained, and what each found."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, found_by_two("tests.test_shards", folder)


@pytest.mark.parametrize("mode", COMPARED)
def test_each_shard_is_updated_as_in_an_unsharded_run_with_the_same_noise(two, mode):
    folder, reports = two
    theirs, health = torch.load(folder / f"{mode}.pt")
    model, optimizer = build(mode, sharded=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, range(STEPS))
    ours = trained(model, optimizer)
    assert set(ours) == set(theirs)
    assert reports[1][f"{mode} elsewhere"] == 0
    for name, tensor in ours.items():
        assert theirs[name].shape == tensor.shape, name
        torch.testing.assert_close(
            theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(float((ours[n] - start[n]).abs().max()) > 1e-4 for n in start)
    for name, value in optimizer.health(ROWS).items():
        tolerance = 0.3 if name == "sigma_over_rms" else 1e-3  # a shard's median is not its matrix'
        assert health[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize("mode", RESUMED)
def test_a_sharded_checkpoint_continues_bit_for_bit(two, mode):
    _, reports = two
    assert [f[f"{mode} resumed"] for f in reports] == [[], []]


@pytest.mark.parametrize("mode", RESUMED)
def test_one_process_loads_the_checkpoint_of_two_shards_in_either_form(two, mode):
    folder, _ = two
    saved, full = torch.load(folder / f"{mode}-full.pt")
    for form in ("shards", "full"):
        model, optimizer = build(mode, sharded=False, kind=IVON, seed=9)
        if form == "shards":
            load(model, optimizer, folder / mode)
        else:
            set_optimizer_state_dict(model, optimizer, full)
        assert optimizer.param_groups[0]["steps"] == 3
        for name, tensor in trained(model, optimizer).items():
            if form == "shards" or "/" in name:
                assert torch.equal(tensor, saved[name]), (form, name)
                assert tensor.dtype == saved[name].dtype


def test_the_gathered_precision_is_stored_for_every_parameter(two):
    folder, _ = two
    model, optimizer = build("price", sharded=False)
    train(model, optimizer, range(STEPS))
    expected = optimizer.precision(model.named_parameters())
    posterior = open_posterior(str(folder / "stored.safetensors"))
    try:
        names = list(posterior.precision.specs)
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    finally:
        posterior.close()
    stored = tiny.read(folder / "stored.posterior")
    for name in names:
        np.testing.assert_allclose(stored[name], expected[name].numpy(), rtol=1e-3)


def test_replicas_of_a_shard_draw_the_same_noise_and_other_shards_their_own(two):
    _, reports = two
    assert [f["replicas"] for f in reports] == [[], []]
    assert abs(reports[0]["noise"]) < 0.1  # 2,048 pairs: five standard deviations


def test_a_sample_for_prediction_reaches_every_shard_and_leaves_nothing(two):
    _, reports = two
    for f in reports:
        unchanged, away, moved = f["prediction"]
        assert unchanged
        assert away < 1e-5 < 1e-3 < moved


def test_curvature_without_reduced_gradients_is_refused(two):
    _, reports = two
    assert all("model.set_requires_gradient_sync(True)" in f["unreduced"] for f in reports)
