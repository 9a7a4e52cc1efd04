"""`bmerge precision --resume`: a stopped estimate goes on to the bytes of one that was not."""

import json
import os
import shutil
import signal

import pytest

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import sink
from mergekit_bayes.checkpoint.locks import open_lock, try_lock
from mergekit_bayes.curvature.sums import Sums
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests.pushing import RUN
from tests.tiny_models import tiny_gpt2

# From Python 3.12 on: threads, of which torch has some, do not go on in a forked process.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROWS = ["the cat sat .", "a good film", "dull tree", "dog ran on the mat", "very fun", "a bad cat"]
EVENTS = (  # what happens one after the other while an estimate runs; before each it may be killed
    (Sums, "add"),
    (sink.SafetensorsSink, "write_bytes"),
    (sink.SafetensorsSink, "close"),
    (os, "rename"),
    (os, "mkdir"),
    (shutil, "rmtree"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ROWS))
    run(tiny_gpt2(folder / "m", layers=1), "whole")
    return folder / "m"


def run(model, name, **settings):
    out = model.parent / f"{name}.safetensors"
    config = {"data": str(model.parent / "t.jsonl"), "batch_size": 1, "save_every": 0}
    config |= {"model": str(model), "output": str(out), **settings}
    return run_precision(PrecisionConfig(**config), quiet=True)


