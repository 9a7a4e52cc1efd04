"""Cards and pushes, with the real client against a hub on the loopback interface."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import sources
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.hub import check_login, make_card, model_card, parents, plan_push, push_folder
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from tests import hub_double, tiny
from tests.test_hub import adapter, files, folder

RUN = CliRunner()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_double.serving() as server:
        hub_double.use(server, monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def merged(hub, tmp_path):
    """org/a minus half of org/b on org/base, in a folder."""
    for seed, name in enumerate(("base", "a", "b")):
        card = b"---\nlicense: apache-2.0\n---\n"
        hub.add(f"org/{name}", files(folder(tmp_path / name, seed)) | {"README.md": card})
    out = tmp_path / "ab"
    run_merge(MergeConfig(models=("org/a", "org/b"), base="org/base", scale=(1.0, -0.5), weights="precision",
                          out=str(out)))  # fmt: skip
    return out


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


# The card


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
    assert f"bmerge merge org/ab {b} --base {base} --weights precision --scale 1 --scale 0.5 -o without" in card
    assert 'open_posterior("org/ab")' in card


def printed(card, end):
    """The words of the command that the card prints with the comment `end`."""
    (line,) = [line for line in card.splitlines() if line.startswith("bmerge") and line.endswith(f"# {end}")]
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
def test_the_printed_commands_take_a_model_out_again_and_merge_further(hub, merged, tmp_path, monkeypatch, settings):
    together = {"base": "org/base", "weights": "precision"} | settings
    run_merge(MergeConfig(models=("org/a", "org/b"), out=str(tmp_path / "both"), **together))
    push_folder(tmp_path / "both", "org/both")
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
    alone = alone | {"base": names["org/base"], "observations": {names[n]: v for n, v in kept.items()},
                     "isotropic": {names[n]: v for n, v in alone.get("isotropic", {}).items()}}  # fmt: skip
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
    run_merge(MergeConfig(models=("org/base+org/over", "org/b"), base="org/base", out=str(tmp_path / "both")))
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
        first.replace("Von Hand.", "Von Hand, geändert.").replace("by `gradient_matching`", "by magic") + "\nEnde.\n"
    )
    again = model_card(merged, existing=changed)
    assert "Von Hand, geändert." in again
    assert again.endswith("\nEnde.\n")
    assert "by magic" not in again


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
    report = {"model_identity": posterior.identity, "perplexity": {"gardens": {"token": 2.5}},
              "toxicity": {"words:list.txt": {"share": {"value": 0.05, "low": 0.0, "high": 0.1}}}}  # fmt: skip
    posterior.close()
    (merged / "evaluation").mkdir()
    (merged / "evaluation" / "report.json").write_text(json.dumps(report))
    (index,) = front(model_card(merged, repo="org/ab"))["model-index"]
    values = {m["type"]: m["value"] for result in index["results"] for m in result["metrics"]}
    assert values == {"perplexity": 2.5, "toxicity": 0.05}
    (merged / "evaluation" / "report.json").write_text(json.dumps(report | {"model_identity": "0" * 64}))
    card = make_card(merged, repo="org/ab")
    assert "model-index" not in front(card.text)
    assert any("other weights" in n for n in card.notes)


def test_a_front_matter_that_is_not_yaml_is_named(hub, merged):
    (merged / "README.md").write_text("---\na: [\n---\nText\n")
    with pytest.raises(ConfigError, match=r"README.md: its front matter is not YAML"):
        model_card(merged)


def peft_adapter(path):
    """An adapter with the README that PEFT itself writes beside it."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import tiny_gpt2

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2(path.parent / "under"))
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return path


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


# The push


def test_a_folder_arrives_whole_in_one_commit(hub, merged):
    report = push_folder(merged, "org/ab")
    repo = hub.repos["org/ab"]
    there = repo.files()
    assert len(repo.messages) == 2  # the repository's own first one
    assert {n: c for n, c in there.items() if n not in ("README.md", ".gitattributes")} == files(merged)
    assert front(there["README.md"].decode())["license"] == "apache-2.0"  # of the parents' cards on the Hub
    assert report.commit == repo.refs["main"]
    assert not (merged / "README.md").exists()


