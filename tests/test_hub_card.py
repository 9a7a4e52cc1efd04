"""A model card is a function of its folder and leaves the text of a user alone."""

import json
import shlex
import shutil
import time

import numpy
import pytest
import yaml

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import sources
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.hub import make_card, model_card, parents, push_folder
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import pushing, tiny
from tests.pushing import RUN, adapter, files, front, peft_adapter

hub = pushing.hub
merged = pushing.merged


def test_a_card_names_parents_relation_scales_and_commits(hub, merged):
    card = model_card(merged, repo="org/ab")
    about = front(card)
    assert about["base_model"] == ["org/base", "org/a", "org/b"]
    assert about["base_model_relation"] == "merge"
    assert about["library_name"] == "transformers"
    assert about["tags"] == ["mergekit-bayes", "merge", "posterior"]
    for name in ("base", "a", "b"):
        assert hub.repos[f"org/{name}"].refs["main"] in card
    assert "S = S0 + sum_t scale_t (S_t - S0)" in card
    assert "guard 0.2" in card
    base, b = (f"org/{n}@{hub.repos[f'org/{n}'].refs['main']}" for n in ("base", "b"))
    assert (
        f"bmerge merge org/ab {b} --base {base} --weights precision "
        "--scale 1 --scale 0.5 -o without" in card
    )
    assert 'open_posterior("org/ab")' in card


@pytest.mark.parametrize("method", ["task_arithmetic", "fisher_negation"])
def test_a_card_says_nothing_of_a_guard_where_there_is_none(merged, tmp_path, method):
    out = tmp_path / "less"
    removal = {"models": ("org/a",), "base": "org/base", "scale": (-1.0,), "method": method}
    run_merge(MergeConfig(**removal, out=str(out)))
    card = model_card(out, repo="org/less")
    assert f"by `{method}`" in card
    assert "guard" not in card.partition("## Recipe")[0]


def printed(card, end):
    """The words of the command that the card prints with the comment `end`."""
    (line,) = [
        line
        for line in card.splitlines()
        if line.startswith("bmerge") and line.endswith(f"# {end}")
    ]
    return shlex.split(line.partition("   #")[0])[1:]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shrink": "0.3", "scale": (1.0, 0.1)},
        {"observations": {"org/base": "2x", "org/a": "5x", "org/b": "3x"}},
        {"counts": "recorded", "anchor": "none", "only": "^h[.]0|wte$"},
        {"isotropic": {"org/base": 2.5}, "pool": "row"},
    ],
)
def test_the_printed_commands_take_a_model_out_again_and_merge_further(
    hub, merged, tmp_path, monkeypatch, settings
):
    together = {"base": "org/base", "weights": "precision"} | settings
    run_merge(MergeConfig(models=("org/a", "org/b"), out=str(tmp_path / "both"), **together))
    push_folder(tmp_path / "both", "org/both", posterior_form="entries")
    card = hub.repos["org/both"].files()["README.md"].decode()
    hub.repos["org/a"].commit("main", {}, "emptied since")
    hub.repos["org/base"].commit("main", {}, "emptied since")
    monkeypatch.setattr(sources, "_COMMITS", {})
    monkeypatch.chdir(tmp_path)
    out = RUN.invoke(app, printed(card, "take org/a out again"))
    assert out.exit_code == 0, out.output
    alone = together | {"scale": together.get("scale", (1.0,))[-1:]}
    kept = {n: v for n, v in alone.get("observations", {}).items() if n != "org/a"}
    names = {"org/base": str(tmp_path / "base"), "org/b": str(tmp_path / "b")}
    alone = alone | {
        "base": names["org/base"],
        "observations": {names[n]: v for n, v in kept.items()},
        "isotropic": {names[n]: v for n, v in alone.get("isotropic", {}).items()},
    }
    run_merge(MergeConfig(models=(names["org/b"],), out=str(tmp_path / "alone"), **alone))
    without, direct = tiny.read(tmp_path / "without"), tiny.read(tmp_path / "alone")
    both = tiny.read(tmp_path / "both")
    for name in direct:
        numpy.testing.assert_allclose(without[name], direct[name], atol=1e-5, err_msg=name)
    assert any(numpy.abs(both[n] - direct[n]).max() > 1e-3 for n in direct)
    further = printed(card, "merge it further")
    further[further.index("OTHER")] = str(tmp_path / "b")
    out = RUN.invoke(app, further)
    assert out.exit_code == 0, out.output


