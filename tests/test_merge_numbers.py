"""Numbers at the edges of float32, in every numeric setting of a merge: a result or a message."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergekit_bayes.errors import BmergeError
from tests import tiny
from tests.three_models import merge, world  # noqa: F401

_NUMBERS = (
    "0",
    "1",
    "-1",
    "1e-45",
    "1e-320",
    "1e30",
    "1e38",
    "3.5e38",
    "1e39",
    "1e300",
    "nan",
    "-inf",
)
_A = "a.safetensors"
_SETTINGS = {
    "isotropic": lambda x: {"isotropic": {_A: x}},
    "isotropic-base": lambda x: {"isotropic": {"BASE": x}},
    "anchor": lambda x: {"anchor": x},
    "shrink": lambda x: {"shrink": x},
    "row-shrink": lambda x: {"shrink": f"row:{x}"},
    "observations": lambda x: {"observations": {_A: x}},
    "factor": lambda x: {"observations": {_A: f"{x}x"}},
    "base-factor": lambda x: {"observations": {"BASE": f"{x}x"}},
    "guard": lambda x: {"guard": x},
    "scale": lambda x: {"scale": float(x)},
    "rule": lambda x: {"scale": f"{_A}:.*={x}"},
}


@pytest.mark.parametrize("setting", _SETTINGS)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_every_number_gives_finite_weights_or_a_message(world, setting, scale):  # noqa: F811
    results = set()
    for number in _NUMBERS:
        settings = {"scale": scale, **_SETTINGS[setting](number)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's words about an overflow are not a message
            try:
                merge(
                    "a",
                    base="base",
                    weights="precision",
                    out="o.safetensors",
                    force=True,
                    **settings,
                )
            except BmergeError:
                results.add("refused")
                continue
        results.add("done")
        for name, array in load_file("o.safetensors").items():
            assert np.isfinite(array).all(), (number, name)
    assert results == {"refused", "done"}


@pytest.mark.parametrize("number", _NUMBERS)
def test_a_share_of_any_size_gives_finite_weights_or_a_message(world, number):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            merge("a", "b", scale=[float(number), 1.0], out="out.safetensors")
        except BmergeError:
            return
    for array in load_file("out.safetensors").values():
        assert np.isfinite(array).all()


@pytest.mark.parametrize("size", ["1" * 400 + "GB", "9999999999999TB", "5TB"])
def test_a_shard_of_any_size_is_one_file(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        tiny.write(f"{name}.safetensors", tiny.arrays(i))
    report = merge("a", "b", max_shard_size=size, out="out")
    assert Path(report.path, "model.safetensors").is_file()
