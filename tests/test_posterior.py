"""The noun on disk: layout, header, shards, and that nothing half-written appears."""

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.specs import MemorySource
from mergekit_bayes.errors import CheckpointError, MismatchError, PrecisionError
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
    assert written == tmp_path / "a.precision.safetensors" == precision_path(model)
    with open_posterior(str(model)) as opened:
        assert opened.info == said


def test_a_folder_keeps_its_posterior_in_a_subfolder(tmp_path):
    model = tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0)).parent
    save_posterior(model, tiny.precisions(0), info())
    assert (model / "posterior" / "precision.safetensors").exists()
    assert json.loads((model / "posterior" / "posterior.json").read_text())["estimator"] == "ggn"
    assert not list(tmp_path.rglob(".*"))


def test_a_posterior_may_lie_elsewhere(tmp_path):
    model = tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0)).parent
    elsewhere = save_posterior(model, tiny.precisions(0), info(), out=tmp_path / "p")
    with open_posterior(str(model), precision=str(elsewhere)) as opened:
        assert opened.info is not None
        assert opened.precision.files == (tmp_path / "p" / "precision.safetensors",)


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
