"""The bytes a parameter that docs/finetuning.md states, measured on real states."""

import gc
import re
from pathlib import Path

import pytest
import torch

from mergekit_bayes.optim import IVON

PAGE = Path(__file__).parent.parent / "docs" / "finetuning.md"
SIZES = (100_000, 30_000, 30_000)  # one alone, two together


def table():
    """Optimizer, and the numbers of each column without and with what is in brackets."""
    section = PAGE.read_text().split("## Memory of the optimizer")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.match("AdamW|IVON", cells[0]):
            numbers = [[int(n) for n in re.findall(r"\d+", cell)] for cell in cells[1:]]
            yield cells[0], [n[0] for n in numbers], [n[-1] for n in numbers]


def rows():
    for name, usual, most in table():
        yield pytest.param(name, usual, False, id=name)
        if most != usual:
            yield pytest.param(name, most, True, id=f"{name}, with an estimate")


@pytest.fixture
def only_new_objects():
    """Lets the garbage collector know only what the test makes."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def bytes_of_tensors():
    """Bytes of the memory of all tensors that the test has made and that are alive."""
    objects = gc.get_objects(generation=0)
    tensors = [t for t in objects if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(("name", "numbers", "has_estimate"), rows())
@pytest.mark.usefixtures("only_new_objects")
def test_the_table_is_what_the_states_take(name, numbers, has_estimate):
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    ps = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=dtype)) for n in SIZES]
    entries = sum(SIZES)
    if name.startswith("AdamW"):
        optimizer = torch.optim.AdamW(ps)
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = bytes_of_tensors()
    else:
        kind = re.findall("price|ggn", name)[0]
        restore = "redraw" if "redraw" in name else "copy"
        every = 1 if has_estimate else 2
        settings = {"curvature": kind, "restore": restore, "curvature_every": every}
        optimizer = IVON(ps, lr=0.1, ess=1e3, **settings)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                if optimizer.curvature_due:
                    optimizer.add_curvature(sum(p.float().sum() for p in ps), 1)
                for p in ps:
                    p.grad = torch.ones_like(p)
                held = bytes_of_tensors()
            optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    measured = [sum(p.nbytes for p in ps), sum(p.nbytes for p in ps), sum(t.nbytes for t in state)]
    columns = [*measured, held - sum(measured), held]
    assert [round(c / entries, 1) for c in columns] == numbers
