"""The noun on disk: layout, header, shards, and that nothing half-written appears."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import precision_path, shard_name, write_index
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.errors import CheckpointError, MismatchError, PrecisionError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, open_posterior, save_posterior
from tests import tiny


def info(**changes):
    mean = identify(MemorySource(tiny.arrays(0)))
    return PosteriorInfo(
        estimator="ggn", unit="token", observations=10, ess=10, mean=mean, **changes
    )


def test_a_precision_file_carries_its_own_meaning(tmp_path):
    model = tiny.write(tmp_path / "a.safetensors", tiny.arrays(0))
    said = info(
        prior=Prior(kind="isotropic", precision=0.5), training={"lr": 0.1}, health={"kappa": 1.0}
    )
    written = save_posterior(model, tiny.precisions(0), said)
    assert written == tmp_path / "a.posterior" == precision_path(model)
    with open_posterior(str(model)) as opened:
        assert opened.info == said


def test_a_folder_keeps_its_posterior_in_a_subfolder(tmp_path):
    model = tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0)).parent
    save_posterior(model, tiny.precisions(0), info())
    assert (model / "posterior" / "precision.posterior").exists()
    assert json.loads((model / "posterior" / "posterior.json").read_text())["estimator"] == "ggn"
    assert not list(tmp_path.rglob(".*"))


def test_a_posterior_may_lie_elsewhere(tmp_path):
    model = tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0)).parent
    elsewhere = save_posterior(model, tiny.precisions(0), info(), out=tmp_path / "p")
    with open_posterior(str(model), precision=str(elsewhere)) as opened:
        assert opened.info is not None
        assert opened.precision.files == (tmp_path / "p" / "precision.posterior",)


def test_a_precision_that_does_not_fit_is_refused(tmp_path):
    model = tiny.write(tmp_path / "a.safetensors", tiny.arrays(0))
    good = tiny.precisions(0)
    with pytest.raises(MismatchError, match="no tensor of that name"):
        save_posterior(model, {"other": good["h.0.ln.bias"]}, info())
    with pytest.raises(MismatchError, match=r"\[4\]"):
        save_posterior(model, {"wte.weight": good["h.0.ln.bias"]}, info())
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(PrecisionError, match="1 of 4 entries"):
            save_posterior(model, {"h.0.ln.bias": np.asarray([1, 2, 3, bad], np.float32)}, info())
    assert not precision_path(model).exists()


def test_an_existing_precision_is_kept_unless_forced(tmp_path):
    model = tiny.write(tmp_path / "a.safetensors", tiny.arrays(0))
    save_posterior(model, tiny.precisions(0), info())
    with pytest.raises(CheckpointError, match="--force"):
        save_posterior(model, tiny.precisions(1), info())
    save_posterior(model, tiny.precisions(1), info(), force=True)
    np.testing.assert_array_equal(
        tiny.read(precision_path(model))["wte.weight"], tiny.precisions(1)["wte.weight"]
    )


def test_a_posterior_of_a_later_format_is_refused(tmp_path):
    model = tiny.write(tmp_path / "a.safetensors", tiny.arrays(0))
    later = {"format": "pt", "bmerge": json.dumps({"format": 99})}
    tiny.write(precision_path(model), tiny.precisions(0), metadata=later)
    with pytest.raises(PrecisionError, match="format 99"):
        open_posterior(str(model))


def earlier(folder, seed, shards=1):
    """A model folder whose posterior was written by a version of format 1."""
    tiny.write(folder / "model.safetensors", tiny.arrays(seed))
    with SafetensorsSource([folder / "model.safetensors"]) as source:
        record = {"format": 1, "estimator": "ggn", "unit": "token", "observations": 10.0}
        record |= {"ess": 10.0, "mean": {"blocks": identify(source).blocks}}
    metadata = {"format": "pt", "bmerge": json.dumps(record)}
    values = tiny.precisions(seed)
    if shards == 1:
        tiny.write(folder / "posterior" / "precision.safetensors", values, metadata=metadata)
        return folder
    files = {shard_name("precision", i, shards): list(values)[i::shards] for i in range(shards)}
    for file, names in files.items():
        part = {n: values[n] for n in names}
        tiny.write(folder / "posterior" / file, part, metadata=metadata)
    write_index(folder / "posterior", "precision", files, 0)
    return folder


def test_a_posterior_of_format_1_is_read_and_merges_as_it_did(tmp_path):
    """The merges of a layout of the past and of today's are the same to the byte."""
    for seed, name in enumerate(("base", "a")):
        old = earlier(tmp_path / "old" / name, seed, shards=1 + seed)
        with open_posterior(str(old)) as opened:
            assert opened.info.format == 1
            assert set(opened.precision.specs) == set(tiny.SHAPES)
            said = opened.info
        new = tiny.write(tmp_path / "new" / name / "model.safetensors", tiny.arrays(seed)).parent
        save_posterior(new, tiny.precisions(seed), said)
        with open_posterior(str(new)) as opened:
            assert opened.info == said.model_copy(update={"format": 2})
    for kind in ("old", "new"):
        settings = {"base": str(tmp_path / kind / "base"), "weights": "precision"}
        run_merge(
            MergeConfig(
                models=(str(tmp_path / kind / "a"),), out=str(tmp_path / f"{kind}-out"), **settings
            )
        )
    for file in ("model.safetensors", "posterior/precision.posterior", "posterior/posterior.json"):
        one, other = (
            (tmp_path / f"{k}-out" / file).read_bytes().replace(f"/{k}/".encode(), b"")
            for k in ("old", "new")
        )
        assert one == other, file


