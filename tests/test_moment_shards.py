"""The moments of two processes, each with half of every parameter (FSDP2), are put together."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests import tiny
from tests.tiny_models import tiny_gpt2
from tests.two_ranks import found_by_two


def child(folder):
    """What each of two ranks does, in the forms in which accelerate stores FSDP's optimizer."""
    dist.init_process_group("gloo")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "m")
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99))
    for step in range(3):
        tokens = torch.arange(8).reshape(2, 4) + step + dist.get_rank()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "d")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    worlds = [{"world": dist.get_world_size()}] * 2
    if dist.get_rank() == 0:
        torch.save(whole, folder / "optimizer.bin")
        (folder / "found.json").write_text(json.dumps(worlds))
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_of_fsdp_are_those_of_its_whole_state(tmp_path):
    tiny_gpt2(tmp_path / "m", width=10, layers=1)  # rows that two ranks cannot share evenly
    found_by_two("tests.test_moment_shards", tmp_path)
    assert len(list((tmp_path / "d").glob("*.distcp"))) == 2
    stored = {}
    for source in ("d", "optimizer.bin"):
        report = run_precision(
            PrecisionConfig(
                model=str(tmp_path / "m"),
                moments=str(tmp_path / source),
                output=str(tmp_path / f"p-{source}"),
                observations=80,
                batch_observations=8,
            ),
            quiet=True,
        )
        stored[source] = tiny.read_precision(tmp_path / "m", report.path)
    whole = torch.load(tmp_path / "optimizer.bin", weights_only=True)["state"]
    assert stored["d"].keys() == whole.keys()
    for name, slots in whole.items():
        expected = slots["exp_avg_sq"].numpy() * (640 / (1 - 0.99**3))
        assert float(expected.max()) > 0
        for found in stored.values():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)
