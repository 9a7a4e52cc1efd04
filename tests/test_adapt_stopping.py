"""What ends an adaptation, which weights it leaves, and what it keeps on the way."""

import pytest
import torch
import transformers

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.errors import CheckpointError
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, rows to remove and rows of a memory."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "base", layers=1)
    texts(folder / "remove.jsonl", rows=12, seed=1)
    texts(folder / "memory.jsonl", rows=20, seed=2)
    return folder


def settings(world, tmp_path, **changes):
    return AdaptConfig.model_validate(
        {
            "model": str(world / "base"),
            "output": str(tmp_path / "out"),
            "remove": {"data": str(world / "remove.jsonl")},
            "memory": {"data": str(world / "memory.jsonl")},
            "batch_size": 4,
            "max_steps": 6,
            "seed": 3,
            "posterior": "none",
            **changes,
        }
    )


def weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_kept_step_is_the_model_that_a_shorter_run_leaves(world, tmp_path):
    run_adapt(settings(world, tmp_path, max_steps=3, keep_steps=[1, 2]), quiet=True)
    shorter = settings(world, tmp_path, max_steps=2, output=str(tmp_path / "shorter"))
    run_adapt(shorter, quiet=True)
    kept = tmp_path / "out.steps"
    assert sorted(p.name for p in kept.iterdir()) == ["1", "2"]
    assert torch.equal(weights(kept / "2"), weights(tmp_path / "shorter"))
    assert not torch.equal(weights(kept / "2"), weights(tmp_path / "out"))
    assert (kept / "2" / "adapt.yaml").is_file()
    assert (kept / "2" / "tokenizer.json").is_file()
    assert not (kept / "2" / "posterior").exists()


def test_kept_steps_of_an_earlier_run_are_neither_mixed_nor_lost_unasked(world, tmp_path):
    kept = tmp_path / "out.steps"
    run_adapt(settings(world, tmp_path, max_steps=1, keep_steps=[1]), quiet=True)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"out\.steps' exists, where keep_steps stores"):
        run_adapt(settings(world, tmp_path, max_steps=2, keep_steps=[2]), quiet=True)
    with pytest.raises(CheckpointError, match="would replace"):
        run_adapt(
            settings(world, tmp_path, model=str(kept / "1"), keep_steps=[2], force=True), quiet=True
        )
    (kept / "notes").mkdir()
    run_adapt(settings(world, tmp_path, max_steps=2, keep_steps=[2], force=True), quiet=True)
    assert sorted(p.name for p in kept.iterdir()) == ["2", "notes"]
