"""Quantised weights are refused before a merge begins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.errors import MismatchError
from tests import model_forms
from tests.model_forms import load, merge, shard

here = model_forms.here
world = model_forms.world
QUANTISED = {
    "GPTQ": {"h.0.attn.qweight": np.int32([[1, 2]]), "h.0.attn.scales": np.float16([1])},
    "bitsandbytes": {
        "h.0.attn.weight": np.uint8([[1], [2]]),
        "h.0.attn.weight.absmax": np.float32([1]),
    },
    "int8": {"h.0.attn.weight": np.int8([[1, 2]]), "h.0.attn.SCB": np.float32([1])},
    "MXFP4": {
        "h.0.mlp.experts.up_proj_blocks": np.uint8([[1]]),
        "h.0.mlp.experts.up_proj_scales": np.uint8([[1]]),
    },
    "float 8": {
        "h.0.attn.weight": np.float32([[1, 2]]),
        "h.0.attn.weight_scale_inv": np.float32([1]),
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind):
    for name in ("base", "a"):
        save_file(
            {n: torch.from_numpy(t) for n, t in QUANTISED[kind].items()}, f"{name}.safetensors"
        )
    with pytest.raises(
        MismatchError, match=r"'base\.safetensors' is quantised|of 'base\.safetensors' is quantised"
    ):
        merge("a", weights="uniform")


def test_a_config_that_says_quantised_is_believed(world):
    shard("base", load(world / "gpt2-base"), [list(load(world / "gpt2-base"))])
    Path("base/config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(MismatchError, match="quantization_config"):
        merge(str(world / "gpt2-a"), base="base", weights="uniform")
