"""What checkpoints hold of IVON, VOGN and bSAM, and how runs resume from them."""

import contextlib
import copy

import pytest
import torch

from mergekit_bayes.optim import BSAM, IVON, VOGN
from tests.cases import SETTINGS, data, loss_of, net, train


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


def test_a_group_that_a_distributed_checkpoint_has_not_found_is_not_taken_for_another_optimizers():
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = IVON([{"params": []}, {"params": [w]}], lr=0.1, ess=1e3)
    saved = optimizer.state_dict()
    saved["param_groups"][0] = {"params": []}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["ess"] == 1e3


@pytest.mark.parametrize("kinds", [("price", "ggn"), ("ggn", "price")])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_does_not_go_on_with_another_curvature(kinds, old):
    """Old checkpoints do not say of which curvature they are."""
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
    guard = pytest.raises(
        ValueError, match=f"^{second.__name__}: the checkpoint is another optimizer's"
    )
    with contextlib.nullcontext() if first is second else guard:
        second(net().parameters(), lr=0.1, ess=1e3).load_state_dict(saved)


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
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


COUNTERS = ["draws", "prior_order", "prior_sum", "steps"]
OF_ALL = ["beta1", "beta2", "ess", "hess_init", "lr", "params", "seed", "weight_decay", *COUNTERS]
OF_IVON = [
    "adapt_prior",
    "clip_radius",
    "curvature_every",
    "damping",
    "debias",
    "ggn",
    "mc_samples",
    "rescale_lr",
]


@pytest.mark.parametrize(
    ("kind", "settings", "dtype", "of_weights", "of_groups"),
    [
        (IVON, {}, torch.float32, ["hess", "momentum", "noise", "step"], OF_IVON),
        (IVON, {}, torch.bfloat16, ["hess", "mean", "momentum", "noise", "step"], OF_IVON),
        (
            IVON,
            {"adapt_prior": True},
            torch.float32,
            ["hess", "momentum", "noise", "step", "weight_decay"],
            OF_IVON,
        ),
        (
            IVON,
            {"curvature": "ggn"},
            torch.float32,
            ["estimates", "hess", "momentum", "step"],
            OF_IVON,
        ),
        (VOGN, {}, torch.float32, ["hess", "momentum", "step"], []),
        (VOGN, {}, torch.bfloat16, ["hess", "mean", "momentum", "step"], []),
        (BSAM, {}, torch.float32, ["hess", "momentum", "step"], ["damping", "rho"]),
        (BSAM, {}, torch.bfloat16, ["hess", "mean", "momentum", "step"], ["damping", "rho"]),
    ],
    ids=("price", "master", "adapted", "ggn", "VOGN", "VOGN master", "bSAM", "bSAM master"),
)
def test_checkpoints_have_these_keys_and_no_others(kind, settings, dtype, of_weights, of_groups):
    """Written down, because checkpoints on disk have them."""
    model = net(dtype=dtype)
    optimizer = kind(model.parameters(), lr=0.1, ess=1e3, **settings)
    with optimizer.sampled_params(train=True):
        pass
    saved = optimizer.state_dict()
    assert sorted(saved) == ["param_groups", "state"]
    assert sorted(saved["state"][0]) == of_weights  # a matrix; vectors have no prior of their own
    assert sorted(saved["state"][1]) == [name for name in of_weights if name != "weight_decay"]
    assert [sorted(group) for group in saved["param_groups"]] == [sorted(OF_ALL + of_groups)]
