"""A file that is not what its name says is named for what it is, with what to do."""

import io
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.foreign import HEAD
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import tiny

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab12" * 16


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 300)
    return buffer.getvalue()


def pickled(**options):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer, **options)
    return buffer.getvalue()


FOREIGN = {
    "Git LFS": (LFS + b"\nsize 988097824\n", r"Git LFS pointer.*988,097,824 bytes.*git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s98--ab.safetensors\n", r"git annex get"),
    "empty": (b"", r"is empty"),
    "a page": (b"\n<!DOCTYPE html>\n<html>" + b" " * 999, r"web page.*hf auth login"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"web page"),
    "JSON": (b'{"error": "Repository not found"}', r"JSON.*Repository not found.*Fetch"),
    "a text": (b"Entry not found", r"a text.*Entry not found.*Fetch"),
    "text in UTF-8": ("Zugriff verweigert: ä".encode() * 99, r"a text.*Zugriff"),
    "zip of torch": (pickled(), r"pickle of PyTorch.*bmerge convert .*bad\.bin -o .*bad\.safe"),
    "old pickle": (pickled(_use_new_zipfile_serialization=False), r"is a pickle.*weights_only"),
    "another zip": (zipped("weights.txt"), r"zip archive.*unzip"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), r"gunzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), r"unzstd"),
    "tar": (b"model.safetensors".ljust(257, b"\0") + b"ustar\x0000" + bytes(99), r"tar -xf"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(99), r"llama\.cpp"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), r"Keras"),
    "numpy": (b"\x93NUMPY\x01\0" + bytes(99), r"numpy"),
    "zeros": (bytes(4096), r"zeros: a downloader reserved"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["bad.safetensors", "folder/model.safetensors"])
def test_a_file_of_another_kind_is_named(tmp_path, kind, name):
    content, message = FOREIGN[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    message = message.replace("bad", "bad" if "bad" in name else "model")
    with pytest.raises(CheckpointError, match=f"(?s){path}: .*{message}"):
        open_posterior(str(path if "bad" in name else path.parent))


def test_a_pickle_is_converted_by_the_commands_that_the_message_names(tmp_path):
    from mergekit_bayes.convert import run_convert

    path = tmp_path / "m.safetensors"
    path.write_bytes(pickled())
    with pytest.raises(CheckpointError, match="Rename it and convert it"):
        open_posterior(str(path))
    path.rename(tmp_path / "m.bin")
    run_convert(str(tmp_path / "m.bin"), path)
    with open_posterior(str(path)) as opened:
        assert set(opened.mean.specs) == {"w"}


def test_a_file_that_was_cut_is_not_taken_for_another_kind(tmp_path):
    path = tiny.write(tmp_path / "m.safetensors", tiny.arrays(0))
    content = path.read_bytes()
    for size in (8, 9, 100, HEAD, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|not JSON"):
            open_posterior(str(path))


@pytest.mark.parametrize("content", [LFS, b"<html></html>"])
def test_what_stands_in_the_place_of_an_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json: is a (Git LFS pointer|web page)"):
        open_posterior(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors.incomplete", r"did not finish \(model\.safetensors\.incomplete\)"),
        (".cache/huggingface/download/ab.12.incomplete", r"did not finish \(\.cache/hug"),
        ("model.safetensors.crdownload", "did not finish"),
        ("consolidated.safetensors", r"holds consolidated\.safetensors.*name the file itself"),
        ("__0_0.distcp", "accelerate merge-weights"),
        ("zero_to_fp32.py", r"DeepSpeed.*zero_to_fp32\.py"),
        ("model-q4.gguf", r"model-q4\.gguf, of llama\.cpp"),
        ("tf_model.h5", r"holds tf_model\.h5"),
        ("README.md", "holds neither"),
    ],
)
def test_a_folder_without_a_model_is_named_for_what_it_holds(tmp_path, name, message):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        open_posterior(str(tmp_path))


def test_a_file_of_full_size_that_aria2_has_not_finished_is_refused(tmp_path):
    tiny.write(tmp_path / "model.safetensors", tiny.arrays(0))
    (tmp_path / "model.safetensors.aria2").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: aria2 has not finished"):
        open_posterior(str(tmp_path))


def test_a_link_to_nothing_and_an_unfinished_file_are_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs/ab12")
    with pytest.raises(CheckpointError, match=r"a link to .*blobs/ab12, which is not there"):
        open_posterior(str(tmp_path))
    (tmp_path / "m.safetensors.part").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a download that did not finish"):
        open_posterior(str(tmp_path / "m.safetensors.part"))


def test_a_side_file_that_is_a_pointer_is_not_copied_for_the_file(tmp_path):
    for seed, name in enumerate("ab"):
        tiny.write(tmp_path / name / "model.safetensors", tiny.arrays(seed))
    page = tmp_path / "a/notes.html"
    page.write_text("<html></html>")
    models = (str(tmp_path / "a"), str(tmp_path / "b"))
    run_merge(MergeConfig(models=models, out=str(tmp_path / "one")))
    (tmp_path / "a/tokenizer.json").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"a/tokenizer\.json: is a Git LFS pointer"):
        run_merge(MergeConfig(models=models, out=str(tmp_path / "two")))


def test_a_name_that_no_shard_holds_is_told_as_an_error_of_the_index(tmp_path):
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = {file: tiny.arrays(i, {f"h.{i}": (3,)}) for i, file in enumerate(files)}
    for file, tensors in names.items():
        tiny.write(tmp_path / file, tensors)
    weight_map = {n: file for file, tensors in names.items() for n in tensors}
    text = str(weight_map | {"mtp.fc": files[1], "mtp.x": files[1]}).replace("'", '"')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {text}}}')
    with pytest.raises(CheckpointError, match=r"'mtp\.fc' .* no other shard does \(2 such\)"):
        open_posterior(str(tmp_path))
    (tmp_path / files[1]).rename(tmp_path / f"{files[1]}.incomplete")
    with pytest.raises(CheckpointError, match=r"which is not there\. There is a download that did"):
        open_posterior(str(tmp_path))


def test_a_text_to_which_a_link_leads_is_not_quoted(tmp_path):
    (tmp_path / "token").write_text("hf_secret_of_this_account")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "token")
    with pytest.raises(CheckpointError, match="is a text, not safetensors") as caught:
        open_posterior(str(tmp_path))
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "found"), [("a." * 60 + "w", "61 parts"), ("a" * 5000, "5,000 ch")]
)
def test_a_name_of_a_tensor_that_takes_long_to_compare_is_refused(tmp_path, name, found):
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{found}.*where at most"):
        open_posterior(str(tmp_path))
