"""What `docs/ivon.md` names as faults of ivon-opt 0.1.3: it has them, and IVON has not.

Those that need shards, ranks or a Trainer are shown by the tests that the page names.
"""

import copy
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import ivon as ivon_opt
import pytest
import torch

from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import open_posterior

PAGE = (Path(__file__).parent.parent / "docs" / "ivon.md").read_text()
KINDS = {"ours": IVON, "theirs": ivon_opt.IVON}
# Of another release nothing is claimed.
pytestmark = pytest.mark.skipif(version("ivon-opt") != "0.1.3", reason="the page says 0.1.3")


def weight(*values, **options):
    return torch.nn.Parameter(torch.tensor(values or (1.0, -2.0), **options))


def made(kind, parameters, **settings):
    """An optimizer whose h stays about 1 under the linear losses here, whatever the noise."""
    return KINDS[kind](parameters, **{"lr": 0.1, "ess": 1.0, "rescale_lr": False, **settings})


def step(optimizer, loss):
    with optimizer.sampled_params(train=True):
        loss().backward()
    optimizer.step()


@pytest.mark.parametrize(("kind", "ratio"), [("ours", 1.0), ("theirs", 10.0)])
def test_a_resumed_run_goes_on_with_the_step_it_was_at(kind, ratio):
    """Of a gradient of 1 the first step after a resume is divided by 1 - beta1^step."""
    moves = []
    for resumes in (False, True):
        w = weight(0.0)
        optimizer = made(kind, [w], weight_decay=0.0)
        for _ in range(60):
            step(optimizer, lambda w=w: w.sum())
        if resumes:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = made(kind, [w], weight_decay=0.0)
            optimizer.load_state_dict(saved)
        before = w.item()
        step(optimizer, lambda w=w: w.sum())
        moves.append(w.item() - before)
    assert moves[1] / moves[0] == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize(("kind", "restored"), [("ours", True), ("theirs", False)])
def test_an_exception_inside_leaves_the_mean(kind, restored):
    w = weight()
    optimizer = made(kind, [w])
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    assert torch.equal(w, weight()) == restored


def test_a_parameter_that_the_loss_does_not_use_is_left_alone():
    for kind in KINDS:
        w, unused = weight(), weight()
        optimizer = made(kind, [w, unused])
        if kind == "theirs":
            with pytest.raises(AttributeError):
                step(optimizer, lambda w=w: w.sum())
        else:
            step(optimizer, lambda w=w: w.sum())
            assert torch.equal(unused, weight())
            assert not torch.equal(w, weight())


@pytest.mark.parametrize(("kind", "kept"), [("ours", True), ("theirs", False)])
def test_a_frozen_parameter_is_neither_moved_nor_sampled(kind, kept):
    w, frozen = weight(), weight()
    frozen.requires_grad_(False)
    optimizer = made(kind, [w, frozen])
    with optimizer.sampled_params(train=True):
        assert torch.equal(frozen, weight()) == kept
        w.sum().backward()
        if kind == "theirs":
            frozen.grad = torch.zeros(2)  # which it wants
    optimizer.step()
    assert torch.equal(frozen, weight()) == kept


@pytest.mark.parametrize(("kind", "mean"), [("ours", 1.0), ("theirs", 2.5)])
def test_micro_batches_in_contexts_of_their_own_are_averaged(kind, mean):
    """Without `zero_grad` between them, as a loop that accumulates gradients has it."""
    w = weight(0.0)
    optimizer = made(kind, [w], weight_decay=0.0, beta1=0.0)
    for _ in range(4):
        with optimizer.sampled_params(train=True):
            w.sum().backward()
    optimizer.step()
    assert w.item() == pytest.approx(-0.1 * mean, rel=1e-3)


def test_a_norm_that_is_clipped_too_late_is_seen():
    """Ours are gone when the context closes; theirs stay, and clipping them does nothing."""
    for kind in KINDS:
        w = weight(0.0)
        optimizer = made(kind, [w], weight_decay=0.0, beta1=0.0)
        with optimizer.sampled_params(train=True):
            w.sum().backward()
        norm = float(torch.nn.utils.clip_grad_norm_([w], 0.01))
        optimizer.step()
        assert norm == (0.0 if kind == "ours" else 1.0)
        assert w.item() == pytest.approx(-0.1, rel=1e-3)
        # Inside of the context it acts.
        with optimizer.sampled_params(train=True):
            w.grad = None
            w.sum().backward()
            torch.nn.utils.clip_grad_norm_([w], 0.01)
        before = w.item()
        optimizer.step()
        assert w.item() - before == pytest.approx(-0.001, rel=1e-2)


def test_parameters_may_have_several_dtypes():
    parameters = [weight(), weight(dtype=torch.bfloat16), weight(dtype=torch.float64)]
    with pytest.raises(ValueError, match="dtype"):
        made("theirs", parameters)
    optimizer = made("ours", parameters)
    step(optimizer, lambda: sum(p.double().sum() for p in parameters))
    assert not any(torch.equal(p, torch.tensor([1.0, -2.0]).to(p)) for p in parameters)


def test_the_state_of_bfloat16_weights_is_float32_and_small_steps_add_up():
    w, other = weight(1.0, dtype=torch.bfloat16), weight(1.0, dtype=torch.bfloat16)
    ours, theirs = (
        made(kind, [p], lr=1e-3, ess=1e6, weight_decay=0.0)
        for kind, p in (("ours", w), ("theirs", other))
    )
    for _ in range(20):
        step(ours, lambda: w.float().sum())
    assert w.item() == pytest.approx(0.98, abs=0.002)  # where neighbours are 0.004 apart
    assert {ours.state[w][name].dtype for name in ("hess", "momentum")} == {torch.float32}
    assert {theirs.param_groups[0][name].dtype for name in ("hess", "momentum")} == {torch.bfloat16}


def test_every_fault_names_tests_that_exist():
    table = PAGE[PAGE.index("## What is fixed") :]
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 15))
    for row in rows:
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", row)
        assert named, row
        for file, test in named:
            text = (Path(__file__).parent / f"{file}.py").read_text()
            assert f"def {test}(" in text, (file, test)


def test_the_pages_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, names)
    assert set(names["precision"]) == {"weight", "bias"}
    with open_posterior("tuned") as posterior:
        assert posterior.info.observations == 64


def test_the_pages_table_names_all_arguments_of_both():
    table = PAGE[PAGE.index("| ivon-opt | here |") : PAGE.index("A checkpoint of ivon-opt")]
    named = set(re.findall(r"`(\w+)", table))
    theirs = inspect.signature(ivon_opt.IVON.__init__).parameters
    ours = inspect.signature(IVON.__init__).parameters
    assert set(theirs) - {"self"} <= named
    for name in set(theirs) & set(ours):  # with the same defaults, as it says
        assert ours[name].default == theirs[name].default, name


def test_every_example_is_on_the_page():
    for path in Path(__file__).parent.parent.glob("examples/*.py"):
        assert f"`examples/{path.name}`" in PAGE