def test_an_unchanged_folder_makes_no_commit(hub, merged):
    first = push_folder(merged, "org/ab")
    asked = len(hub.log)
    again = push_folder(merged, "org/ab")
    assert not again.changed
    assert again.commit == first.commit == hub.repos["org/ab"].refs["main"]
    assert not [r for r in hub.log[asked:] if r.method == "PUT" or "/commit/" in r.path]


def test_a_changed_file_is_sent_alone(hub, merged):
    push_folder(merged, "org/ab")
    (merged / "config.json").write_text('{"model_type": "llama"}')
    assert push_folder(merged, "org/ab").sent == ("config.json",)


def test_private_revision_message_and_pull_request(hub, merged):
    push_folder(merged, "org/ab", private=True, message="first")
    repo = hub.repos["org/ab"]
    assert repo.private
    assert repo.messages[-1] == "first"
    main = repo.refs["main"]
    (merged / "config.json").write_text('{"model_type": "llama"}')
    push_folder(merged, "org/ab", revision="v1")
    assert repo.refs["main"] == main
    assert repo.files("v1")["config.json"] == b'{"model_type": "llama"}'
    report = push_folder(merged, "org/ab", create_pr=True)
    assert report.pull_request == f"{hub.url}/org/ab/discussions/1"
    assert repo.refs["main"] == main
    assert repo.files("refs/pr/1")["config.json"] == b'{"model_type": "llama"}'
    (merged / "config.json").write_text('{"model_type": "gpt2"}')
    assert push_folder(merged, "org/ab", revision="refs/pr/1").sent == ("config.json",)
    assert repo.refs["main"] == main
    assert repo.files("refs/pr/1")["config.json"] == b'{"model_type": "gpt2"}'
    with pytest.raises(ConfigError, match="pull request on main"):
        push_folder(merged, "org/ab", create_pr=True, revision="v1")


def test_private_is_refused_where_the_repository_is_public(hub, merged):
    hub.add("org/ab", {"README.md": b"hello"})
    with pytest.raises(CheckpointError, match="exists and is public"):
        push_folder(merged, "org/ab", private=True)
    assert hub.repos["org/ab"].files() == {"README.md": b"hello"}