def killed(work, at):
    """Do work in another process until event number `at`; the number of events if it is done."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        try:
            for owner, name in EVENTS:
                setattr(owner, name, counted(getattr(owner, name)))
            work()
            os.write(tell, str(count).encode())
        finally:
            os._exit(0)
    os.close(tell)
    said = os.read(told, 20)
    os.close(told)
    os.waitpid(child, 0)
    return int(said) if said else None


def goes_on_after_kills(model, points, name="killed", **settings):
    """Kill an estimate at some points of its course, and have each go on to the end."""
    folder = model.parent
    expected = (folder / "whole.safetensors").read_bytes()
    events = killed(lambda: run(model, name, force=True, **settings), at=0)
    resumed = 0
    for i in range(points):
        for left in folder.glob(f"{name}.safetensors*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        point = 1 + i * events // points
        assert killed(lambda: run(model, name, **settings), at=point) is None
        if not (folder / f"{name}.safetensors").exists():
            resumed += bool(list(folder.glob(f"{name}.safetensors.partial/part-*/*")))
            run(model, name, resume=True, **settings)
        assert (folder / f"{name}.safetensors").read_bytes() == expected
        assert not [p.name for p in folder.iterdir() if p.name.startswith(f".{name}")]
    assert resumed >= points // 2  # some are killed before the first part, or after the last


def test_an_estimate_that_is_killed_goes_on_to_the_same_bytes(model):
    goes_on_after_kills(model, 3)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "disk"])
def test_an_estimate_goes_on_wherever_it_was_killed(model, place):
    goes_on_after_kills(model, 20, sums=place)


def stopped(model, name, after=3, **settings):
    """An estimate that ends by itself after some batches."""
    with pytest.MonkeyPatch.context() as patch:
        add, batches = Sums.add, []

        def fails(self, name, gradient):
            batches.extend([1] * (name == "transformer.wte.weight"))
            if len(batches) > after:
                raise CheckpointError("the plug was pulled")
            add(self, name, gradient)

        patch.setattr(Sums, "add", fails)
        with pytest.raises(CheckpointError, match="the plug was pulled"):
            run(model, name, **settings)


def test_what_was_saved_is_neither_thrown_away_nor_taken_for_another_estimate(model):
    stopped(model, "s")
    folder = model.parent / "s.safetensors.partial"
    assert [p.name for p in folder.glob("part-*")] == ["part-000000003"]
    with pytest.raises(CheckpointError, match=r"was stopped. Go on with --resume, or start again"):
        run(model, "s")
    with pytest.raises(ConfigError, match="of another estimate: seed was 0 and is 1"):
        run(model, "s", resume=True, seed=1)
    (model.parent / "t.jsonl").write_text('{"text": "the bird sat ."}\n' * 6)
    with pytest.raises(ConfigError, match="of another estimate: rows differ"):
        run(model, "s", resume=True)
    (model.parent / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ROWS))
    run(model, "s", resume=True)
    assert not folder.exists()
    whole = (model.parent / "whole.safetensors").read_bytes()
    assert (model.parent / "s.safetensors").read_bytes() == whole
    stopped(model, "s", force=True)
    run(model, "s", force=True)  # from the start
    assert not folder.exists()
    assert (model.parent / "s.safetensors").read_bytes() == whole


def test_a_resumed_estimate_makes_only_what_is_missing(model, monkeypatch):
    stopped(model, "m", after=4)
    made, add = [], Sums.add

    def counting(self, name, gradient):
        made.append(name)
        add(self, name, gradient)

    monkeypatch.setattr(Sums, "add", counting)
    run(model, "m", resume=True)
    assert made.count("transformer.wte.weight") == len(ROWS) - 4


def test_ctrl_c_says_which_state_is_there_and_how_to_go_on(model, monkeypatch):
    line = ["precision", str(model), "--data", str(model.parent / "t.jsonl"), "--batch-size", "1"]
    line += ["-o", str(model.parent / "j"), "--save-every", "0"]
    add, made = Sums.add, []

    def stops(self, name, gradient):
        made.extend([1] * (name == "transformer.wte.weight"))
        if len(made) > 2:
            raise KeyboardInterrupt
        add(self, name, gradient)

    monkeypatch.setattr(Sums, "add", stops)
    done = RUN.invoke(app, line)
    assert done.exit_code == 130
    assert f"stopped; the state up to batch 2 is in '{model.parent / 'j.partial'}'" in done.stderr
    assert "add --resume" in done.stderr
    monkeypatch.setattr(Sums, "add", add)
    assert RUN.invoke(app, [*line, "--resume"]).exit_code == 0


def test_ctrl_c_says_where_the_texts_are(model, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sums, "add", stops)
    kept = model.parent / "left.jsonl"
    line = ["precision", str(model), "--self-generated", "4", "--keep-generated", str(kept)]
    done = RUN.invoke(app, [*line, "-o", str(model.parent / "l"), "--max-length", "5"])
    assert f"the texts are in '{kept}'; name it with --data" in done.stderr


def test_a_resume_of_nothing_says_that_it_starts(model, caplog):
    run(model, "new", resume=True)
    assert "new.safetensors.partial' holds no saved state" in caplog.text
    caplog.clear()
    stopped(model, "old")
    run(model, "old", resume=True)
    assert not caplog.text


def test_two_processes_do_not_work_on_one_estimate(model):
    stopped(model, "two")
    lock = open_lock(model.parent / "two.safetensors.partial" / "lock")
    try:
        assert try_lock(lock)
        with pytest.raises(CheckpointError, match="another process makes this estimate"):
            run(model, "two", resume=True)
    finally:
        os.close(lock)


@pytest.mark.parametrize("harm", ["cut", "other", "record"])
def test_a_damaged_state_is_one_message(model, harm):
    stopped(model, harm)
    (file,) = (model.parent / f"{harm}.safetensors.partial").glob("part-*/rank-0-of-1")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "other":
        shutil.copy(model / "model.safetensors", file)
    else:
        (file.parents[1] / "record.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"Start again without --resume and with --force"):
        run(model, harm, resume=True)


def test_a_disk_that_is_full_when_the_state_is_saved_is_one_message(model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match=r"cannot be saved \(No space left on device\)"):
        run(model, "full")
    assert not list(model.parent.glob("full*"))


def test_a_stopped_estimate_reads_the_texts_that_it_kept(model, monkeypatch):
    kept = model.parent / "kept.jsonl"
    settings = {"data": None, "self_generated": 6, "keep_generated": str(kept), "max_length": 9}
    run(model, "written", **settings)
    texts = kept.read_bytes()
    kept.unlink()
    stopped(model, "stopped", **settings)
    assert kept.read_bytes() == texts
    monkeypatch.delattr("mergekit_bayes.precision.sources.write_texts")
    kept.write_bytes(texts.replace(b"the", b"a", 1) + b'{"text": "a cat"}\n')
    with pytest.raises(ConfigError, match="rows"):
        run(model, "stopped", resume=True, **settings)
    kept.write_bytes(texts)
    run(model, "stopped", resume=True, **settings)
    first, second = (model.parent / f"{name}.safetensors" for name in ("written", "stopped"))
    assert first.read_bytes() == second.read_bytes()
