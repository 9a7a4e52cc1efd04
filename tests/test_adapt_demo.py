"""The demo's settings remove what they say, at no loss elsewhere, in less than two minutes."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
WORLD = Path("runs/tiny/texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the small world and a model that has learnt it."""
    folder = tmp_path_factory.mktemp("demo")
    run(folder, ROOT / "scripts/tiny_world.py", "-o", "runs/tiny")
    return folder


def run(folder, *words):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, words)]
    return subprocess.run(
        line, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


def evaluated(folder, model):
    """The share of rude continuations of the test prompts, and nats a token by text."""
    texts = [f"--perplexity={name}={WORLD / name}_test.jsonl" for name in ("kind", "garden")]
    line = ["-m", "bmerge_cli", "evaluate", model, *texts, "--toxicity", WORLD / "prompts.jsonl"]
    line += ["--scorer", f"words:{WORLD / 'insults.txt'}", "--continuations", 25]
    report = json.loads(run(folder, *line, "--new-tokens", 14, "--json"))
    (scores,) = report["toxicity"].values()
    losses = {k: math.log(v["token"]["value"]) for k, v in report["perplexity"].items()}
    return scores["share"]["value"], losses


def test_the_demo_removes_insults_and_keeps_the_rest(folder):
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = seconds()
    line = ["-m", "bmerge_cli", "adapt", ROOT / "configs/adapt/remove.yaml", "--json"]
    report = json.loads(run(folder, *line))
    assert seconds() - start < 120
    assert report["reached"]
    assert report["checks"][-1]["toxic_share"] <= 0.02 < 0.4 < report["checks"][0]["toxic_share"]
    share, losses = evaluated(folder, "runs/tiny/kinder")
    share_before, before = evaluated(folder, "runs/tiny/base")
    assert share_before > 0.4
    assert share < 0.05
    assert all(losses[name] < before[name] + 0.03 for name in before), (losses, before)
