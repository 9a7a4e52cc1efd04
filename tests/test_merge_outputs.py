"""What a merge writes, replaces with force, and refuses to overwrite."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import write_index
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import PosteriorInfo, open_posterior
from tests import three_models, tiny
from tests.three_models import expected_matching, merge

world = three_models.world


def test_force_with_uniform_weights_takes_the_old_precision_away(world):
    merge("a", "b", weights="precision", out="x.safetensors")
    merge("a", "b", out="x.safetensors", force=True)
    assert not Path("x.posterior").exists()


def test_folders_shards_side_files_and_posteriors_come_along(world, tmp_path):
    mean, precision = world["base"]
    folder = tmp_path / "sharded"
    names = list(tiny.SHAPES)
    parts = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for file, part in parts.items():
        tiny.write(folder / file, {n: mean[n] for n in part})
    write_index(folder, "model", parts, 0)
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / file).write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    from mergekit_bayes.checkpoint.layout import checkpoint_files
    from mergekit_bayes.posterior import identify, save_posterior

    source = SafetensorsSource(checkpoint_files(folder))
    info = PosteriorInfo(
        estimator="ggn", unit="token", observations=100, ess=100, mean=identify(source)
    )
    source.close()
    save_posterior(folder, precision, info)
    assert (folder / "posterior" / "precision-00002-of-00002.posterior").exists()
    run_merge(
        MergeConfig(
            models=("a.safetensors", "b.safetensors"), base=str(folder), weights="precision"
        )
    )
    found = sorted(str(p.relative_to("merged")) for p in Path("merged").rglob("*") if p.is_file())
    assert found == [
        "config.json",
        "generation_config.json",
        "merge_recipe.yaml",
        "merge_report.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "posterior/posterior.json",
        "posterior/precision-00001-of-00002.posterior",
        "posterior/precision-00002-of-00002.posterior",
        "posterior/precision.index.json",
        "tokenizer.json",
    ]
    merged = tiny.read("merged")
    for key, (m, _) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(merged[key], m, rtol=1e-5, atol=1e-6)
    again = open_posterior("merged")
    assert again.info.observations == 200
    assert again.info.prior.kind == "base"
    again.close()


def test_a_merge_names_the_output_it_will_not_overwrite(world):
    merge("a", "b", out="x.safetensors")
    with pytest.raises(CheckpointError, match=r"'x.safetensors' exists.*--force"):
        merge("a", "b", out="x.safetensors")
    merge("a", "b", out="x.safetensors", force=True)
    with pytest.raises(CheckpointError, match=r"would overwrite 'a\.safetensors'"):
        merge("a", "b", out="a.safetensors", force=True)


def test_an_output_that_is_a_link_to_itself_is_refused(world):
    for out in ("loop", "loop.safetensors"):
        Path(out).symlink_to(out)
        with pytest.raises(CheckpointError, match=rf"'{out}' is a link that leads to itself"):
            merge("a", "b", out=out)


def test_force_does_not_turn_a_file_into_a_folder_nor_back(world):
    Path("notes.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is a file, and a folder would replace it"):
        merge("a", "b", out="notes.txt", force=True)
    Path("x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, and a file would replace it"):
        merge("a", "b", out="x.safetensors", force=True)
    assert Path("notes.txt").read_text() == "years of work"
