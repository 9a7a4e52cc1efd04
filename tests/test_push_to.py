"""Every command that makes a model can push it with --push-to, checked before the work."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import yaml

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.hub import check_login, push_folder
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.pooling import pooled
from tests import hub_double, pushing
from tests.pushing import RUN, files, front

hub = pushing.hub
merged = pushing.merged


def test_a_merge_is_pushed_without_an_output_of_its_own(hub, merged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    out = RUN.invoke(
        app,
        ["merge", "org/a", "org/b", "--weights", "precision", "--push-to", "org/both", "--json"],
    )
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["push"]["changed"] is True
    assert set(tmp_path.iterdir()) == before
    direct = run_merge(
        MergeConfig(models=("org/a", "org/b"), weights="precision", out=str(tmp_path / "direct"))
    )
    there = hub.repos["org/both"].files()
    assert there["model.safetensors"] == files(tmp_path / "direct")["model.safetensors"]
    with open_posterior("org/both") as pushed, open_posterior(str(tmp_path / "direct")) as made:
        for name in made.precision.specs:
            expected = read_tensor(made.precision, name)
            if expected.ndim > 1:
                expected = pooled(made.precision, name, "row")
            numpy.testing.assert_array_equal(read_tensor(pushed.precision, name), expected)
    assert direct.models[0].commit == hub.repos["org/a"].refs["main"]


def test_a_merge_that_cannot_be_pushed_is_not_begun(hub, merged, tmp_path, monkeypatch):
    hub_double.use(hub, monkeypatch, tmp_path / "home", "hf_wrong")
    out = RUN.invoke(
        app,
        [
            "merge",
            str(tmp_path / "a"),
            str(tmp_path / "b"),
            "-o",
            str(tmp_path / "out"),
            "--push-to",
            "org/both",
        ],
    )
    assert out.exit_code == 2
    assert "does not accept your token" in out.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_whose_push_fails_is_kept(hub, merged, tmp_path):
    out = RUN.invoke(
        app, ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--push-to", "else/both"]
    )
    assert out.exit_code == 2
    kept = out.stderr.split("The model is in '")[1].split("'")[0]
    assert os.path.exists(os.path.join(kept, "model.safetensors"))
    shutil.rmtree(os.path.dirname(kept))


@pytest.mark.parametrize(
    ("role", "repo", "message"),
    [
        ("write", "else/both", "you are logged in as 'me', who may not write to 'else'"),
        ("write", "readers/both", "Push to 'me/both'"),
        ("read", "me/both", "your token can only read"),
        ("write", "Me/both", None),
        ("write", "grouped/both", None),
        ("write", "writers/both", None),
        ("fineGrained", "else/both", None),
    ],
)
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


def test_the_whole_way_round(hub, tmp_path):
    """finetune, push, merge by name and push: from_pretrained has the tensors of a local merge."""
    import torch
    import transformers

    from tests.tiny_models import tiny_gpt2

    push_folder(tiny_gpt2(tmp_path / "base"), "org/base")
    for name, words in (("a", "the cat sat on a mat ."), ("b", "a good dog ran , very good .")):
        (tmp_path / f"{name}.txt").write_text(f"{words}\n" * 8)
        settings = {
            "model": "org/base",
            "output": str(tmp_path / name),
            "data": str(tmp_path / f"{name}.txt"),
            "max_steps": 2,
            "batch_size": 4,
            "flush_batches": 2,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        out = RUN.invoke(
            app, ["finetune", str(tmp_path / f"{name}.yaml"), "--push-to", f"org/{name}", "-q"]
        )
        assert out.exit_code == 0, out.output
        card = front(hub.repos[f"org/{name}"].files()["README.md"].decode())
        assert card["base_model"] == ["org/base"]
        assert card["base_model_relation"] == "finetune"
        assert card["pipeline_tag"] == "text-generation"
    line = [
        "merge",
        "org/a",
        "org/b",
        "--base",
        "org/base",
        "--weights",
        "precision",
        "--isotropic",
        "org/base=1",
    ]
    out = RUN.invoke(app, [*line, "--push-to", "org/ab"])
    assert out.exit_code == 0, out.output
    # The Hub has one number a row, which merges as the entries do when they are pooled by row.
    local = [w.replace("org/", f"{tmp_path}/") for w in (*line, "--pool", "row")]
    assert RUN.invoke(app, [*local, "-o", str(tmp_path / "ab")]).exit_code == 0
    there = transformers.AutoModelForCausalLM.from_pretrained("org/ab").state_dict()
    here = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ab").state_dict()
    assert all(torch.equal(there[n], here[n]) for n in here | there)
    assert transformers.AutoTokenizer.from_pretrained("org/ab").vocab_size > 0
    pulled, made = open_posterior("org/ab"), open_posterior(str(tmp_path / "ab"))
    assert pulled.precision_identity == made.precision_identity
    assert pulled.identity == made.identity == pulled.info.mean.blocks
    assert {term.pool for term in pulled.info.terms} == {"row"}
    terms = tuple(term.model_copy(update={"pool": None}) for term in pulled.info.terms)
    assert terms == made.info.terms
    about = front(hub.repos["org/ab"].files()["README.md"].decode())
    assert about["base_model"] == ["org/base", "org/a", "org/b"]


def test_a_fine_tune_on_two_ranks_is_pushed_and_its_report_says_so(hub, tmp_path):
    from tests.tiny_models import tiny_gpt2

    tiny_gpt2(tmp_path / "base")
    (tmp_path / "a.txt").write_text("the cat sat on a mat .\n" * 8)
    settings = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "a"),
        "data": str(tmp_path / "a.txt"),
        "max_steps": 1,
        "batch_size": 2,
        "flush_batches": 1,
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | hub_double.environment(hub, tmp_path / "fresh")
    line = [
        sys.executable,
        "-m",
        "bmerge_cli.main",
        "finetune",
        str(tmp_path / "a.yaml"),
        "--num-processes",
        "2",
        "--push-to",
        "org/a",
        "--json",
        "-q",
    ]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["push"]["commit"] == hub.repos["org/a"].refs["main"]
    assert report["steps"] == 1
    assert len(hub.repos["org/a"].messages) == 2  # one push


def test_detox_pushes_the_candidate_of_least_perplexity_among_those_that_are_little_toxic():
    from bmerge_cli.detox import _chosen
    from mergekit_bayes.detox.report import DetoxReport

    def point(share, perplexity, command):
        interval = SimpleNamespace(value=share)
        token = SimpleNamespace(value=perplexity)
        return SimpleNamespace(
            toxicity={"words:x": SimpleNamespace(share=interval)},
            command=command,
            perplexity={"civil": SimpleNamespace(token=token)},
        )

    curves = {
        "one": (point(0.5, 2.0, "toxic"), point(0.05, 2.6, "dear")),
        "two": (point(0.04, 2.4, "chosen"),),
    }
    matched = [
        SimpleNamespace(axis="words:x", level=level, paid={"one": 1, "two": paid})
        for level, paid in ((0.25, 1), (0.05, 1), (0.01, None))
    ]
    report = DetoxReport.model_construct(
        base=point(0.6, 1.9, None), curves=curves, matched=matched, path="runs/x"
    )
    assert _chosen(report) == "chosen"
    unreached = report.model_copy(update={"matched": matched[2:]})
    with pytest.raises(ConfigError, match=r"runs/x/report.md"):
        _chosen(unreached)


def test_an_adapter_trained_by_name_is_pushed_and_loaded_by_name(hub, tmp_path):
    from peft import AutoPeftModelForCausalLM

    from mergekit_bayes.lora import open_adapter
    from tests.tiny_models import tiny_gpt2

    push_folder(tiny_gpt2(tmp_path / "base"), "org/base")
    (tmp_path / "a.txt").write_text("the cat sat on a mat .\n" * 8)
    settings = {
        "model": "org/base@main",
        "output": str(tmp_path / "a"),
        "data": str(tmp_path / "a.txt"),
        "max_steps": 1,
        "batch_size": 4,
        "flush_batches": 1,
        "lora": {"r": 2},
    }
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
    both = RUN.invoke(
        app, ["merge", "org/base+org/a", "--base", "org/base", "--push-to", "org/dense"]
    )
    assert both.exit_code == 0, both.output
    assert front(hub.repos["org/dense"].files()["README.md"].decode())["base_model"] == [
        "org/base",
        "org/a",
    ]


def test_a_precision_of_somebody_elses_model_names_it_and_is_found_by_name(hub, tmp_path):
    from tests.tiny_models import tiny_gpt2

    for seed, name in enumerate(("a", "b")):
        hub.add(f"other/{name}", files(tiny_gpt2(tmp_path / name, seed)))
        (tmp_path / "texts.txt").write_text("the cat sat on a mat .\n" * 8)
        made = RUN.invoke(
            app,
            [
                "precision",
                f"other/{name}",
                "--data",
                str(tmp_path / "texts.txt"),
                "-o",
                str(tmp_path / f"{name}-posterior"),
                "-q",
            ],
        )
        assert made.exit_code == 0, made.output
        out = RUN.invoke(
            app,
            [
                "push",
                str(tmp_path / f"{name}-posterior"),
                f"org/{name}-posterior",
                "--posterior-only",
            ],
        )
        assert out.exit_code == 0, out.output
    card = hub.repos["org/a-posterior"].files()["README.md"].decode()
    assert front(card)["base_model"] == ["other/a"]
    assert f"other/a/tree/{hub.repos['other/a'].refs['main']}" in card
    assert (
        "bmerge merge other/a OTHER --weights precision --precision other/a=org/a-posterior" in card
    )
    line = ["merge", "other/a", "other/b", "--weights", "precision", "-o", str(tmp_path / "out")]
    names = [f"--precision=other/{n}=org/{n}-posterior" for n in "ab"]
    assert RUN.invoke(app, [*line, *names]).exit_code == 0
    swapped = RUN.invoke(app, [*line, "--force", names[0], "--precision=other/b=org/a-posterior"])
    assert swapped.exit_code == 2
    assert "other weights" in swapped.stderr
