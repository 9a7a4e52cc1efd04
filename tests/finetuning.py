"""Tiny data and settings for tests of fine-tuning, and a look at the first gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.posterior import open_posterior
from tests.tiny_models import WORDS, tiny_gpt2


def texts(path, rows=48, seed=0):
    rng = np.random.default_rng(seed)
    with Path(path).open("w") as file:
        for _ in range(rows):
            label = int(rng.integers(2))
            words = [*rng.choice(WORDS[:10], rng.integers(3, 8)), "good" if label else "bad"]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return texts(tmp_path / "t.jsonl")


def config(tmp_path, data, **changes):
    base = tiny_gpt2(tmp_path / "base") if "model" not in changes else changes.pop("model")
    return FinetuneConfig(
        **{
            "model": str(base),
            "output": str(tmp_path / "out"),
            "data": data,
            "batch_size": 4,
            "flush_batches": 6,
            "seed": 3,
            **changes,
        }
    )


class Look(transformers.TrainerCallback):
    """Keeps the gradient of the optimizer's first step, as its momentum holds it."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = optimizer.state
        name = "momentum" if "momentum" in next(iter(states.values())) else "exp_avg"
        self.gradient = np.concatenate(
            [states[p][name].flatten().numpy() for p in model.parameters()]
        ) / (1 - 0.9)


def info_of(path):
    with open_posterior(str(path)) as posterior:
        return posterior.info
