"""Two processes with half of every tensor fine-tune and store what one process does."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist

import mergekit_bayes.finetune.fsdp as fsdp
from mergekit_bayes import ranks
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.optim import IVON
from tests import tiny
from tests.finetuning import texts
from tests.test_shards import FixedNoise
from tests.tiny_models import tiny_gpt2
from tests.two_ranks import found_by_two


def settings(folder, name, **changes):
    return FinetuneConfig(
        **{
            "model": str(folder / "base"),
            "data": str(folder / "t.jsonl"),
            "output": str(folder / name),
            "seed": 3,
            "ess": 1e5,
            "max_steps": 5,
            "flush_batches": 4,
            "weight_decay": 1e-4,
            "curvature": "price",
            "posterior": "ivon",
            "batch_size": 2,
            "gradient_accumulation": 2,
            "shard": True,
            **changes,
        }
    )


def child(folder):
    fsdp.has_devices = lambda: True
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IVON, "_noise", FixedNoise._noise)
        report = run_finetune(settings(folder, "whole"), quiet=True)
    results["report"] = report.model_dump(mode="json")
    results["world"] = ranks.world()
    everywhere = [None, None]
    dist.all_gather_object(everywhere, results)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(everywhere))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    texts(folder / "t.jsonl", rows=24)
    tiny_gpt2(folder / "base")
    return folder, found_by_two("tests.test_finetune_shards", folder)


def test_x(two):
    folder, results = two
    print(results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IVON, "_noise", FixedNoise._noise)
        run_finetune(settings(folder, "one", shard=False, batch_size=4), quiet=True)
    for file in (".", "posterior/precision.posterior"):
        one, both = tiny.read(folder / "one" / file), tiny.read(folder / "whole" / file)
        assert list(one) == list(both)
        for n in one:
            print(n, abs(one[n] - both[n]).max(), abs(one[n]).max())
