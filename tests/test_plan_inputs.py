"""The inputs of a plan: base and tasks by name, each with its scale and weighing."""

import numpy as np
import pytest

from mergekit_bayes.plan import MergeConfig, plan_merge
from mergekit_bayes.plan import plan as planning
from tests import tiny
from tests.adapters import adapter, base, factors, precise
from tests.model_forms import SHAPES, here, model  # noqa: F401

pytestmark = pytest.mark.usefixtures("here")


def config(*models, **settings):
    settings = {"weights": "precision", "out": "x.safetensors"} | settings
    return MergeConfig(models=tuple(f"{m}.safetensors" for m in models), **settings)


def three():
    model("base", 0)
    model("a", 1)
    model("b", 2, observations=50.0, ess=50.0)


def test_a_plan_names_its_base_and_its_tasks():
    three()
    with plan_merge(config("a", "b", base="base.safetensors", scale=(0.5, 2.0))) as plan:
        assert plan.base is plan.inputs.donor
        assert (plan.base.ref, plan.base.scale) == ("base.safetensors", 0.0)
        assert [(t.ref, t.scale) for t in plan.tasks] == [
            ("a.safetensors", 0.5),
            ("b.safetensors", 2.0),
        ]
        assert list(plan.inputs) == [plan.base, *plan.tasks]
        assert [t.weighing.gain for t in plan.tasks] == [1.0, 2.0]
        for step in plan.steps:
            assert step.base is step.donor
            assert step.base.input is plan.base
            assert [o.input for o in step.tasks] == list(plan.tasks)
            assert [o.scale for o in step.tasks] == [0.5, 2.0]


def test_without_a_base_the_first_task_is_the_donor_and_has_its_scale():
    three()
    with plan_merge(config("a", "b", scale=(0.25, 0.75))) as plan:
        assert plan.base is None
        assert plan.inputs.donor is plan.tasks[0]
        assert len(plan.inputs) == 2
        for step in plan.steps:
            assert [o.scale for o in step.tasks] == [0.25, 0.75]


def test_a_task_that_lacks_a_tensor_borrows_the_tensor_of_the_base():
    lacking = {n: s for n, s in SHAPES.items() if n != "h.0.conv"}
    model("base", 0)
    model("a", 1, mean=tiny.arrays(1, lacking), precision=tiny.precisions(1, lacking))
    model("b", 2)
    with plan_merge(config("a", "b", base="base.safetensors", on_missing="base")) as plan:
        step = next(s for s in plan.steps if s.name == "h.0.conv")
        borrowed, own = step.tasks
        assert borrowed.mean == step.donor.mean
        assert (borrowed.scale, borrowed.owns_precision) == (0.0, False)
        assert (own.scale, own.owns_precision) == (1.0, True)


def test_an_adapter_is_counted_without_replacing_its_callers_inputs(tmp_path, monkeypatch):
    folder, made = base(tmp_path / "base"), factors(1)
    adapter(tmp_path / "adapter", made, precision=precise(made, 1))
    seen = []
    real = planning.weigh
    monkeypatch.setattr(
        planning,
        "weigh",
        lambda config, inputs, notes: (
            seen.append((inputs, list(inputs))) or real(config, inputs, notes)
        ),
    )
    settings = MergeConfig(
        models=(f"{folder}+{tmp_path / 'adapter'}",),
        base=str(folder),
        weights="precision",
        isotropic={str(folder): 2.0},
        observations={f"{folder}+{tmp_path / 'adapter'}": "3x"},
        out="x",
    )
    with plan_merge(settings) as plan:
        inputs, before = seen[0]
        assert list(inputs) == before
        (given,), (task,) = inputs.tasks, plan.tasks
        assert task is not given
        assert task.posterior.precision is not given.posterior.precision
        assert task.weighing.count == 300.0
        name = "m.q.weight"
        buffers = [np.empty(96, np.uint8) for _ in range(2)]
        for part, buffer in zip((given, task), buffers, strict=True):
            part.posterior.precision.read_bytes(name, 0, buffer.data)
        once, thrice = (b.view(np.float32) for b in buffers)
        assert (thrice > once).all()


def test_files_are_closed_when_a_plan_fails_and_when_it_is_closed(monkeypatch):
    three()
    opened = []
    real = planning.open_model
    monkeypatch.setattr(
        planning, "open_model", lambda *a, **s: opened.append(real(*a, **s)) or opened[-1]
    )
    model(
        "short",
        3,
        mean=tiny.arrays(3, {"other": (2,)}),
        precision=tiny.precisions(3, {"other": (2,)}),
    )
    with pytest.raises(Exception, match="other"):
        plan_merge(config("a", "short", base="base.safetensors"))
    assert len(opened) == 3
    assert not any(m.mean._fds or m.precision.in_files._fds for m in opened)
    opened.clear()
    with plan_merge(config("a", "b", base="base.safetensors")):
        assert all(m.mean._fds and m.precision.in_files._fds for m in opened)
    assert not any(m.mean._fds or m.precision.in_files._fds for m in opened)
