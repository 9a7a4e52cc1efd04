"""The pass of squared gradients: what it adds, where, how finely, and what it holds meanwhile."""

import os

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from mergekit_bayes.curvature.squares import squared_gradients
from mergekit_bayes.curvature.sums import Keeping, Sums
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models.load import load_model
from tests.tiny_models import tiny_gpt2

TOKENS = torch.randint(4, 20, (6, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids} for ids in TOKENS.split(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a head that is tied to the embedding."""
    return load_model(str(tiny_gpt2(tmp_path_factory.mktemp("m")))).model


def roots(scored):
    """Two vectors for each observation, so that the graph serves two backward passes."""
    for _ in range(2):
        yield torch.empty_like(scored.logits).normal_(generator=scored.generator)


def squares(model, dtype=torch.float32, **keep):
    with torch.no_grad():
        model = model.to(dtype)
    return squared_gradients(model, BATCHES, roots, seed=5, keep=Keeping(**keep)).total


def plain(model):
    """The same sums from whole sets of gradients, each made by one call."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    totals = [torch.zeros(p.shape) for p in parameters]
    generator = torch.Generator().manual_seed(5)
    for batch in BATCHES:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        for _ in range(2):
            v = torch.empty(logits.shape).normal_(generator=generator)
            gradients = torch.autograd.grad((v * logits.float()).sum(), parameters, [None], True)
            for total, gradient in zip(totals, gradients, strict=True):
                total.addcmul_(gradient.float(), gradient.float())
    return dict(zip(names, totals, strict=True))


def by_row(model):
    return {name: 1 for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_gradients_handed_over_one_by_one_add_up_to_the_same_bits(model, tmp_path, dtype, place):
    found = squares(model, dtype, place=tmp_path if place == "disk" else place)
    expected = plain(model)
    assert list(found) == list(expected)
    for name, total in found.items():
        assert torch.equal(total, expected[name])
    assert expected["transformer.wte.weight"].min() > 0  # tied: as input and as output
    assert not list(tmp_path.iterdir())


def test_large_tensors_are_squared_in_parts_to_the_same_bits(model, monkeypatch):
    whole = [squares(model, axes=axes) for axes in ({}, by_row(model))]
    monkeypatch.setattr("mergekit_bayes.curvature.sums._AT_ONCE", 50)
    for axes, expected in zip(({}, by_row(model)), whole, strict=True):
        found = squares(model, axes=axes)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_row_has_the_mean_of_its_entries(model, tmp_path, place):
    entries = squares(model)
    rows = squares(model, axes=by_row(model), place=tmp_path if place == "disk" else place)
    for name, entry in entries.items():
        assert rows[name].shape == (entry.shape[0], *[1] * (entry.ndim - 1))
        expected = entry.double().flatten(1).mean(1) if entry.ndim > 1 else entry.double()
        torch.testing.assert_close(rows[name].double().flatten(), expected, rtol=1e-6, atol=0)


def test_axes_may_stay_that_a_checkpoint_stores_as_rows_of_other_tensors():
    """Stacked experts, (expert, row, column): a row of each expert is one of its own tensor's."""
    sums = Sums({"experts": torch.empty(3, 4, 5)}, Keeping({"experts": 2}))
    gradient = torch.arange(60.0).view(3, 4, 5)
    sums.add("experts", gradient)
    assert torch.equal(sums.totals["experts"], gradient.square().mean(2, keepdim=True))


def test_the_pass_holds_one_gradient_at_a_time_and_gives_back_what_was_there(model, monkeypatch):
    kept, held = torch.ones(1), []
    first, *others = model.parameters()
    first.grad = kept = torch.ones_like(first)
    add = Sums.add

    def counting(self, name, gradient):
        held.append([n for n, p in model.named_parameters() if p.grad is not None])
        assert held[-1] == [name]
        add(self, name, gradient)

    monkeypatch.setattr(Sums, "add", counting)
    squares(model)
    assert len(held) == len(BATCHES) * 2 * (1 + len(others))
    assert first.grad is kept
    assert torch.equal(kept, torch.ones_like(first))
    first.grad = None
    model(input_ids=TOKENS).logits.sum().backward()  # no hook is left
    assert all(p.grad is not None for p in others)
    model.zero_grad()
    assert len(held) == len(BATCHES) * 2 * (1 + len(others))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the room is not asked for at once")
def test_a_disk_without_room_for_the_sums_is_one_message(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"no room for the sums of 4e-07 GB \(No space left"):
        Sums({"w": torch.empty(100)}, Keeping(place=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_offloaded_is_refused(tmp_path):
    folder = tiny_gpt2(tmp_path / "m")
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu"}
    places |= {"transformer.h.1": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    offloaded = transformers.GPT2LMHeadModel.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ConfigError, match=r"'transformer\.h\.1\.ln_1\.weight' is offloaded"):
        squared_gradients(offloaded, BATCHES, roots)


def checkpointed(model, *, use_reentrant):
    """The model with a first block that recomputes its activations, as code of its own may."""
    block = model.transformer.h[0]
    forward = block.forward

    def recomputing(*arguments, **options):
        return checkpoint(
            lambda *inner: forward(*inner, **options), *arguments, use_reentrant=use_reentrant
        )

    block.forward = recomputing
    return block


def test_activations_may_be_recomputed_but_not_in_the_reentrant_way(model):
    expected = squares(model)
    block = checkpointed(model, use_reentrant=False)
    try:
        found = squares(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        del block.forward
        checkpointed(model, use_reentrant=True)
        with pytest.raises(ConfigError, match="reentrant checkpointing, under which gradients"):
            squares(model)
        assert all(p.grad is None for p in model.parameters())
    finally:
        del block.forward


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize("where", ["transformers.GPT2LMHeadModel.forward", "backward", "State"])
def test_a_device_without_memory_says_which_settings_take_less(model, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    where = where if "." in where else f"mergekit_bayes.curvature.squares.{where}"
    monkeypatch.setattr(where, fail)
    with pytest.raises(ConfigError, match=r"too little memory \(.*(--batch-size).*(--pool row)"):
        squares(model)
