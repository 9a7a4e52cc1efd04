"""Side files of the first model come along with a merge, except those that describe its weights."""

import errno
import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint import side_files as module
from mergekit_bayes.checkpoint.side_files import FETCHED, PUBLISHED, RECORDS, side_files
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import MergeConfig, run_merge, work
from tests import three_models, tiny

world = three_models.world
TRAVELS = (
    "config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.bpe",
    "source.spm",
    "emoji.vocab",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "modeling_own.py",
    "LICENSE",
    "NOTICE.md",
    "1_Pooling/config.json",
    "additional_chat_templates/tool.jinja",
)
STAYS = (
    "pytorch_model.bin",
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "optimizer.pt",
    "training_args.bin",
    ".gitattributes",
    "trainer_state.json",
    "all_results.json",
    "README.md",
    "evaluation/report.json",
    "evaluation/documents.jsonl",
    "onnx/model.onnx",
    "onnx/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/config.json",
    ".cache/x.json",
    "checkpoint-5/config.json",
    "checkpoint-5/optimizer.pt",
    "huge/text.txt",
    "runs/events.out.tfevents.1",
    "pytorch_model.bin.index.json",
)


def with_side_files(folder):
    for name in (*TRAVELS, *STAYS):
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}" if name != "huge/text.txt" else " " * (1 << 21))


def beside(folder):
    written = {"model.safetensors", "merge_recipe.yaml", "merge_report.json"}
    written |= {"adapter_config.json", "adapter_model.safetensors"}
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()} - written


def test_everything_but_tensors_and_what_is_said_of_the_first_model_comes_along(world):
    for name in "ab":
        tiny.write(f"m{name}/model.safetensors", world[name][0])
    with_side_files("ma")
    run_merge(MergeConfig(models=("ma", "mb"), out="out"))
    assert beside("out") == set(TRAVELS)


def test_adapters_bring_the_same_side_files(world, tmp_path):
    from mergekit_bayes.lora import merge_adapters
    from tests.adapters import adapter, factors

    for i, name in enumerate("ab"):
        adapter(Path(name), factors(i))
    with_side_files("a")
    merge_adapters(("a", "b"), Path("out"))
    assert beside("out") == set(TRAVELS)


def test_a_side_file_that_cannot_be_copied_is_found_before_the_first_tensor_is_merged(
    world, monkeypatch
):
    for name in "ab":
        tiny.write(f"m{name}/model.safetensors", world[name][0])
    monkeypatch.setattr(work.Worker, "run", lambda *a: pytest.fail("a tensor was merged"))
    Path("ma/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"ma/config\.json: cannot be read .Expecting"):
        run_merge(MergeConfig(models=("ma", "mb"), out="out", dtype="BF16"))
    real = os.open

    def refusing(path, flags, *rest, dir_fd=None):
        if path == "config.json" and dir_fd is not None:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(
        CheckpointError, match=r"ma/config\.json: cannot be read \(Permission denied\)"
    ):
        run_merge(MergeConfig(models=("ma", "mb"), out="out"))
    assert not list(Path().glob("out*"))


def test_what_is_published_beside_the_records_is_fetched_again():
    for name in set(PUBLISHED) - set(RECORDS):
        assert any(fnmatchcase(name, pattern) for pattern in FETCHED), name


def test_a_link_to_a_checkpoint_that_a_training_removed_is_left_behind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("checkpoint-1000")
    assert side_files(tmp_path) == [Path("config.json")]
    (tmp_path / "tokenizer.json").symlink_to("checkpoint-1000/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link .* not there"):
        side_files(tmp_path)


def test_a_name_fits_a_pattern_as_path_match_says():
    """Most patterns are told without a regular expression; the answer is the same."""
    patterns = {p for group in module.GROUPS.values() for p in group}
    patterns |= {*module._NOT_COPIED, *module._NOT_ENTERED, *module._VOCABULARIES}
    patterns |= {"*", "a*", "*a", "a*a", "a**a", "a?*", "[ab]*", "a/*"}
    # What each pattern's star may stand for, and what it may not.
    names = {p.replace("*", inside) for p in patterns for inside in ("", "x\n.")}
    names |= {p.replace("*", "").upper() for p in patterns} | {"a", "aa", "aba", "ab", "b", "x.a"}
    names |= {"folder/x.bin", "folder/config.json", "folder/x"}
    paths = [path for path in map(Path, names) if path.name]
    found = {(str(path), p): module._fits(path, p) for path in paths for p in patterns}
    assert found == {(str(path), p): path.match(p) for path in paths for p in patterns}
    assert 0 < sum(found.values()) < len(found)