def test_an_interrupted_push_leaves_nothing_half_and_is_resumed_by_the_same_line(hub, merged, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.cut_uploads = 1
    with pytest.raises(CheckpointError, match="run the same line again"):
        push_folder(merged, "org/ab")
    assert set(hub.repos["org/ab"].files()) == {".gitattributes"}
    hub.cut_uploads, arrived = None, set(hub.large)
    asked = len(hub.log)
    push_folder(merged, "org/ab")
    sent = {r.path.removeprefix("/lfs/") for r in hub.log[asked:] if r.method == "PUT"}
    assert sent
    assert not sent & arrived
    assert hub.repos["org/ab"].files()["model.safetensors"] == (merged / "model.safetensors").read_bytes()


def test_what_is_not_of_a_model_stays_and_is_named(hub, merged):
    for name in ("secrets.env", "data.jsonl", "old.safetensors", "modeling_x.py", ".hidden"):
        (merged / name).write_text("x")
    (merged / "checkpoint-10").mkdir()
    (merged / "posterior" / "stray.txt").write_text("x")
    report = push_folder(merged, "org/ab")
    assert set(report.left_out) == {"secrets.env", "data.jsonl", "old.safetensors", "modeling_x.py", ".hidden",
                                    "checkpoint-10/", "posterior/stray.txt"}  # fmt: skip
    assert not set(report.left_out) & set(hub.repos["org/ab"].files())


def test_every_kind_of_tokenizer_and_the_pooling_of_sentence_transformers_go_along(hub, merged):
    names = ("tokenizer.model.v3", "spiece.spm", "vocab.bpe", "modules.json")
    for name in names:
        (merged / name).write_text("x")
    (merged / "1_Pooling").mkdir()
    for name in ("config.json", "notes.txt"):
        (merged / "1_Pooling" / name).write_text("{}")
    report = push_folder(merged, "org/ab")
    assert {*names, "1_Pooling/config.json"} <= set(report.sent)
    assert "1_Pooling/notes.txt" in report.left_out


def test_code_that_the_config_names_goes_along(hub, merged):
    (merged / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    (merged / "modeling_x.py").write_text("class Model: ...")
    assert "modeling_x.py" in push_folder(merged, "org/ab").sent


def test_no_posterior_leaves_it_at_home_and_takes_away_one_of_other_weights(hub, merged, tmp_path):
    push_folder(merged, "org/ab")
    push_folder(merged, "org/ab", posterior=False)
    assert "posterior/precision.safetensors" in hub.repos["org/ab"].files()  # of the same weights
    other = folder(tmp_path / "other", seed=5)
    report = push_folder(other, "org/ab", posterior=False)
    precision = {"posterior/precision.safetensors", "posterior/posterior.json"}
    assert set(report.deleted) == precision | {"merge_report.json", "merge_recipe.yaml"}
    assert open_posterior("org/ab").precision is None


def test_stale_shards_are_deleted(hub, merged):
    hub.add(
        "org/ab", {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "mine.txt": b"x"}
    )
    report = push_folder(merged, "org/ab")
    assert set(report.deleted) == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert hub.repos["org/ab"].files()["mine.txt"] == b"x"


def test_what_a_person_laid_beside_a_posterior_stays(hub, merged):
    theirs = {"posterior/README.md": b"mine", "posterior/plot.png": b"p", "model.safetensors.md5": b"m"}
    hub.add("org/ab", theirs | {"posterior/precision-00001-of-00002.safetensors": b"x"})
    report = push_folder(merged, "org/ab")
    assert report.deleted == ("posterior/precision-00001-of-00002.safetensors",)
    assert theirs.items() <= hub.repos["org/ab"].files().items()


def test_records_of_other_weights_are_deleted_and_shown_before_the_commit(hub, merged, tmp_path):
    push_folder(merged, "org/ab")
    other = folder(tmp_path / "other", seed=5)
    out = RUN.invoke(app, ["push", str(other), "org/ab", "--json"])
    assert set(json.loads(out.stdout)["deleted"]) == {"merge_report.json", "merge_recipe.yaml"}
    assert not set(hub.repos["org/ab"].files()) & {"merge_report.json", "merge_recipe.yaml"}
    lines = []
    push_folder(merged, "org/ab")
    hub_messages = hub.repos["org/ab"].messages
    before = len(hub_messages)
    push_folder(other, "org/ab", say=lambda line: lines.append((line.split()[1], len(hub_messages))))
    assert lines == [("merge_recipe.yaml:", before), ("merge_report.json:", before)]
    assert "deletes   merge_report.json" in out.stderr


def test_records_of_the_same_weights_stay(hub, merged):
    push_folder(merged, "org/ab")
    for name in ("merge_report.json", "merge_recipe.yaml"):
        (merged / name).unlink()
    assert push_folder(merged, "org/ab").deleted == ()


@pytest.mark.parametrize("kinds", [("model", "adapter"), ("adapter", "model")])
def test_a_model_and_an_adapter_do_not_replace_each_other(hub, tmp_path, kinds):
    makers = {"model": folder, "adapter": lambda path: adapter(path, "org/base")}
    there, new = (makers[kind](tmp_path / kind) for kind in kinds)
    push_folder(there, "org/x")
    before = hub.repos["org/x"].files()
    for options in ({}, {"create_pr": True}, {"revision": "v1"}):
        with pytest.raises(CheckpointError, match=f"holds an? {kinds[0]} .* Push to another repository"):
            push_folder(new, "org/x", **options)
    assert list(hub.repos["org/x"].refs) == ["main"]
    assert hub.repos["org/x"].files() == before
    hub.repos["org/x"].commit("bare", {}, "emptied")
    assert push_folder(new, "org/x", revision="bare").changed


def test_a_card_that_cannot_be_made_makes_no_repository(hub, merged):
    (merged / "README.md").write_text("---\na: [\n---\nText\n")
    with pytest.raises(ConfigError, match="front matter"):
        push_folder(merged, "org/ab")
    assert "org/ab" not in hub.repos


def test_a_persons_card_on_the_hub_is_kept(hub, merged):
    hub.add("org/ab", {"README.md": b"# Mine\n\nBy hand.\n"})
    push_folder(merged, "org/ab")
    assert hub.repos["org/ab"].files()["README.md"].decode().count("# Mine\n\nBy hand.\n\n<!-- bmerge: begin") == 1


def test_a_persons_card_on_the_hub_is_kept_though_peft_leaves_one_in_the_folder(hub, tmp_path):
    where = peft_adapter(tmp_path / "a")
    hub.add("org/a", {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nBy hand.\n"})
    push_folder(where, "org/a")
    card = hub.repos["org/a"].files()["README.md"].decode()
    assert "# Mine\n\nBy hand.\n\n<!-- bmerge: begin" in card
    assert front(card)["license"] == "mit"
    assert "[More Information Needed]" not in card


@pytest.mark.parametrize("only_posterior", [False, True])
def test_a_precision_that_names_no_weights_is_not_pushed(hub, tmp_path, only_posterior):
    where = folder(tmp_path / "a")
    file = where / "posterior" / "precision.safetensors"
    file.unlink()
    tiny.write(file, tiny.precisions(0))
    with pytest.raises(PrecisionError, match=r"does not say which weights .* --no-posterior"):
        push_folder(where, "org/a", only_posterior=only_posterior)
    assert "org/a" not in hub.repos
    assert push_folder(where, "org/a", posterior=False).changed


def test_a_posterior_of_other_weights_is_not_pushed_even_where_no_sampled_block_differs(hub, tmp_path):
    where = folder(tmp_path / "a", seed=0)
    shutil.copy(folder(tmp_path / "b", seed=1) / "model.safetensors", where / "model.safetensors")
    with pytest.raises(PrecisionError, match="other weights"):
        push_folder(where, "org/a")
    large = tmp_path / "large"
    mean = tiny.arrays(0, {"w": (512, 512)})
    tiny.posterior(large / "model.safetensors", mean, tiny.precisions(0, {"w": (512, 512)}))
    (large / "posterior").mkdir()
    (large / "model.precision.safetensors").rename(large / "posterior" / "precision.safetensors")
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
    push_folder(folder(tmp_path / "a", seed=0), "org/a-posterior", only_posterior=True)
    there = hub.repos["org/a-posterior"].files()
    assert set(there) == {".gitattributes", "README.md", "posterior/precision.safetensors", "posterior/posterior.json"}
    assert "transformers" not in there["README.md"].decode()
    report = run_merge(MergeConfig(models=("other/a", "org/b"), weights="precision",
                                   precision={"other/a": "org/a-posterior"}, out=str(tmp_path / "out")))  # fmt: skip
    direct = run_merge(MergeConfig(models=(str(tmp_path / "a"), str(tmp_path / "b")), weights="precision",
                                   out=str(tmp_path / "direct")))  # fmt: skip
    first, second = tiny.read(report.path), tiny.read(direct.path)
    assert all((first[n] == second[n]).all() for n in second)


def test_a_folder_with_nothing_but_a_precision_is_pushed_as_a_posterior(hub, tmp_path):
    where = folder(tmp_path / "a") / "posterior"
    with pytest.raises(ConfigError, match="--posterior-only"):
        push_folder(where, "org/p")
    push_folder(where, "org/p", only_posterior=True)
    assert "posterior/precision.safetensors" in hub.repos["org/p"].files()


def test_an_adapter_is_pushed_in_pefts_layout_and_merged_by_name(hub, tmp_path):
    for seed in (0, 1):
        push_folder(adapter(tmp_path / f"a{seed}", "org/base", seed), f"org/a{seed}")
    assert {"adapter_config.json", "adapter_model.safetensors", "posterior/precision.safetensors"} <= set(
        hub.repos["org/a0"].files()
    )
    out = RUN.invoke(app, ["merge", "org/a0", "org/a1", "--weights", "precision", "-o", str(tmp_path / "both")])
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path / "both" / "merge_report.json").read_text())["adapters"] == ["org/a0", "org/a1"]
    found = parents(tmp_path / "both")
    assert [(p.repo, p.commit) for p in found] == [(f"org/a{s}", hub.repos[f"org/a{s}"].refs["main"]) for s in (0, 1)]
    assert front(model_card(tmp_path / "both"))["base_model"] == ["org/base", "org/a0", "org/a1"]


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("org/ab", None, "you are not logged in"),
        ("org/ab", "hf_wrong", "does not accept your token"),
        ("else/ab", hub_double.TOKEN, "no right to do this"),
    ],
)
def test_a_refusal_is_one_message_with_the_way_out(hub, merged, monkeypatch, tmp_path, name, token, says):
    hub_double.use(hub, monkeypatch, tmp_path / "home", token)
    with pytest.raises(CheckpointError, match=says):
        push_folder(merged, name)


