"""Two ranks with noise of their own are two samples of one process, and stay equal bit for bit."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.trainer import unwrap
from tests.cases import data, loss_of, net
from tests.tiny_models import tiny_gpt2
from tests.trainers import ROWS, trainer
from tests.two_ranks import found_by_two

SETTINGS = {"lr": 0.1, "ess": 50.0, "hess_init": 0.5, "beta2": 0.95, "weight_decay": 0.1}
MODES = {
    "copy": {},
    "samples": {"mc_samples": 2},
    "pairs": {"mc_samples": 2, "antithetic": True},
    "whole batch": {},
    "bfloat16": {"mc_samples": 2},
    "bfloat16 redraw": {"restore": "redraw"},
}
STEPS = 5


class OneProcess(IVON):
    """Its samples (or pairs) are the ranks of the other run, one after the other."""

    each = 1  # samples of a rank, pairs counted once
    _gathers = False  # each parameter alone

    def _noise(self, at, *others):
        self.rank, sample = divmod(at.draw.sample, self.each)
        yield from super()._noise(
            dataclasses.replace(at, draw=at.draw._replace(sample=sample)), *others
        )

    def _place(self, parameter, draw):
        return self.rank


def model_of(mode):
    return net(dtype=torch.bfloat16 if "bfloat16" in mode else torch.float32)


def part(rank, mode):
    x, y = (t.to(torch.bfloat16) if "bfloat16" in mode else t for t in data())
    return (
        (x, y)
        if mode == "whole batch"
        else (x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8])
    )


def one(mode):
    """The run of one process whose k-th share of the samples sees what rank k sees."""
    own = int(MODES[mode].get("mc_samples", 1))
    model = model_of(mode)
    optimizer = OneProcess(model.parameters(), **SETTINGS, **{**MODES[mode], "mc_samples": 2 * own})
    optimizer.each = own // 2 if optimizer.antithetic else own
    for _ in range(STEPS):
        for sample in range(2 * own):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, *part(sample // own, mode)).backward()
        optimizer.step()
    return trained(model, optimizer)


def trained(model, optimizer):
    states = [optimizer.state[p] for p in model.parameters()]
    tensors = [*model.parameters(), *(s[k] for s in states for k in ("momentum", "hess"))]
    return [t.detach().clone() for t in (*tensors, *(s["noise"] for s in states if "noise" in s))]


def child(folder):
    """What each of two ranks does; rank 0 writes what the tests read."""
    reports = {"mixin": mixin(folder)}  # its arguments start the process group
    reports["world"] = dist.get_world_size()
    for mode, settings in MODES.items():
        model = model_of(mode)
        replica = DistributedDataParallel(model)
        optimizer = IVON(model.parameters(), rank_noise=True, **SETTINGS, **settings)
        for _ in range(STEPS):
            for _ in range(int(optimizer.defaults["mc_samples"])):
                with optimizer.sampled_params(train=True), replica.no_sync():
                    optimizer.zero_grad()
                    loss_of(replica, *part(dist.get_rank(), mode)).backward()
            optimizer.step()
        tensors = trained(model, optimizer)
        reports[f"{mode} equal"] = equal(tensors)
        if dist.get_rank() == 0:
            torch.save(tensors, folder / f"{mode}.pt")
    reports["finetune"] = finetuned(folder)
    reports |= {
        "curvature": curvature(),
        "absent": absent(),
        "reduced": reduced(),
        "sharded": sharded(),
    }
    reports["draws"] = draws()
    everywhere = [None, None]
    dist.all_gather_object(everywhere, reports)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everywhere))
    dist.destroy_process_group()


def finetuned(folder):
    """The loss of a fine-tune without the setting and with it; only the noise differs."""
    losses = []
    for own in (False, True):
        settings = FinetuneConfig(
            model=str(folder / "m"),
            data=str(folder / "t.jsonl"),
            output=str(folder / f"out-{own}"),
            max_steps=3,
            batch_size=2,
            ess=1e4,
            rank_noise=own,
            posterior="ivon",
            curvature="price",
            num_processes=2,
        )
        losses.append(run_finetune(settings, quiet=True).loss)
    return losses


def equal(tensors):
    """Whether the ranks have the same bits."""
    flat = torch.cat([t.flatten().double() for t in tensors])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return torch.equal(*both)


def mixin(folder):
    """The Trainer with and without noise of each rank's own.

    Returns how far the momenta are apart after one step with hardly any noise, and whether the
    ranks are equal after training with it.
    """
    momenta = []
    for own in (False, True):
        ivon = {"rank_noise": own, "ess": 1e12, "mc_samples": 2}
        t = trainer(folder, ivon=ivon, max_steps=1, gradient_accumulation_steps=2)
        assert t.accelerator.num_processes == 2
        t.train()
        optimizer = unwrap(t.optimizer)
        momenta.append(
            torch.cat([optimizer.state[p]["momentum"].flatten() for p in t.model.parameters()])
        )
    away = float((momenta[0] - momenta[1]).norm() / momenta[0].norm())
    t = trainer(folder, ivon={"rank_noise": True}, max_steps=3, gradient_accumulation_steps=2)
    t.train()
    return {"away": away, "equal": equal(trained(t.model, unwrap(t.optimizer)))}


def curvature():
    """The mean h of a quadratic of curvature 2: gradients reduced in `step`, and before it."""
    reports = []
    for early in (False, True):
        w = torch.nn.Parameter(torch.zeros(4000))
        optimizer = IVON(
            [w],
            lr=0.0,
            ess=10.0,
            hess_init=2.0,
            beta2=0.98,
            weight_decay=1.0,
            rank_noise=True,
            seed=5,
        )
        optimizer._transient.ranks_differ = early  # the wrong way is refused
        for _ in range(250):
            with optimizer.sampled_params(train=True):
                w.grad = None
                w.square().sum().backward()
                if early:
                    dist.all_reduce(w.grad)
                    w.grad /= 2
            optimizer.step()
        reports.append(float(optimizer.state[w]["hess"].mean()))
    return reports


def absent():
    """The momentum after one step of a parameter that only rank 0 has a gradient for, of 3."""
    for restore, dtype in (("redraw", torch.bfloat16), ("copy", torch.float32)):
        w, rare = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
        optimizer = IVON([w, rare], rank_noise=True, restore=restore, **SETTINGS)
        with optimizer.sampled_params(train=True):
            loss = w.square().sum() * (1 + dist.get_rank())
            (loss + 3 * rare.sum() if dist.get_rank() == 0 else loss).backward()
        optimizer.step()
        assert equal([w, rare])
    return optimizer.state[rare]["momentum"].tolist()


def reduced():
    """The message where DDP has reduced the gradients."""
    model = net()
    replica = DistributedDataParallel(model)
    optimizer = IVON(model.parameters(), rank_noise=True, **SETTINGS)
    with optimizer.sampled_params(train=True):
        loss_of(replica, *part(dist.get_rank(), "copy")).backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def sharded():
    with pytest.raises(ValueError, match="needs replicas") as error:
        IVON(fully_shard(torch.nn.Linear(4, 4)).parameters(), rank_noise=True, **SETTINGS)
    return str(error.value)


def draws():
    """Whether training noise differs between the ranks, and that of a prediction does not."""
    w = torch.nn.Parameter(torch.zeros(8))
    optimizer = IVON([w], rank_noise=True, **SETTINGS)
    reports = []
    for train in (True, False):
        with optimizer.sampled_params(train=train):
            reports.append(equal([w]))
    return reports


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two gloo processes have trained, and what each found."""
    folder = tmp_path_factory.mktemp("noise")
    tiny_gpt2(folder / "m")  # transformers writes on rank 0 only
    rows = [{"text": text} for text in ROWS["text"]]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, found_by_two("tests.test_rank_noise", folder)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_are_two_samples_of_one_process(two, mode):
    """f is the mean of noise_r * g_r over ranks, and over samples with the batches of the ranks."""
    folder, reports = two
    assert [f[f"{mode} equal"] for f in reports] == [True, True]
    for theirs, ours in zip(torch.load(folder / f"{mode}.pt"), one(mode), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_the_curvature_is_not_divided_by_the_number_of_ranks(two):
    """Gradients that are averaged before they are multiplied by the noise give H / R."""
    _, reports = two
    for ours, wrong in (f["curvature"] for f in reports):
        assert ours == pytest.approx(2.0, rel=0.05)
        assert wrong == pytest.approx(1.0, rel=0.1)


def test_gradients_that_ddp_has_reduced_are_refused(two):
    _, reports = two
    assert all("DDP's no_sync()" in f["reduced"] for f in reports)


def test_shards_have_no_noise_of_their_ranks_own(two):
    _, reports = two
    assert all("needs replicas" in f["sharded"] for f in reports)


def test_replicas_are_not_left_to_the_rounding_of_their_own_noise():
    with pytest.raises(ValueError, match="restore='copy'"):
        IVON(net().parameters(), rank_noise=True, restore="redraw", **SETTINGS)


def test_a_parameter_without_a_gradient_on_one_rank_gets_the_mean_with_zero(two):
    _, reports = two
    assert [f["absent"] for f in reports] == [[pytest.approx(0.15)] * 2] * 2


def test_ranks_differ_in_training_noise_and_agree_on_samples_for_prediction(two):
    _, reports = two
    assert [f["draws"] for f in reports] == [[False, True]] * 2


def test_it_is_a_setting_of_finetune(two):
    folder, reports = two
    shared, own = reports[0]["finetune"]
    assert reports[1]["finetune"] == [shared, own]
    assert shared != own == pytest.approx(shared, rel=0.2)
    posterior = open_posterior(str(folder / "out-True"))
    assert posterior.info.training["rank_noise"] is True
    posterior.close()


def test_the_trainer_hands_over_unreduced_gradients_of_the_same_size(two):
    _, reports = two
    for f in reports:
        assert f["mixin"]["equal"]
        assert f["mixin"]["away"] < 1e-3