def test_an_adapted_model_is_taken_out_as_what_went_in(hub, merged, tmp_path, monkeypatch):
    hub.add("org/over", files(adapter(tmp_path / "over", "org/base")))
    run_merge(
        MergeConfig(
            models=("org/base+org/over", "org/b"), base="org/base", out=str(tmp_path / "both")
        )
    )
    push_folder(tmp_path / "both", "org/both")
    card = hub.repos["org/both"].files()["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    out = RUN.invoke(app, printed(card, "take org/base+org/over out again"))
    assert out.exit_code == 0, out.output
    without, b = tiny.read(tmp_path / "without"), tiny.read(tmp_path / "b")
    for name in b:
        numpy.testing.assert_allclose(without[name], b[name], atol=1e-5, err_msg=name)


def test_no_undo_is_printed_where_its_precision_was_left_out(hub, merged):
    assert "-o without" in model_card(merged)
    assert "-o without" not in model_card(merged, posterior=False)
    for form, is_printed in (("row", False), ("row-column", False), ("entries", True)):
        assert ("-o without" in model_card(merged, posterior_form=form)) == is_printed


def test_a_card_is_a_function_of_the_folder(hub, merged, tmp_path):
    first = model_card(merged, repo="org/ab")
    time.sleep(0.01)
    elsewhere = tmp_path / "x" / merged.name
    shutil.copytree(merged, elsewhere)
    assert model_card(elsewhere, repo="org/ab") == first
    assert str(tmp_path) not in first


def test_a_card_of_a_card_is_that_card(hub, merged):
    licenses = {p: {"license": "mit"} for p in parents(merged)}
    first = model_card(merged, repo="org/ab", licenses=licenses)
    assert model_card(merged, repo="org/ab", licenses=licenses, existing=first) == first
    assert front(first)["license"] == "mit"


def test_a_persons_text_and_front_matter_stay_and_only_our_section_changes(hub, merged):
    person = "---\nlanguage: de\ntags:\n- mine\n---\n# Meins\n\nVon Hand.\n"
    first = model_card(merged, existing=person)
    assert "# Meins\n\nVon Hand.\n\n<!-- bmerge: begin" in first
    assert front(first)["tags"] == ["mine"]
    assert front(first)["language"] == "de"
    assert front(first)["base_model_relation"] == "merge"
    changed = (
        first.replace("Von Hand.", "Von Hand, geändert.").replace(
            "by `gradient_matching`", "by magic"
        )
        + "\nEnde.\n"
    )
    again = model_card(merged, existing=changed)
    assert "Von Hand, geändert." in again
    assert again.endswith("\nEnde.\n")
    assert "by magic" not in again


@pytest.mark.parametrize(
    "fields",
    [
        {"extra": None, "tags": ["a", "a"], "1": "x", 2: ["y"]},
        {"model-index": "not a list"},
        {"model-index": [{"name": "m", "results": [], "note": "mine"}, {"name": "n"}]},
        {"model_name": "m", "eval_results": "mine"},
    ],
    ids=["empty-and-repeated", "malformed-index", "two-indexes", "names-of-the-client"],
)
def test_fields_of_a_user_stay_that_the_clients_own_card_would_change(hub, merged, fields):
    text = f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n# Mine\n"
    card = model_card(merged, existing=text)
    again = model_card(merged, existing=card)
    assert again == card
    assert list(front(card).items())[: len(fields)] == list(fields.items())
    assert front(card)["base_model_relation"] == "merge"
    with_crlf = model_card(merged, existing=text.replace("\n", "\r\n"))
    assert front(with_crlf) == front(card)


def test_a_value_of_ours_that_a_person_changed_is_theirs(hub, merged):
    changed = model_card(merged).replace("library_name: transformers", "library_name: mlx")
    assert front(model_card(merged, existing=changed))["library_name"] == "mlx"


def test_a_value_of_ours_is_renewed(hub, merged, tmp_path):
    before = model_card(merged)
    (merged / "merge_report.json").unlink()
    (merged / "merge_recipe.yaml").unlink()
    assert "base_model" not in front(model_card(merged, existing=before))


def test_the_licence_is_the_parents_if_they_agree(hub, merged):
    found = parents(merged)
    agreed = make_card(merged, licenses={p: {"license": "mit"} for p in found})
    assert front(agreed.text)["license"] == "mit"
    apart = {p: {"license": "mit" if p.repo == "org/b" else "apache-2.0"} for p in found}
    card = make_card(merged, licenses=apart)
    assert "license" not in front(card.text)
    assert any("disagree" in n and "org/b: mit" in n for n in card.notes)
    unknown = make_card(merged, licenses={found[0]: {"license": "mit"}})
    assert "license" not in front(unknown.text)
    assert any("org/a, org/b" in n for n in unknown.notes)


def test_an_evaluation_of_these_weights_is_in_the_model_index_and_others_are_not(hub, merged):
    posterior = open_posterior(str(merged))
    report = {
        "model_identity": posterior.identity,
        "perplexity": {"gardens": {"token": 2.5}},
        "toxicity": {"words:list.txt": {"share": {"value": 0.05, "low": 0.0, "high": 0.1}}},
    }
    posterior.close()
    (merged / "evaluation").mkdir()
    (merged / "evaluation" / "report.json").write_text(json.dumps(report))
    (index,) = front(model_card(merged, repo="org/ab"))["model-index"]
    values = {m["type"]: m["value"] for result in index["results"] for m in result["metrics"]}
    assert values == {"perplexity": 2.5, "toxicity": 0.05}
    (merged / "evaluation" / "report.json").write_text(
        json.dumps(report | {"model_identity": "0" * 64})
    )
    card = make_card(merged, repo="org/ab")
    assert "model-index" not in front(card.text)
    assert any("other weights" in n for n in card.notes)


def test_a_front_matter_that_is_not_yaml_is_named(hub, merged):
    (merged / "README.md").write_text("---\na: [\n---\nText\n")
    with pytest.raises(ConfigError, match=r"README.md: its front matter is not YAML"):
        model_card(merged)


def test_what_peft_leaves_is_not_taken_for_a_persons_text(tmp_path):
    where = peft_adapter(tmp_path / "a")
    assert "[More Information Needed]" in (where / "README.md").read_text()
    card = model_card(where, repo="org/a")
    assert front(card)["base_model"] == ["org/base"]
    assert front(card)["base_model_relation"] == "adapter"
    assert front(card)["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in card
    assert "Framework versions" not in card


@pytest.mark.parametrize(
    ("blank", "written"),
    [
        ("# Model Card for Model ID", "# My garden adapter"),
        ("- **Developed by:** [More Information Needed]", "- **Developed by:** me"),
        ("## Uses", "## Uses\n\nFor letters to gardeners."),
        ("library_name: peft", "library_name: peft\nlicense: mit"),
    ],
)
def test_one_word_of_a_person_in_pefts_card_keeps_it(tmp_path, blank, written):
    where = peft_adapter(tmp_path / "a")
    text = (where / "README.md").read_text()
    assert blank in text
    (where / "README.md").write_text(text.replace(blank, written, 1))
    assert written.rpartition("\n")[2] in model_card(where, repo="org/a")


@pytest.mark.parametrize("spelling", ["absolute", "relative", "dotted"])
def test_a_card_names_no_folder_of_the_authors_machine(tmp_path, monkeypatch, spelling):
    """Local models have their own names, are said to be local, and nothing is null."""
    monkeypatch.chdir(tmp_path)
    where = {"absolute": f"{tmp_path}/deep/er/", "relative": "deep/er/", "dotted": "./deep/er/"}
    refs = [where[spelling] + name for name in ("base", "a")]
    for seed, ref in enumerate(refs):
        pushing.folder(tmp_path / ref, seed)
    config = MergeConfig(
        models=(refs[1],),
        base=refs[0],
        weights="precision",
        scale=(0.5, f"{refs[1]}:wte=0.25"),
        observations={"BASE": "2x"},
        out=str(tmp_path / "out"),
    )
    run_merge(config)
    card = model_card(tmp_path / "out", repo="org/out")
    assert "deep" not in card
    assert str(tmp_path) not in card
    assert "null" not in card
    assert "{}" not in card
    recipe = yaml.safe_load(card.partition("````yaml\n")[2].partition("````")[0])
    assert (recipe["models"], recipe["base"], recipe["scale"]) == (
        ["a"],
        "base",
        [0.5, "a:wte=0.25"],
    )
    assert recipe["observations"] == {"base": "2x"}
    assert "| `base` (local) | base |" in card
    assert "`base`, `a` are local models of the author" in card


def test_the_command_that_reverses_a_removal_says_that_it_puts_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a")):
        pushing.folder(tmp_path / name, seed)
    frame = {"base": "base", "weights": "precision"}
    run_merge(MergeConfig(models=("a",), scale=(-0.5,), out="out", **frame))
    words = printed(model_card(tmp_path / "out", repo="out"), "put a back")
    run_merge(MergeConfig(models=("out", "a"), scale=(1.0, 0.5), out="again", **frame))
    assert words[words.index("--scale") :][:4] == ["--scale", "1", "--scale", "0.5"]
    base, again = (tiny.read(tmp_path / n / "model.safetensors") for n in ("base", "again"))
    for name, tensor in base.items():
        numpy.testing.assert_allclose(again[name], tensor, rtol=1e-4, atol=1e-5)