def test_a_pull_request_to_a_repository_that_is_not_there_is_refused(hub, merged):
    with pytest.raises(CheckpointError, match="no such repository"):
        push_folder(merged, "org/nowhere", create_pr=True)
    assert "org/nowhere" not in hub.repos


@pytest.mark.parametrize("name", ["ab", "org/ab@v1", "org/ab/c", "-x/y"])
def test_a_name_that_is_none_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ConfigError, match="not the name of a repository"):
        push_folder(tmp_path / "missing", name)


# The command


def test_a_dry_run_lists_files_and_card_and_contacts_nobody(hub, merged):
    asked = len(hub.log)
    out = RUN.invoke(app, ["push", str(merged), "org/ab", "--dry-run", "--json"])
    assert out.exit_code == 0, out.output
    document = json.loads(out.stdout)
    assert {f["path"]: f["size"] for f in document["files"]} == {n: len(c) for n, c in files(merged).items()} | {
        "README.md": len(document["card"].encode())
    }
    assert front(document["card"])["base_model_relation"] == "merge"
    assert len(hub.log) == asked
    text = RUN.invoke(app, ["push", str(merged), "org/ab", "--dry-run"])
    assert document["card"] in text.stdout
    assert "model.safetensors" in text.stderr


def test_the_command_prints_the_address_and_one_json_document(hub, merged):
    out = RUN.invoke(app, ["push", str(merged), "org/ab"])
    assert out.stdout.strip() == f"{hub.url}/org/ab"
    assert "pushed to org/ab" in out.stderr
    again = RUN.invoke(app, ["push", str(merged), "org/ab", "--json", "-q"])
    assert json.loads(again.stdout)["changed"] is False
    assert again.stderr == ""


