"""Pickled checkpoints into safetensors: equal tensors, equal models, and no code run on the way."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import convert
from mergekit_bayes.checkpoint.archive import Archive
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.convert import run_convert
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.posterior import open_posterior
from tests.tiny_models import tiny_bert, tiny_gpt2

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def pickled(folder, kind=transformers.GPT2LMHeadModel):
    """The folder's model as pytorch_model.bin, as old versions of transformers saved it: tied names
    share memory.
    """
    model = kind.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return model


def sharded(folder, tensors, shards=2):
    """Pickled shards of these tensors, and their index."""
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        held = names[i::shards]
        torch.save({n: tensors[n] for n in held}, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def stored(folder):
    return {n: t for file in checkpoint_files(folder) for n, t in load_file(file).items()}


def bits(tensor):
    tensor = tensor.detach().resolve_conj().contiguous()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_tied_gpt2_is_loaded_equal_and_its_tie_is_named(tmp_path):
    model = pickled(tiny_gpt2(tmp_path / "m"))
    report = run_convert(str(tmp_path / "m"), tmp_path / "out")
    assert report.tied == {HEAD: WTE}
    written = stored(tmp_path / "out")
    assert HEAD not in written
    assert report.tensors == len(written) == len(model.state_dict()) - 1
    assert report.bytes == sum(t.nbytes for t in written.values())
    again, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.lm_head.weight is again.transformer.wte.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        *(p.name for p in (tmp_path / "m").iterdir() if p.suffix == ".json"),
    }
    open_posterior(str(tmp_path / "out")).close()


def test_a_bert_classifier_is_loaded_equal(tmp_path):
    kind = transformers.BertForSequenceClassification
    model = pickled(tiny_bert(tmp_path / "m"), kind)
    assert run_convert(str(tmp_path / "m"), tmp_path / "out").tied == {}
    again = kind.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "says",
    [
        {"tie_word_embeddings": False},
        {"text_config": {"tie_word_embeddings": False}},
        {"model_type": "gptj"},  # unties by default
    ],
)
def test_what_a_config_unties_is_stored_twice_wherever_it_says_so(tmp_path, says):
    folder = tiny_gpt2(tmp_path / "m")
    pickled(folder)
    content = json.loads((folder / "config.json").read_text())
    content.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(content | says))
    assert run_convert(str(folder), tmp_path / "out").tied == {}


def test_what_shares_memory_without_being_tied_in_the_config_is_stored_twice(tmp_path):
    """With `tie_word_embeddings: false` a loader would make up the head that it does not find."""
    folder = tiny_gpt2(tmp_path / "m")
    model = pickled(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_convert(str(folder), tmp_path / "out").tied == {}
    again, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_shards_stay_shards_with_an_index_that_transformers_follows(tmp_path):
    folder = tiny_gpt2(tmp_path / "m")
    model = pickled(folder)
    (folder / "pytorch_model.bin").unlink()
    tensors = {n: t for n, t in model.state_dict().items() if n != HEAD}
    sharded(folder, tensors, 3)
    seen = []
    report = run_convert(
        str(folder), tmp_path / "out", progress=lambda done, total: seen.append(done / total)
    )
    assert report.files == tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert len(seen) == 3
    assert seen[-1] == 1.0
    for i, file in enumerate(report.files):
        assert set(load_file(tmp_path / "out" / file)) == set(list(tensors)[i::3])
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert total == sum(t.nbytes for t in tensors.values())


def test_every_dtype_and_view_keeps_its_bits(tmp_path):
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    tensors = {
        "w": w,
        "transposed": w.t(),
        "rows": w[1:],
        "strided": w[:, ::2],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "empty too": torch.empty(0, 7),
        "special": special,
        "f64": w.double(),
        "f16": w.half(),
        "bf16": w.bfloat16(),
        "e4m3": w.to(torch.float8_e4m3fn),
        "e5m2": w.to(torch.float8_e5m2),
        "bool": w > 0,
        "i64": torch.arange(4),
        "i8": torch.arange(-4, 4, dtype=torch.int8),
        "u8": torch.arange(4, dtype=torch.uint8),
        "complex": torch.view_as_complex(w[:, :2].contiguous()).conj(),
        "parameter": torch.nn.Parameter(w.clone()),
        "expanded": torch.ones(1).expand(5),
        "名": torch.ones(2),
    }
    torch.save(tensors, tmp_path / "m.bin")
    report = run_convert(str(tmp_path / "m.bin"), tmp_path / "out.safetensors")
    assert report.tied == {}
    written = load_file(tmp_path / "out.safetensors")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(written[name]) == bits(tensor), name


def test_one_shard_is_open_at_a_time_and_no_pickle_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    sharded(tmp_path / "m", {name: torch.ones(2000) for name in "abcdef"}, 3)
    read, were_open = Archive.read, set()

    def watched(archive, start, size):
        links = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
        (file,) = [link for link in links if link.endswith(".bin")]
        were_open.add(file)
        return read(archive, start, size)

    def refuse(*_, **__):
        raise AssertionError("a pickle is loaded")

    monkeypatch.setattr(Archive, "read", watched)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    run_convert(str(tmp_path / "m"), tmp_path / "out")
    assert len(were_open) == 3


class Code:
    """What a pickle may call when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("ending", ["", "bare pickle", "beside tensors"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, ending):
    trap = Code(tmp_path / "ran")
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "pytorch_model.bin"
    if ending == "bare pickle":
        file.write_bytes(pickle.dumps({"w": trap}))
    else:
        torch.save({"w": torch.zeros(2), "trap": trap} if ending else trap, file)
    with pytest.raises(CheckpointError) as caught:
        run_convert(str(tmp_path / "m"), tmp_path / "out")
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value)  # no advice to switch the guard off
    assert ("mkdir" in str(caught.value)) == (ending != "bare pickle")
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def torchscript(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a file of torch.save"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "is a Git LFS pointer",
        ),
        (
            lambda path: torch.save(
                {"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False
            ),
            "PyTorch 1.6",
        ),
        (lambda path: torch.save([torch.zeros(2)], path), "holds list, not tensors by name"),
        (lambda path: torch.save(torch.zeros(2), path), "holds Tensor, not tensors by name"),
        (
            lambda path: torch.save({"state_dict": {"w": torch.zeros(2)}}, path),
            "'state_dict' is dict",
        ),
        (lambda path: torch.save({"w": torch.zeros(2), "epoch": 3}, path), "'epoch' is int"),
        (lambda path: torch.save({0: torch.zeros(2)}, path), "0 is Tensor"),
        (lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), "'w' is sparse"),
        (
            lambda path: torch.save({"w": torch.zeros(2, dtype=torch.complex128)}, path),
            "complex128",
        ),
        (lambda path: torch.save({"__metadata__": torch.zeros(2)}, path), "cannot be a name"),
        (lambda path: torch.save({"\ud800": torch.zeros(2)}, path), "cannot be"),
        (torchscript, "is a program of TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_state_dict_is_refused_with_one_message(tmp_path, write, message):
    path = tmp_path / "m.bin"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        run_convert(str(path), tmp_path / "out.safetensors")
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert {p.name for p in tmp_path.iterdir()} == {"m.bin"}


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    torch.save({"w": torch.zeros(50), "v": torch.ones(3)}, path)
    data = path.read_bytes()
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            run_convert(str(path), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pickle_that_changes_meanwhile_is_not_converted(tmp_path, monkeypatch):
    sharded(tmp_path, {name: torch.ones(2) for name in "ab"})
    first = tmp_path / "pytorch_model-00001-of-00002.bin"
    monkeypatch.setattr(
        convert, "copy_side_files", lambda *_: first.write_bytes(first.read_bytes())
    )
    os.utime(first, (0, 0))
    with pytest.raises(ChangedError, match=r"pytorch_model-00001.*was changed"):
        run_convert(str(tmp_path), tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_an_index_of_pickles_is_compared_with_its_shards(tmp_path):
    tensors = {name: torch.ones(2) for name in "abcd"}
    index = sharded(tmp_path, tensors)
    content = json.loads(index.read_text())
    for change, message in (
        (
            {"z": "pytorch_model-00001-of-00002.bin"},
            "'z' is in 'pytorch_model-00001.*does not hold",
        ),
        ({"a": "pytorch_model-00002-of-00002.bin"}, "'a' is in 'pytorch_model-00002"),
        ({"a": "../pytorch_model-00001-of-00002.bin"}, "no file name"),
        ({"a": "pytorch_model-00003-of-00003.bin"}, "is not there"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            run_convert(str(tmp_path), tmp_path / "out")
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not list 'b'"):
        run_convert(str(tmp_path), tmp_path / "out")
    torch.save(tensors, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="is in two shards"):
        run_convert(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_unless_forced_and_the_model_always(tmp_path):
    folder = tiny_gpt2(tmp_path / "m")
    pickled(folder)
    run_convert(str(folder), tmp_path / "out")
    with pytest.raises(CheckpointError, match="--force"):
        run_convert(str(folder), tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_text("")
    run_convert(str(folder), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    for out in (folder, tmp_path):
        with pytest.raises(ConfigError, match="itself"):
            run_convert(str(folder), out, force=True)
    assert (folder / "pytorch_model.bin").exists()


def test_files_become_files_and_folders_folders(tmp_path):
    folder = tiny_gpt2(tmp_path / "m")
    with pytest.raises(CheckpointError, match="already"):
        run_convert(str(folder), tmp_path / "out")
    pickled(folder)
    for ref, out in ((folder, "out.safetensors"), (folder / "pytorch_model.bin", "out")):
        with pytest.raises(ConfigError, match="becomes"):
            run_convert(str(ref), tmp_path / out)
    with pytest.raises(CheckpointError, match="neither"):
        run_convert(str(tmp_path), tmp_path / "out")


def test_an_adapters_pickle_becomes_an_adapters_safetensors(tmp_path):
    torch.save(
        {"base_model.model.h.0.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.bin"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert run_convert(str(tmp_path), tmp_path / "out").files == ("adapter_model.safetensors",)
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_the_line_that_other_commands_print_for_a_pickle_works_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pickled(tiny_gpt2(tmp_path / "m"))
    for ref, out in (("m", "OUT"), ("m/pytorch_model.bin", "OUT.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            open_posterior(ref)
        line = f"bmerge convert {ref} -o {out}"
        assert f"`{line}`" in str(caught.value)
        done = CliRunner().invoke(app, line.split()[1:])
        assert (done.exit_code, done.stdout.strip()) == (0, out)
        assert f"tied and stored once: {HEAD} = {WTE}" in done.stderr
        opened = open_posterior(out)
        assert len(opened.mean.specs) == len(model.state_dict()) - 1
        opened.close()
    done = CliRunner().invoke(app, ["convert", "m", "-o", "again", "--json"])
    assert json.loads(done.stdout)["tied"] == {HEAD: WTE}
    assert (
        Path("again/model.safetensors").read_bytes() == Path("OUT/model.safetensors").read_bytes()
    )


def test_a_hub_id_without_safetensors_names_the_line_too(tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("1" * 40)
    pickled(tiny_gpt2(snapshot))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1" * 40)
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BmergeError, match="bmerge convert org/name -o OUT"):
        open_posterior("org/name")
    assert run_convert("org/name", tmp_path / "out").tied == {HEAD: WTE}
