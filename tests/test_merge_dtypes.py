"""A merge reads and writes every float dtype with one rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, PrecisionError
from tests import model_forms, tiny
from tests.model_forms import (
    AT,
    CLASSES,
    SHAPES,
    TORCH,
    load,
    matching,
    merge,
    model,
    opened,
    shard,
    spoiled,
)

here = model_forms.here
world = model_forms.world
# Half a step between neighbours, relative and at zero.
ROUNDING = {
    "F64": (2**-53, 0),
    "F32": (2**-24, 0),
    "F16": (2**-11, 2**-25),
    "BF16": (2**-8, 0),
    "F8_E4M3": (2**-4, 2**-10),
    "F8_E5M2": (2**-3, 2**-17),
}


@pytest.mark.parametrize("out", TORCH)
@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_means_of_every_dtype_mix_and_come_out_in_every_dtype(out, weights):
    names = list(TORCH)
    rounded = 0
    for k, own in enumerate(names):
        base, a, b = (
            model(name, i, dtype=names[(k + i) % 6], kept=("F32", "BF16")[(i + k) % 2])
            for i, name in enumerate(("base", "a", "b"))
        )
        merge("a", "b", weights=weights, scale=(0.5, 0.25), dtype=out)
        source = SafetensorsSource([Path("x.safetensors")])
        assert {s.dtype for s in source.specs.values()} == {out}
        source.close()
        found = load("x.safetensors")
        if weights == "uniform":
            base, a, b = (
                (m, dict.fromkeys(m, s))
                for (m, _), s in zip((base, a, b), (1.0, 0.0, 0.0), strict=True)
            )
        for name, (exact, _) in matching(base, (a, b), (0.5, 0.25)).items():
            relative, absolute = ROUNDING[out]
            inner = 4e-14 if out == "F64" else 4e-6
            bound = relative * abs(exact) + absolute + inner * (1 + abs(exact))
            assert (abs(found[name] - exact) <= bound).all(), (own, name)
            nearest = torch.as_tensor(exact).to(TORCH[out]).to(torch.float64).numpy()
            rounded += np.count_nonzero(found[name] == nearest)
    if out not in ("F64", "F32"):
        assert rounded > 0.98 * 6 * sum(int(np.prod(s)) for s in SHAPES.values())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gpt2", "BF16"), ("qwen", "BF16"), ("qwen", "F16"), ("bert", "F64")]
)
def test_a_model_written_in_another_dtype_loads_with_equal_tensors(world, kind, dtype):
    base, a, b = (world / f"{kind}-{n}" for n in ("base", "a", "b"))
    merge(str(a), str(b), base=str(base), out="x", dtype=dtype)
    stored = load("x")
    loaded = CLASSES[kind].from_pretrained("x")
    assert loaded.dtype == TORCH[dtype]
    state = loaded.state_dict()
    for name, values in stored.items():
        np.testing.assert_array_equal(state[name].to(torch.float64).numpy(), values)
    assert set(state) - set(stored) <= {"lm_head.weight"}
    assert json.loads(Path("x/config.json").read_text())["dtype"] == str(TORCH[dtype]).removeprefix(
        "torch."
    )
    for name, (exact, _) in matching(opened(base), [opened(a), opened(b)], (1, 1)).items():
        assert (abs(stored[name] - exact) <= ROUNDING[dtype][0] * abs(exact) + 1e-6).all()


def test_values_beyond_float32_are_said_to_be_so():
    base = model("base", 0)
    a = model(
        "a",
        1,
        mean=spoiled({n: np.float64(x) for n, x in tiny.arrays(1, SHAPES).items()}, 1e300),
        dtype="F64",
    )
    with pytest.raises(
        CheckpointError, match=r"is 1e\+300 at flat index 13. It is merged in F32.*--dtype F64"
    ):
        merge("a")
    merge("a", dtype="F64", weights="uniform")
    exact = base[0][AT[0]] + (a[0][AT[0]] - base[0][AT[0]])
    np.testing.assert_allclose(load("x.safetensors")[AT[0]], exact, rtol=1e-15)
    model(
        "a",
        1,
        precision=spoiled({n: np.float64(x) for n, x in tiny.precisions(1, SHAPES).items()}, 1e300),
        kept="F64",
    )
    with pytest.raises(PrecisionError, match=r"is 1e\+300 at flat index 13. It is merged in F32"):
        merge("a")


@pytest.mark.parametrize("out", ["F16", "F8_E4M3", "F8_E5M2"])
def test_a_merge_that_does_not_fit_its_dtype_is_refused(out):
    model("base", 0, mean={"w": np.float32([1e5, 1])}, precision={"w": np.float32([1, 1])})
    model("a", 1, mean={"w": np.float32([2e5, 1])}, precision={"w": np.float32([1, 1])})
    for settings in ({}, {"scale": ("a.safetensors:w=0",)}):
        with pytest.raises(
            CheckpointError, match=rf"'w': the merge does not fit {out}\. .*BF16 or F32"
        ):
            merge("a", dtype=out, **settings)


def test_the_parts_of_a_model_get_the_dtype_too(world):
    shard("base", load(world / "gpt2-base"), [list(load(world / "gpt2-base"))])
    config = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32", "heads": 2},
    }
    Path("base/config.json").write_text(json.dumps(config))
    merge(
        str(world / "gpt2-a"),
        base="base",
        weights="uniform",
        out="x",
        dtype="BF16",
        side_files="base",
    )
    config["dtype"] = config["text_config"]["torch_dtype"] = "bfloat16"
    written = json.loads(Path("x/config.json").read_text())
    assert {key: written[key] for key in config} == config
