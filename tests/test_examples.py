"""Every file under `examples/` runs, and leaves a model that a merge takes by its precision."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes import launcher
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import finetuning, tiny
from tests.tiny_models import tiny_gpt2

data = finetuning.data
EXAMPLES = Path(__file__).parent.parent / "examples"
# What an example needs besides the package's own dependencies.
EXTRAS = {"trl_sft": "trl", "lightning_manual": "lightning"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_an_example_leaves_what_a_merge_takes(tmp_path, data, monkeypatch, name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{EXTRAS[name]} is not installed")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    main = load(name).main
    if name == "plain_loop":
        main("tuned", 0, steps=20)
    else:
        tiny_gpt2("base")
        main("base", data, "tuned", steps=10)
    with open_posterior("tuned") as posterior:
        info = posterior.info
        assert posterior.has_precision
        assert (info.estimator, info.training["optimizer"]) == ("ggn", "ivon")
        assert info.training["steps"] == (20 if name == "plain_loop" else 10)
        rows = 48
        expected = {"plain_loop": 512, "trl_sft": tokens(data) + rows}  # trl adds EOS to each
        assert info.observations == expected.get(name, tokens(data))
    shutil.copytree("tuned", "other")
    run_merge(MergeConfig(models=("tuned", "other"), weights="precision", output="merged"))
    tuned, merged = tiny.read(tmp_path / "tuned"), tiny.read(tmp_path / "merged")
    for tensor in tuned:
        np.testing.assert_allclose(merged[tensor], tuned[tensor], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate_loop", "transformers_trainer"])
def test_an_example_trains_replicas_and_stores_once(tmp_path, data, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    tiny_gpt2("base")
    run = f"from tests.test_examples import load; load({name!r}).main('base', {data!r}, 'tuned', 4)"
    said = "; import torch.distributed as dist; assert dist.get_world_size() == 2"
    assert launcher.launch([sys.executable, "-c", run + said], 2) == 0
    info = finetuning.info_of("tuned")
    assert (info.observations, info.training["steps"]) == (tokens(data), 4)


def tokens(data):
    """Scored tokens: all but the first of each row."""
    return sum(len(json.loads(line)["text"].split()) - 1 for line in Path(data).open())