def test_two_precisions_of_one_model_are_refused_and_force_leaves_one(tmp_path):
    folder = earlier(tmp_path / "m", 0)
    tiny.write(folder / "posterior" / "precision.posterior", tiny.precisions(0))
    with pytest.raises(CheckpointError, match=r"both precision\.posterior and precision\.safe"):
        open_posterior(str(folder))
    model = tiny.write(tmp_path / "a.safetensors", tiny.arrays(0))
    old = tiny.write(tmp_path / "a.precision.safetensors", tiny.precisions(0))
    assert open_posterior(str(model)).precision.files == (old,)
    with pytest.raises(CheckpointError, match=r"a\.precision\.safetensors' exists.*--force"):
        save_posterior(model, tiny.precisions(1), info())
    save_posterior(model, tiny.precisions(1), info(), force=True)
    assert not old.exists()
    tiny.write(old, tiny.precisions(0))
    with pytest.raises(CheckpointError, match=r"both a\.posterior and a\.precision\.safetensors"):
        open_posterior(str(model))


def test_a_merge_replaces_a_precision_of_the_earlier_layout(tmp_path):
    model, target = tmp_path / "a.safetensors", tmp_path / "x.safetensors"
    for seed, path in enumerate((model, tmp_path / "b.safetensors")):
        tiny.posterior(path, tiny.arrays(seed), tiny.precisions(seed))
    old = tiny.write(tmp_path / "x.precision.safetensors", tiny.precisions(1))
    models = (str(model), str(tmp_path / "b.safetensors"))
    settings = {"models": models, "out": str(target), "weights": "precision"}
    with pytest.raises(CheckpointError, match=r"x\.precision\.safetensors' exists"):
        run_merge(MergeConfig(**settings))
    run_merge(MergeConfig(**settings, force=True))
    assert open_posterior(str(target)).precision.files == (tmp_path / "x.posterior",)
    assert not old.exists()


def test_a_set_of_precisions_names_what_it_lacks(tmp_path):
    model = tmp_path / "m"
    shards = {"model-1.safetensors": ["wte.weight"], "model-2.safetensors": ["h.0.ln.bias"]}
    for file, names in shards.items():
        tiny.write(model / file, {n: tiny.arrays(0)[n] for n in names})
    write_index(model, "model", shards, 0)
    values = {n: tiny.precisions(0)[n] for names in shards.values() for n in names}
    place = save_posterior(model, values, info())
    index = json.loads((place / "precision.index.json").read_text())
    assert index["tensors"] == {
        "precision:h.0.ln.bias": "precision-00002-of-00002.posterior",
        "precision:wte.weight": "precision-00001-of-00002.posterior",
    }
    (place / "precision-00002-of-00002.posterior").rename(tmp_path / "away")
    with pytest.raises(
        CheckpointError, match=r"'precision-00002-of-00002\.posterior', which is not"
    ):
        open_posterior(str(model))
    (place / "precision.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no precision\.index\.json, which names all files"):
        open_posterior(str(model))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("factors:w",), "begins with none of the roles precision:, rows:, columns:"),
        (("w",), "begins with none of the roles"),
        (("precision:w", "rows:w", "columns:w"), "two precisions of 'w'"),
        (("rows:w",), "'columns:w' is missing"),
    ],
)
def test_a_tensor_that_is_no_precision_is_refused(tmp_path, names, reason):
    model = tiny.write(tmp_path / "a.safetensors", {"w": np.ones((3, 2), np.float32)})
    shapes = {"rows": (3, 1), "columns": (1, 2)}
    tensors = {n: np.ones(shapes.get(n.split(":")[0], (3, 2)), np.float32) for n in names}
    file = tiny.write(tmp_path / "p.safetensors", tensors, metadata=info().to_metadata())
    with pytest.raises(PrecisionError, match=reason):
        open_posterior(str(model), precision=str(file))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_output_and_nothing_else(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")

    def half_write():
        with replacing(target, force=True) as partial:
            partial.mkdir() if kind == "folder" else partial.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half_write()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "old" if kind == "folder" else target).read_text() == "old"


def test_an_index_with_a_missing_shard_names_it(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model-1.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        open_posterior(str(tmp_path))


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for ref in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="safetensors"):
            open_posterior(str(ref))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    """Through the real client, offline, on a cache laid out as the client lays it out."""
    commit = "1" * 40
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / commit
    tiny.write(snapshot / "model.safetensors", tiny.arrays(0))
    save_posterior(snapshot, tiny.precisions(0), info())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ref in ("org/name", f"org/name@{commit}"):
        with open_posterior(ref) as opened:
            assert opened.path == Path(snapshot)
            assert opened.info is not None
    with pytest.raises(CheckpointError, match=r"'org/other'.*offline mode is on"):
        open_posterior("org/other")


def test_identity_is_recorded_in_both_strengths():
    source = MemorySource(tiny.arrays(0, {"w": (200, 200)}))
    assert identify(source).full != identify(source).blocks
    assert identify(source, full=False).full is None


def test_the_example_of_the_specification_is_a_posterior(tmp_path, monkeypatch):
    """`docs/posterior-format.md` is written for other programs: what it writes is read here."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/posterior-format.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(example, "posterior-format.md", "exec"), {})
    with open_posterior("model") as opened:
        assert opened.info.mean.blocks == opened.identity
        assert (opened.info.format, opened.info.observations) == (2, 1000)
        stored = read_tensor(opened.precision, "w")
    np.testing.assert_allclose(stored, [[500.05], [250.05], [1000.05]], rtol=1e-6)


def test_the_specification_names_every_key_of_the_record():
    page = (Path(__file__).parent.parent / "docs/posterior-format.md").read_text()
    section = page.partition("## The record")[2]
    rows = re.findall(r"^\| (`[^|]*`) \|", section, re.M)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(
        PosteriorInfo.model_fields
    )
