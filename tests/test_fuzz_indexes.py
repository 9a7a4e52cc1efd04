"""Broken indexes of sharded models: each ends in one message, or opens all of the model."""

import json
import os
import random

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import open_posterior
from scripts.fuzzing.documents import ODD, changed_document, json_text
from scripts.fuzzing.mutations import cut, flipped
from tests import tiny

INDEX = "model.safetensors.index.json"


def sharded(folder):
    """Two shards and their index, which is returned."""
    names = list(tiny.arrays(0))
    shards = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for file, held in shards.items():
        tiny.write(folder / file, {n: tiny.arrays(0)[n] for n in held})
    content = {
        "metadata": {"total_size": 4},
        "weight_map": {n: file for file, held in shards.items() for n in held},
    }
    (folder / INDEX).write_text(json.dumps(content))
    return content


def test_a_mutated_index_ends_in_one_message_or_opens_all_of_the_model(tmp_path):
    rng, model = random.Random(0), tmp_path / "m"
    content = sharded(model)
    good = json.dumps(content).encode()
    odd = (
        *ODD,
        "..",
        ".",
        "/etc/passwd",
        "../m/model-00001-of-00002.safetensors",
        "a" * 300,
        "a\0b",
        INDEX,
        "sub",
        "loop.safetensors",
        "model-00001-of-00002.safetensors",
    )
    (model / "sub").mkdir()
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    opened = 0
    for i in range(1500):
        data = good
        if i % 3 == 0:
            data = cut(good, rng)
        elif i % 3 == 1:
            data = flipped(good, rng)
        else:
            data = json_text(changed_document(content, rng, odd), rng)
        (model / INDEX).write_bytes(data)
        message = None
        try:
            source = SafetensorsSource(checkpoint_files(model))
        except CheckpointError as error:
            message = str(error)
        if message is None:
            assert set(source.specs) == set(tiny.SHAPES)
            source.close()
            opened += 1
        else:
            assert message.isprintable()
            assert str(model) in message
    assert 0 < opened < 700


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], "it has none"),
        ({}, "it has none"),
        ({"w": 5}, "which is no file name"),
        ({"w": "../other/model.safetensors"}, "which is no file name"),
        ({"w": "/etc/passwd"}, "which is no file name"),
        ({"w": ".."}, "which is no file name"),
        ({"w": "sub"}, "is not a file"),
        ({"w": "loop.safetensors"}, "is not there"),
        ({"w": "x" * 400}, "is not there"),
    ],
)
def test_an_index_that_names_no_shard_beside_it_is_refused(tmp_path, weight_map, message):
    tiny.write(tmp_path / "other" / "model.safetensors", {"w": np.zeros(2, np.float32)})
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_posterior(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "it has none"),
        (b'{"weight_map":{"w":"a","w":"b"}}', "names 'w' twice"),
        (b"[" * 100_000, "nested"),
        (b"\xff", "UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_an_index_that_is_no_map_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_files(tmp_path)


def test_an_index_that_is_a_folder_or_a_pipe_is_refused(tmp_path):
    for name, make in (
        ("a", os.mkdir),
        ("b", os.mkfifo),
        ("c", lambda path: os.symlink(INDEX, path)),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / INDEX)
        with pytest.raises(CheckpointError, match="not a file"):
            checkpoint_files(tmp_path / name)


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path):
    content = sharded(tmp_path)
    content["weight_map"]["h.9.bias"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"'h\.9\.bias' is in 'model-00002-of-00002\.safetensors'.*does not hold",
    ):
        open_posterior(str(tmp_path))


def test_a_tensor_in_another_shard_than_the_index_says_is_named_with_both(tmp_path):
    content = sharded(tmp_path)
    content["weight_map"]["wte.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"'wte\.weight' is in 'model-00002.*'model-00001-of-00002.*' does"
    ):
        open_posterior(str(tmp_path))


def test_a_tensor_that_the_index_does_not_list_is_named_with_its_shard(tmp_path):
    content = sharded(tmp_path)
    del content["weight_map"]["wte.weight"]
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"does not list 'wte\.weight', which 'model-00001-of-00002"
    ):
        open_posterior(str(tmp_path))


def test_a_precisions_index_is_compared_with_its_shards_too(tmp_path):
    tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0))
    tiny.write(
        tmp_path / "m" / "posterior" / "precision-00001-of-00001.safetensors", tiny.precisions(0)
    )
    index = tmp_path / "m" / "posterior" / "precision.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"wte.weight": "precision-00001-of-00001.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="does not list"):
        open_posterior(str(tmp_path / "m"))


def test_a_single_file_beside_an_index_is_refused_as_one_of_them_is_stale(tmp_path):
    sharded(tmp_path)
    tiny.write(tmp_path / "model.safetensors", tiny.arrays(1))
    with pytest.raises(CheckpointError, match="holds both"):
        checkpoint_files(tmp_path)
    assert checkpoint_files(tmp_path / "model.safetensors") == [tmp_path / "model.safetensors"]