@pytest.mark.parametrize("token", [hub_double.TOKEN, "hf_wrongButSecret", "hf_with\x01control"])
def test_the_token_is_nowhere_in_what_a_process_says_or_writes(hub, merged, tmp_path, token):
    home = tmp_path / "fresh"
    environment = os.environ | hub_double.environment(hub, home, token) | {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "0"}
    done = subprocess.run([sys.executable, "-m", "bmerge_cli.main", "push", str(merged), "org/ab"], env=environment,
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == (0 if token == hub_double.TOKEN else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert token not in done.stdout + done.stderr
    assert token.replace("\x01", "\\x01") not in done.stdout + done.stderr
    for place in (home, merged):
        for path in place.rglob("*") if place.exists() else ():
            assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert all(token.encode() not in c for r in hub.repos.values() for c in r.files().values())


# --push-to


def test_a_merge_is_pushed_without_an_output_of_its_own(hub, merged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    out = RUN.invoke(app, ["merge", "org/a", "org/b", "--weights", "precision", "--push-to", "org/both", "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["push"]["changed"] is True
    assert set(tmp_path.iterdir()) == before
    direct = run_merge(MergeConfig(models=("org/a", "org/b"), weights="precision", out=str(tmp_path / "direct")))
    there = hub.repos["org/both"].files()
    assert there["model.safetensors"] == files(tmp_path / "direct")["model.safetensors"]
    assert there["posterior/precision.safetensors"] == files(tmp_path / "direct")["posterior/precision.safetensors"]
    assert direct.models[0].commit == hub.repos["org/a"].refs["main"]


def test_a_merge_that_cannot_be_pushed_is_not_begun(hub, merged, tmp_path, monkeypatch):
    hub_double.use(hub, monkeypatch, tmp_path / "home", "hf_wrong")
    out = RUN.invoke(app, ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out"),
                           "--push-to", "org/both"])  # fmt: skip
    assert out.exit_code == 2
    assert "does not accept your token" in out.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_whose_push_fails_is_kept(hub, merged, tmp_path):
    out = RUN.invoke(app, ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--push-to", "else/both"])
    assert out.exit_code == 2
    kept = out.stderr.split("The model is in '")[1].split("'")[0]
    assert os.path.exists(os.path.join(kept, "model.safetensors"))
    shutil.rmtree(os.path.dirname(kept))


@pytest.mark.parametrize(("role", "repo", "message"), [
    ("write", "else/both", "you are logged in as 'me', who may not write to 'else'"),
    ("write", "readers/both", "Push to 'me/both'"),
    ("read", "me/both", "your token can only read"),
    ("write", "Me/both", None), ("write", "grouped/both", None), ("write", "writers/both", None),
    ("fineGrained", "else/both", None),
])  # fmt: skip
def test_a_token_that_cannot_push_is_found_before_the_work(hub, role, repo, message):
    hub.auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
    group = {"name": "g", "role": "write"}
    hub.orgs = [
        {"name": "readers", "roleInOrg": "read"},
        {"name": "writers", "roleInOrg": "contributor"},
        {"name": "grouped", "roleInOrg": "read", "resourceGroups": [group]},
    ]
    with pytest.raises(CheckpointError, match=message) if message else contextlib.nullcontext():
        check_login(repo)


def test_a_file_is_not_pushed(hub, merged, tmp_path):
    out = RUN.invoke(app, ["merge", "org/a", "org/b", "-o", "x.safetensors", "--push-to", "org/both"])
    assert out.exit_code == 2
    assert "--push-to pushes a folder" in out.stderr


def test_the_whole_way_round(hub, tmp_path):
    """finetune, push, merge by name and push, and anybody's from_pretrained has the tensors of a merge at home."""
    import torch
    import transformers

    from tests.tiny_models import tiny_gpt2

    push_folder(tiny_gpt2(tmp_path / "base"), "org/base")
    for name, words in (("a", "the cat sat on a mat ."), ("b", "a good dog ran , very good .")):
        (tmp_path / f"{name}.txt").write_text(f"{words}\n" * 8)
        settings = {"model": "org/base", "output": str(tmp_path / name), "data": str(tmp_path / f"{name}.txt"),
                    "max_steps": 2, "batch_size": 4, "flush_batches": 2}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        out = RUN.invoke(app, ["finetune", str(tmp_path / f"{name}.yaml"), "--push-to", f"org/{name}", "-q"])
        assert out.exit_code == 0, out.output
        card = front(hub.repos[f"org/{name}"].files()["README.md"].decode())
        assert card["base_model"] == ["org/base"]
        assert card["base_model_relation"] == "finetune"
        assert card["pipeline_tag"] == "text-generation"
    line = ["merge", "org/a", "org/b", "--base", "org/base", "--weights", "precision", "--isotropic", "org/base=1"]
    out = RUN.invoke(app, [*line, "--push-to", "org/ab"])
    assert out.exit_code == 0, out.output
    local = [w.replace("org/", f"{tmp_path}/") for w in line]
    assert RUN.invoke(app, [*local, "-o", str(tmp_path / "ab")]).exit_code == 0
    there = transformers.AutoModelForCausalLM.from_pretrained("org/ab").state_dict()
    here = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ab").state_dict()
    assert all(torch.equal(there[n], here[n]) for n in here | there)
    assert transformers.AutoTokenizer.from_pretrained("org/ab").vocab_size > 0
    pulled, made = open_posterior("org/ab"), open_posterior(str(tmp_path / "ab"))
    assert pulled.precision_identity == made.precision_identity
    assert pulled.identity == made.identity == pulled.info.mean.blocks
    assert pulled.info.terms == made.info.terms
    about = front(hub.repos["org/ab"].files()["README.md"].decode())
    assert about["base_model"] == ["org/base", "org/a", "org/b"]


def test_a_fine_tune_on_two_ranks_is_pushed_and_its_report_says_so(hub, tmp_path):
    from tests.tiny_models import tiny_gpt2

    tiny_gpt2(tmp_path / "base")
    (tmp_path / "a.txt").write_text("the cat sat on a mat .\n" * 8)
    settings = {"model": str(tmp_path / "base"), "output": str(tmp_path / "a"), "data": str(tmp_path / "a.txt"),
                "max_steps": 1, "batch_size": 2, "flush_batches": 1}  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | hub_double.environment(hub, tmp_path / "fresh")
    line = [sys.executable, "-m", "bmerge_cli.main", "finetune", str(tmp_path / "a.yaml"), "--num-processes", "2",
            "--push-to", "org/a", "--json", "-q"]  # fmt: skip
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["push"]["commit"] == hub.repos["org/a"].refs["main"]
    assert report["steps"] == 1
    assert len(hub.repos["org/a"].messages) == 2  # one push


def test_detox_pushes_the_candidate_of_least_perplexity_among_those_that_are_little_toxic():
    from bmerge_cli.detox import _chosen

    def point(share, perplexity, command):
        interval = SimpleNamespace(value=share)
        token = SimpleNamespace(value=perplexity)
        return SimpleNamespace(toxicity={"words:x": SimpleNamespace(share=interval)}, command=command,
                               perplexity={"civil": SimpleNamespace(token=token)})  # fmt: skip

    curves = {"one": (point(0.5, 2.0, "toxic"), point(0.05, 2.6, "dear")), "two": (point(0.04, 2.4, "chosen"),)}
    matched = [SimpleNamespace(axis="words:x", level=level, paid={"one": 1, "two": paid})
               for level, paid in ((0.25, 1), (0.05, 1), (0.01, None))]  # fmt: skip
    report = SimpleNamespace(base=point(0.6, 1.9, None), curves=curves, matched=matched, path="runs/x")
    assert _chosen(report) == "chosen"
    report.matched = matched[2:]
    with pytest.raises(ConfigError, match=r"runs/x/report.md"):
        _chosen(report)


def test_an_adapter_trained_by_name_is_pushed_and_loaded_by_name(hub, tmp_path):
    from peft import AutoPeftModelForCausalLM

    from mergekit_bayes.lora import open_adapter
    from tests.tiny_models import tiny_gpt2

    push_folder(tiny_gpt2(tmp_path / "base"), "org/base")
    (tmp_path / "a.txt").write_text("the cat sat on a mat .\n" * 8)
    settings = {"model": "org/base@main", "output": str(tmp_path / "a"), "data": str(tmp_path / "a.txt"),
                "max_steps": 1, "batch_size": 4, "flush_batches": 1, "lora": {"r": 2}}  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    out = RUN.invoke(app, ["finetune", str(tmp_path / "a.yaml"), "--push-to", "org/a"])
    assert out.exit_code == 0, out.output
    there = hub.repos["org/a"].files()
    config = json.loads(there["adapter_config.json"])
    commit = hub.repos["org/base"].refs["main"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    about = front(there["README.md"].decode())
    assert (about["base_model"], about["base_model_relation"]) == (["org/base"], "adapter")
    assert "Framework versions" not in there["README.md"].decode()
    model = AutoPeftModelForCausalLM.from_pretrained("org/a")
    assert model.peft_config["default"].r == 2
    found = open_adapter("org/a")
    assert found.posterior.precision is not None
    found.close()
    both = RUN.invoke(app, ["merge", "org/base+org/a", "--base", "org/base", "--push-to", "org/dense"])
    assert both.exit_code == 0, both.output
    assert front(hub.repos["org/dense"].files()["README.md"].decode())["base_model"] == ["org/base", "org/a"]


def test_a_precision_of_somebody_elses_model_names_it_and_is_found_by_name(hub, tmp_path):
    from tests.tiny_models import tiny_gpt2

    for seed, name in enumerate(("a", "b")):
        hub.add(f"other/{name}", files(tiny_gpt2(tmp_path / name, seed)))
        (tmp_path / "texts.txt").write_text("the cat sat on a mat .\n" * 8)
        made = RUN.invoke(app, ["precision", f"other/{name}", "--data", str(tmp_path / "texts.txt"),
                                "-o", str(tmp_path / f"{name}-posterior"), "-q"])  # fmt: skip
        assert made.exit_code == 0, made.output
        out = RUN.invoke(
            app, ["push", str(tmp_path / f"{name}-posterior"), f"org/{name}-posterior", "--posterior-only"]
        )
        assert out.exit_code == 0, out.output
    card = hub.repos["org/a-posterior"].files()["README.md"].decode()
    assert front(card)["base_model"] == ["other/a"]
    assert f"other/a/tree/{hub.repos['other/a'].refs['main']}" in card
    assert "bmerge merge other/a OTHER --weights precision --precision other/a=org/a-posterior" in card
    line = ["merge", "other/a", "other/b", "--weights", "precision", "-o", str(tmp_path / "out")]
    names = [f"--precision=other/{n}=org/{n}-posterior" for n in "ab"]
    assert RUN.invoke(app, [*line, *names]).exit_code == 0
    swapped = RUN.invoke(app, [*line, "--force", names[0], "--precision=other/b=org/a-posterior"])
    assert swapped.exit_code == 2
    assert "other weights" in swapped.stderr


def test_a_quiet_merge_by_name_prints_nothing(hub, merged, tmp_path):
    environment = os.environ | hub_double.environment(hub, tmp_path / "fresh")
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    line = [sys.executable, "-m", "bmerge_cli.main", "merge", "org/a", "org/b", "--push-to", "org/quiet", "-q"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "model.safetensors" in hub.repos["org/quiet"].files()
