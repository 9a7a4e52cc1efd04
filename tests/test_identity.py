"""Content hashes of tensors and files, some of which are stored on disk and must not change."""

import hashlib
import json

from mergekit_bayes.checkpoint.identity import (
    checkpoint_identity,
    content_hash,
    files_identity,
    identity,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.posterior import identify
from mergekit_bayes.posterior.info import base_identity
from tests import tiny


def test_identity_depends_on_content_and_not_on_sharding(tmp_path):
    tensors = tiny.arrays(0)
    whole = MemorySource(tensors)
    names = list(tensors)
    parts = [
        tiny.write(tmp_path / f"{i}.safetensors", {n: tensors[n] for n in p})
        for i, p in enumerate((names[2:], names[:2]))
    ]
    with SafetensorsSource(parts) as sharded:
        assert identity(sharded) == identity(whole)
        assert identity(sharded, full=True) == identity(whole, full=True)
        changed = dict(tensors, **{names[0]: tensors[names[0]] + 1})
        assert identity(MemorySource(changed)) != identity(whole)
        assert identity(MemorySource({f"x.{n}": t for n, t in tensors.items()})) != identity(whole)


def test_the_hash_of_a_folder_is_that_of_its_weights(tmp_path):
    tensors = tiny.arrays(0)
    path = tiny.write(tmp_path / "m" / "model.safetensors", tensors)
    expected = identity(MemorySource(tensors))
    assert checkpoint_identity(tmp_path / "m") == expected
    assert checkpoint_identity(path) == files_identity([path]) == expected
    assert base_identity(tmp_path / "m") == identify(MemorySource(tensors))


def test_a_base_in_pickles_has_no_identity(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert base_identity(tmp_path) is None


def test_the_hash_of_a_file_is_its_sha256_and_that_of_a_folder_covers_names_and_bytes(tmp_path):
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "b.txt").write_bytes(b"b")
    (tmp_path / "d" / "inner" / "a.txt").write_bytes(b"a")
    a, b = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
    assert content_hash(tmp_path / "d" / "b.txt") == b
    listed = json.dumps([["b.txt", b], ["inner/a.txt", a]]).encode()
    assert content_hash(tmp_path / "d") == hashlib.sha256(listed).hexdigest()
    (tmp_path / "d" / "b.txt").rename(tmp_path / "d" / "c.txt")
    assert content_hash(tmp_path / "d") != hashlib.sha256(listed).hexdigest()
