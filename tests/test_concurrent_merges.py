"""Merges that run at once wait for each other or are refused, and lose nothing."""

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint import locks
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import Part, carry_out, plan_merge, run_merge, work
from mergekit_bayes.merge import partial as partial_module
from mergekit_bayes.merge import run as engine
from tests import interrupted, tiny
from tests.interrupted import config, contents, spoiled

inputs = interrupted.inputs


def test_two_processes_cannot_be_at_the_same_part(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "MOMENT", 0.05)
    settings = config(inputs, out="out")
    with closing(plan_merge(settings)) as plan:
        partial = engine.Partial(engine.partial_path(plan.target), engine.plan_hash(plan))
        with (
            partial.locked(alone=False, force=False),
            partial.journals.open(Part(1, 2), sync=False),
        ):
            with pytest.raises(CheckpointError, match="another process"):
                carry_out(plan, part=Part(1, 2))
            carry_out(plan, part=Part(2, 2))
            with pytest.raises(CheckpointError, match="still being written"):
                carry_out(plan)
        assert carry_out(plan) is not None


def during(monkeypatch, where, name, act):
    """Do something once, in the middle of a merge: before `where.name` is called."""
    real, left = getattr(where, name), [act]

    def called(*args, **kwargs):
        if left:
            left.pop()()
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, called)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (work.Worker, "run"),
        (partial_module.Partial, "publish"),
        (partial_module.Partial, "remove"),
        (os, "replace"),
    ],
)
def test_a_second_identical_command_waits_and_loses_nothing(
    inputs, tmp_path, monkeypatch, out, where, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "MOMENT", 0.05)
    run_merge(config(inputs, out="whole.safetensors"))
    settings = config(inputs, out=out, force=True)
    run_merge(settings.model_copy(update={"scale": (0.5,)}))
    seen = []

    def second():
        for part in (None, Part(2, 2)):
            with pytest.raises(CheckpointError, match=r"Wait for it") as error:
                run_merge(settings, part=part)
            seen.append(str(error.value))

    with monkeypatch.context() as patch:
        during(patch, where, name, second)
        run_merge(settings)
    assert len(seen) == 2
    written = Path(out) if out.endswith("safetensors") else Path(out, "model.safetensors")
    assert written.read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(Path().glob("*.partial"))


def test_who_comes_second_to_the_start_neither_fails_the_first_nor_removes_its_folder(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "MOMENT", 0.05)
    settings = config(inputs, out="out")

    def second():
        with pytest.raises(CheckpointError, match="Wait for it"):
            run_merge(settings)

    during(monkeypatch, engine, "_check_space", second)
    run_merge(settings)
    assert tiny.read("out")


def test_of_two_plans_that_begin_at_once_one_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "MOMENT", 0.05)
    one, other = config(inputs, out="out"), config(inputs, out="out", scale=(0.5,))

    def second():
        with pytest.raises(CheckpointError, match="Wait for it"):
            run_merge(other, part=Part(2, 2))

    during(monkeypatch, os, "replace", second)  # plan.json is about to get its name
    run_merge(one, part=Part(1, 2))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(other, part=Part(2, 2))
    run_merge(one)
    assert json.loads(Path("out/merge_report.json").read_text())["models"][1]["scale"] == 1


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_output_that_was_taken_away_while_it_got_its_name_is_missed(
    inputs, tmp_path, monkeypatch, out
):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(partial_module.Partial, "remove", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            run_merge(config(inputs, out=out))
    Path(out).rename("elsewhere")
    with pytest.raises(
        CheckpointError,
        match=rf"{out}\.partial: the complete output that was in it is gone\. Remove",
    ):
        run_merge(config(inputs, out=out))


def test_what_a_killed_force_moved_aside_comes_back_when_another_merge_takes_over(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="out"))
    old = contents("out")
    with monkeypatch.context() as patch:
        real = os.rename

        def rename(source, target):
            if target == Path("out"):
                raise KeyboardInterrupt
            real(source, target)

        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run_merge(config(inputs, out="out", scale=(0.5,), force=True))
    assert not Path("out").exists()
    with pytest.raises(CheckpointError, match="is nan at"):
        run_merge(spoiled(inputs, tmp_path).model_copy(update={"force": True}))
    assert contents("out") == old
