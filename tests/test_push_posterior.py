"""A posterior is pushed with its weights, alone, or not at all if it belongs to other weights."""

import json
import shutil

import pytest

from bmerge_cli.main import app
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.hub import model_card, parents, plan_push, push_folder
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import pushing, tiny
from tests.pushing import RUN, adapter, files, folder, front

hub = pushing.hub


@pytest.mark.parametrize("only_posterior", [False, True])
def test_a_precision_that_names_no_weights_is_not_pushed(hub, tmp_path, only_posterior):
    where = folder(tmp_path / "a")
    file = where / "posterior" / "precision.posterior"
    file.unlink()
    tiny.write(file, tiny.precisions(0))
    with pytest.raises(PrecisionError, match=r"does not say which weights .* --no-posterior"):
        push_folder(where, "org/a", only_posterior=only_posterior)
    assert "org/a" not in hub.repos
    assert push_folder(where, "org/a", posterior=False).changed


def test_a_posterior_of_other_weights_is_not_pushed_even_where_no_sampled_block_differs(
    hub, tmp_path
):
    where = folder(tmp_path / "a", seed=0)
    shutil.copy(folder(tmp_path / "b", seed=1) / "model.safetensors", where / "model.safetensors")
    with pytest.raises(PrecisionError, match="other weights"):
        push_folder(where, "org/a")
    large = tmp_path / "large"
    mean = tiny.arrays(0, {"w": (512, 512)})
    tiny.posterior(large / "model.safetensors", mean, tiny.precisions(0, {"w": (512, 512)}))
    tiny.into_folder(large)
    before = open_posterior(str(large)).identity
    mean["w"].reshape(-1)[2000] += 1  # between two blocks
    (large / "model.safetensors").unlink()
    tiny.write(large / "model.safetensors", mean)
    assert open_posterior(str(large)).identity == before
    with pytest.raises(PrecisionError, match="other weights"):
        plan_push(large, "org/a")
    assert not hub.log


def test_a_posterior_can_be_pushed_alone_and_used_with_a_model_of_somebody_else(hub, tmp_path):
    hub.add("other/a", files(folder(tmp_path / "bare", seed=0, precision=False)))
    hub.add("org/b", files(folder(tmp_path / "b", seed=1)))
    place = folder(tmp_path / "a", seed=0)
    push_folder(place, "org/a-posterior", only_posterior=True, posterior_form="entries")
    there = hub.repos["org/a-posterior"].files()
    assert set(there) == {
        ".gitattributes",
        "README.md",
        "posterior/precision.posterior",
        "posterior/precision.index.json",
        "posterior/posterior.json",
    }
    assert "transformers" not in there["README.md"].decode()
    report = run_merge(
        MergeConfig(
            models=("other/a", "org/b"),
            weights="precision",
            precision={"other/a": "org/a-posterior"},
            out=str(tmp_path / "out"),
        )
    )
    direct = run_merge(
        MergeConfig(
            models=(str(tmp_path / "a"), str(tmp_path / "b")),
            weights="precision",
            out=str(tmp_path / "direct"),
        )
    )
    first, second = tiny.read(report.path), tiny.read(direct.path)
    assert all((first[n] == second[n]).all() for n in second)


def test_a_folder_with_nothing_but_a_precision_is_pushed_as_a_posterior(hub, tmp_path):
    where = folder(tmp_path / "a") / "posterior"
    with pytest.raises(ConfigError, match="--posterior-only"):
        push_folder(where, "org/p")
    push_folder(where, "org/p", only_posterior=True)
    assert "posterior/precision.posterior" in hub.repos["org/p"].files()


def test_an_adapter_is_pushed_in_pefts_layout_and_merged_by_name(hub, tmp_path):
    for seed in (0, 1):
        push_folder(adapter(tmp_path / f"a{seed}", "org/base", seed), f"org/a{seed}")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "posterior/precision.posterior",
        "posterior/precision.index.json",
    } <= set(hub.repos["org/a0"].files())
    out = RUN.invoke(
        app, ["merge", "org/a0", "org/a1", "--weights", "precision", "-o", str(tmp_path / "both")]
    )
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path / "both" / "merge_report.json").read_text())["adapters"] == [
        "org/a0",
        "org/a1",
    ]
    found = parents(tmp_path / "both")
    assert [(p.repo, p.commit) for p in found] == [
        (f"org/a{s}", hub.repos[f"org/a{s}"].refs["main"]) for s in (0, 1)
    ]
    assert front(model_card(tmp_path / "both"))["base_model"] == ["org/base", "org/a0", "org/a1"]
