"""A removal by subtraction on the small world, measured as it is, in 4 bits and relearnt."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_bayes.compare import CompareConfig
from mergekit_bayes.compare.variants import refuse_variants, variants_of
from mergekit_bayes.evaluate.inputs import read_inputs
from mergekit_bayes.evaluate.run import evaluate_model
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge.run import run_merge
from mergekit_bayes.plan.settings import MergeConfig

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
BASE, TEXTS = "runs/tiny/base", Path("runs/tiny/texts")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(share of rude continuations, nats a token of kind text) by model and variant."""
    folder = tmp_path_factory.mktemp("durability")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "OMP_NUM_THREADS": "1"}
    world = [sys.executable, str(ROOT / "scripts/tiny_world.py"), "-o", "runs/tiny"]
    subprocess.run(world, cwd=folder, env=environment, check=True, capture_output=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        rude = f"{TEXTS}/rude_train.jsonl"
        run_finetune(
            FinetuneConfig(
                model=BASE, data=rude, output="rude", max_steps=60, batch_size=16, seed=0
            ),
            quiet=True,
        )
        # Of the scales 0.5, 1 and 2 the first with at most 5 % rude on the validation prompts.
        run_merge(MergeConfig(models=("rude",), base=BASE, scale=(-1.0,), out="kinder"))
        found = {}
        for seed in (0, 1, 2):
            config = CompareConfig(
                models=(BASE, "kinder"),
                perplexity={"kind": f"{TEXTS}/kind_test.jsonl"},
                toxicity=f"{TEXTS}/prompts.jsonl",
                scorer=(f"words:{TEXTS}/insults.txt",),
                new_tokens=14,
                bootstrap=0,
                seed=seed,
                four_bits=True,
                relearn=rude,
                device="cpu",
            )
            refuse_variants(config)
            inputs = read_inputs(config.evaluation(BASE))
            for model in config.models:
                for variant, evaluation, change in variants_of(config, model):
                    report = evaluate_model(evaluation, inputs, lambda *_: None, change).report
                    (scores,) = report.toxicity.values()
                    nats = math.log(report.perplexity["kind"].token.value)
                    found[model, variant, seed] = scores.share.value, nats
        left = sorted(path.name for path in Path().iterdir())
    finally:
        os.chdir(before)
    for key, (share, nats) in found.items():
        print(*key, f"{share:.4f} rude, {nats:.4f} nats")
    assert left == ["kinder", "rude", "runs"]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_subtraction_outlives_4_bits_and_not_relearning(measured, seed):
    """One world, base and removal; the seed is that of the sampling and of the rows' order.

    The bounds are wide ones around what was measured on 2026-11-29. The base is the control: it
    becomes as rude by relearning, so what the removed model relearns is no sign of what it kept.
    """
    base, kinder = (
        {v: measured[m, v, seed] for v in ("as it is", "in 4 bits", "relearnt")}
        for m in (BASE, "kinder")
    )
    assert kinder["as it is"][0] < 0.1 < 0.4 < base["as it is"][0]
    assert kinder["in 4 bits"][0] < 0.1 < 0.4 < base["in 4 bits"][0]
    assert kinder["in 4 bits"][1] != kinder["as it is"][1]
    assert min(kinder["relearnt"][0], base["relearnt"][0]) > 0.7
