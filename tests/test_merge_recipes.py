"""A recipe that a merge writes gives the same bytes again."""

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import model_forms, tiny
from tests.model_forms import SHAPES, model

here = model_forms.here
world = model_forms.world


def run(*args):
    return CliRunner().invoke(app, ["merge", *args])


def test_a_recipe_gives_the_same_bytes_again_and_flags_beat_it(world):
    for name in ("base", "a", "b"):
        Path(name).symlink_to(world / f"qwen-{name}")
    flags = [
        "--weights",
        "precision",
        "--scale",
        "0.7",
        "--scale",
        "b:mlp=-0.25",
        "--shrink",
        "row:0.3",
        "--dtype",
        "bf16",
        "--observations",
        "a=3x",
        "--max-shard-size",
        "600",
        "--only",
        "layers|lm_head",
    ]
    assert run("a", "b", "--base", "base", *flags, "-o", "one").exit_code == 0
    done = run("one/merge_recipe.yaml", "-o", "two")
    assert done.exit_code == 0, done.stderr
    files = [
        p.relative_to("one")
        for p in Path("one").rglob("*")
        if p.suffix in (".safetensors", ".posterior", ".yaml", ".json")
    ]
    assert len([f for f in files if f.suffix in (".safetensors", ".posterior")]) > 4
    for file in files:
        if file.name != "merge_report.json":
            assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file
    recipe = yaml.safe_load(Path("one/merge_recipe.yaml").read_text())
    assert recipe["scale"] == [0.7, "b:mlp=-0.25"]
    assert "out" not in recipe
    assert (
        run("one/merge_recipe.yaml", "--dtype", "F32", "--scale", "0.2", "-o", "three").exit_code
        == 0
    )
    changed = json.loads(Path("three/merge_report.json").read_text())["settings"]
    assert (changed["dtype"], changed["scale"], changed["shrink"]) == ("F32", [0.2], "row:0.3")


def test_a_recipe_names_its_mistakes():
    model("base", 0)
    model("a", 1)
    Path("r.yaml").write_text(
        "models: [a.safetensors]\nbase: base.safetensors\nwieghts: precision\nscale: [1]\n"
    )
    done = run("r.yaml", "-o", "x.safetensors")
    assert done.exit_code == 2
    assert "r.yaml" in done.stderr
    assert "wieghts: unknown key; did you mean 'weights'?" in done.stderr
    Path("r.yaml").write_text(
        "models: [a.safetensors]\nbase: base.safetensors\nscale: [1, 'a.safetensors:ln=0']\n"
    )
    assert run("r.yaml", "-o", "x.safetensors").exit_code == 0
    both = run("r.yaml", "a.safetensors")
    assert both.exit_code == 2
    assert "names its own models" in both.stderr


def test_a_recipe_pins_hub_ids_and_gives_the_same_bytes(monkeypatch):
    """A Hub cache as huggingface_hub lays it out, read offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for i, name in enumerate(("base", "a")):
        repo = Path("hub") / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        model("model", i)
        folder = repo / "snapshots" / commit
        (folder / "posterior").mkdir(parents=True)
        Path("model.safetensors").rename(folder / "model.safetensors")
        Path("model.posterior").rename(folder / "posterior" / "precision.posterior")
    report = run_merge(
        MergeConfig(
            models=("org/a",),
            base="org/base",
            weights="precision",
            out="one",
            scale=("org/a:attn=0.5",),
            observations={"org/a": "2x"},
        )
    )
    assert [m.commit for m in report.models] == [commit, commit]
    recipe = yaml.safe_load(Path("one/merge_recipe.yaml").read_text())
    assert (recipe["models"], recipe["base"]) == ([f"org/a@{commit}"], f"org/base@{commit}")
    assert recipe["scale"] == [f"org/a@{commit}:attn=0.5"]
    assert recipe["observations"] == {f"org/a@{commit}": "2x"}
    assert run("one/merge_recipe.yaml", "-o", "two").exit_code == 0
    for file in ("model.safetensors", "posterior/precision.posterior", "merge_recipe.yaml"):
        assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file


def test_a_recipe_notices_that_a_precision_changed():
    model("base", 0)
    model("a", 1)
    line = ("a.safetensors", "--base", "base.safetensors", "--weights", "precision")
    assert run(*line, "-o", "x.safetensors").exit_code == 0
    model("a", 1, precision=tiny.precisions(5, SHAPES))
    done = run("x.merge_recipe.yaml", "-o", "y.safetensors")
    assert done.exit_code == 2
    assert "the precision of 'a.safetensors' is not what the recipe was made with" in " ".join(
        done.stderr.split()
    )


def test_a_recipe_in_another_encoding_is_refused():
    Path("r.yaml").write_bytes("models: [ä]".encode("latin-1"))
    done = run("r.yaml")
    assert (done.exit_code, "not UTF-8 from byte" in " ".join(done.stderr.split())) == (2, True)
