"""Shards, file headers and side files of a merge's inputs and outputs."""

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_bayes.errors import CheckpointError, ConfigError
from tests import model_forms, tiny
from tests.model_forms import CLASSES, SHAPES, close, load, merge, model, save, shard

here = model_forms.here
world = model_forms.world


def test_the_same_tensor_may_lie_in_different_shards_of_different_models():
    names = list(SHAPES)
    base, a, b = (tiny.arrays(i, SHAPES) for i in range(3))
    shard("base", base, [names[:2], names[2:]])
    shard("a", a, [names[4:], names[1:4], names[:1]])
    shard("b", b, [reversed(names)])
    index = json.loads(Path("a/model.safetensors.index.json").read_text())
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    Path("a/model.safetensors.index.json").write_text(json.dumps(index))
    Path("base/model-00001-of-00002.safetensors").rename(
        "base/zz.safetensors"
    )  # nothing is read from a file's name
    index = Path("base/model.safetensors.index.json")
    index.write_text(index.read_text().replace("model-00001-of-00002", "zz"))
    merge("a", "b", weights="uniform", out="x", scale=(0.5, -1.0))
    close(
        load("x"),
        {
            n: base[n] + 0.5 * (np.float64(a[n]) - base[n]) - (np.float64(b[n]) - base[n])
            for n in names
        },
    )


@pytest.mark.parametrize("padding", range(8))
def test_headers_of_any_length_are_read(padding):
    """Data then begins at an odd offset, on which no array of float32 could be mapped."""
    model("base", 0)
    tensors = {n: torch.as_tensor(t) for n, t in tiny.arrays(1, SHAPES).items()}
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(t.shape),
            "data_offsets": [at, at + 4 * t.numel()],
        }
        at += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    data = b"".join(t.numpy().tobytes() for t in tensors.values())
    Path("odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    model("even", 1)
    for name in ("odd", "even"):
        merge(name, weights="uniform", scale=(0.7,), out=f"{name}_out.safetensors")
    assert Path("odd_out.safetensors").read_bytes() == Path("even_out.safetensors").read_bytes()


def test_shards_are_filled_to_a_size_with_one_index_and_load(world):
    base = world / "qwen-base"
    whole = merge(str(world / "qwen-a"), base=str(base), out="whole")
    merge(str(world / "qwen-a"), base=str(base), out="x", max_shard_size="1.5KB")
    files = sorted(p.name for p in Path("x").glob("*.safetensors"))
    index = json.loads(Path("x/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert len(list(Path("x").glob("*.index.json"))) == 1
    sizes = {f: sum(t.numel() * 4 for t in load_file(f"x/{f}").values()) for f in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert len(files) > 2
    assert all(size <= 1500 for size in sizes.values())
    # Neighbours together would not have fitted.
    assert all(sizes[a] + sizes[b] > 1500 - 1024 for a, b in itertools.pairwise(files))
    state = CLASSES["qwen"].from_pretrained("x").state_dict()
    for name, values in load("whole").items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    for name, values in load("whole/posterior/precision.posterior").items():
        shard = Path("x/posterior", index["weight_map"][name].replace("model-", "precision-"))
        found = load_file(shard.with_suffix(".posterior"))[f"precision:{name}"]
        np.testing.assert_array_equal(found.numpy(), values)
    assert whole.precision_path == "whole/posterior"


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own():
    sizes = {"a": (10,), "b": (100,), "c": (10,), "d": (10,)}
    shard("base", tiny.arrays(0, sizes), [list(sizes)])
    shard("t", tiny.arrays(1, sizes), [list(sizes)])
    merge("t", base="base", weights="uniform", out="x", max_shard_size="100")
    index = json.loads(Path("x/model.safetensors.index.json").read_text())["weight_map"]
    assert [int(index[n][6:11]) for n in sizes] == [1, 2, 3, 3]
    with pytest.raises(
        ConfigError, match=r"--max-shard-size 100: .* needs 520 bytes. Name a folder"
    ):
        merge("t", base="base", weights="uniform", max_shard_size="100")


def test_force_leaves_no_shards_of_an_earlier_merge(world):
    a, base = str(world / "qwen-a"), str(world / "qwen-base")
    for size in ("1.5KB", "700", None, "2KB"):
        merge(a, base=base, out="x", max_shard_size=size)
        merge(a, base=base, out="fresh", max_shard_size=size)
        for one, other in (("x", "fresh"), ("x/posterior", "fresh/posterior")):
            assert sorted(p.name for p in Path(one).iterdir()) == sorted(
                p.name for p in Path(other).iterdir()
            )
    merge(a, base=base, out="x", weights="uniform")
    assert not Path("x/posterior").exists()
    assert not list(Path().glob("*.partial"))


def test_side_files_come_along_complete(world):
    base = world / "gpt2-base"
    merge(str(world / "gpt2-a"), base=str(base), out="x")
    named = {p.name for p in base.iterdir() if p.is_file()} - {"model.safetensors"}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= named
    for name in named:
        assert Path("x", name).read_bytes() == (base / name).read_bytes()
    own = {"model.safetensors", "merge_report.json", "merge_recipe.yaml"}
    assert {p.name for p in Path("x").iterdir() if p.is_file()} == named | own
    transformers.AutoTokenizer.from_pretrained("x")
    merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="q")
    assert Path("q/chat_template.jinja").read_text() == "{{ messages }}"
    # Another merge's report, or code beside the model: the report is not this merge's, the code
    # belongs to the model.
    again = Path("q")
    (again / "modeling_own.py").write_text("pass\n")
    merge(str(world / "qwen-a"), base="q", weights="uniform", out="r")
    assert Path("r/modeling_own.py").exists()
    assert json.loads(Path("r/merge_report.json").read_text())["path"] == "r"


def test_side_files_of_a_base_that_is_a_file_are_the_first_folders(world):
    save("base.safetensors", load(world / "gpt2-base"), "BF16")
    merge(str(world / "gpt2-a"), weights="uniform", out="x")
    assert transformers.AutoModelForCausalLM.from_pretrained("x").dtype == torch.bfloat16
    merge(str(world / "gpt2-a"), weights="uniform", out="x", dtype="F16")
    assert transformers.AutoModelForCausalLM.from_pretrained("x").dtype == torch.float16


def test_force_does_not_take_away_a_folder_that_is_no_model(world):
    Path("papers").mkdir()
    Path("papers/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"'papers' is a folder without a model"):
        merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="papers")
    assert Path("papers/thesis.tex").read_text() == "years of work"
    Path("empty").mkdir()
    merge(str(world / "qwen-a"), base=str(world / "qwen-base"), out="empty")


@pytest.mark.parametrize("out", [".", "..", "x\0y"])
def test_an_output_without_a_name_is_refused(out):
    model("base", 0)
    model("a", 1)
    with pytest.raises(ConfigError, match="name a new folder"):
        merge("a", weights="uniform", out=out)


def test_the_folder_that_a_link_points_to_is_replaced_and_the_link_stays(world):
    Path("real").mkdir()
    Path("link").symlink_to(Path("real").absolute())
    merge(str(world / "gpt2-a"), base=str(world / "gpt2-base"), weights="uniform", out="link")
    merge(str(world / "gpt2-a"), base=str(world / "gpt2-base"), weights="uniform", out="link")
    assert Path("link").is_symlink()
    assert Path("real/model.safetensors").exists()
