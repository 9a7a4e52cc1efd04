"""A merge that is printed as a recipe of mergekit is the same merge when it is read."""

from pathlib import Path

import pytest
import yaml

from mergekit_bayes.mergekit.document import read_recipes
from mergekit_bayes.methods import METHODS
from tests import tiny
from tests.mergekit_models import close, folder, models, run, shapes_of

NEAR = "--base base"
# What mergekit's way of a method gives as ours does, up to rounding.
SAME = [
    "a b c",
    "a b c --scale 1 --scale 2 --scale 0.5",
    "a b c --scale 2 --scale a:mlp=3 --scale a:layers\\.1\\.=0.25 --scale b:up_proj.weight=0",
    f"a b {NEAR} --scale 0.5 --scale -0.3 --scale b:embed=1",
    f"a b c {NEAR} --method ties --param density=1 --scale 0.4",
    f"a b c {NEAR} --method ties --param scope=tensor --param density=0.5 --scale 0.4",
    f"a b c {NEAR} --method dare_linear --param density=1 --scale 0.7 --scale 0.3 --scale -0.2",
    f"a b c {NEAR} --method dare_ties --param density=1 --scale 0.7",
    f"a b c {NEAR} --method breadcrumbs --param density=0.6 --scale 0.7 --scale 0.3 --scale -0.2",
    f"a b c {NEAR} --method breadcrumbs_ties --param density=0.6 --scale -0.7",
    f"a b c {NEAR} --method breadcrumbs_ties --scale 0.5 --scale 0.5 --scale 0",
    f"a b c {NEAR} --method sce --param select_topk=0.5",
    f"a {NEAR} --method arcee_fusion",
    f"a {NEAR} --method nearswap --param t=0.01",
    f"a b c {NEAR} --method model_stock --param filter_wise=1",
    f"a b c {NEAR} --method multislerp --scale 0.2 --scale 0.5 --scale 0.3",
    "a b c --method multislerp --scale 2 --scale 5 --scale 3 --param normalize_weights=0",
    "a b c --method karcher --param max_iter=20",
    "a b --method slerp --param t=0.3",
    "a b --method nuslerp --scale 0.7 --scale 0.2",
    f"a b {NEAR} --method nuslerp --scale 0.7 --scale 0.2 --param nuslerp_flatten=0",
]
NOT_SAID = [
    ("a b --weights precision", "--weights precision cannot be said"),
    ("a b --only mlp", "--only cannot be said"),
    ("a b --on-missing skip", "--on-missing cannot be said"),
    ("a b --vocab common", "--vocab cannot be said"),
    ("a b --max-shard-size 5GB", "--out-shard-size"),
    ("a b --trajectory", "--trajectory cannot be said"),
    ("a b --dtype f8_e4m3", "--dtype F8_E4M3 cannot be said: it writes float32"),
    ("a b --scale a:m.*p=2", "no regular expressions"),
    ("a b --scale a:layers.[1]=2", "no regular expressions"),
    ("a a", "'./a' is named 2 times"),
    (f"a base {NEAR}", "'./base' is named 2 times"),
    ("a b --method slerp --param scope=model", "--param scope=model cannot be said"),
    (f"a b {NEAR} --method ties", "trims the model as a whole"),
    (f"a b {NEAR} --method dare_ties --scale 1 --scale 2", "Take one --scale for all"),
    (f"a b {NEAR} --method sce --scale 0.5", "models have no weights there"),
    ("a b --method karcher --scale b:mlp=2", "no weight in each tensor"),
    (f"a b {NEAR} --method consensus", "mergekit has no such method. It has average"),
    ("one.safetensors b", "'one.safetensors' is a file"),
    ("a b --dry-run", "Drop --dry-run"),
    ("a b --shard 1/2", "Drop --shard"),
    ("a b --json", "Drop --json"),
    ("recipe.yml", "is a recipe of mergekit already"),
]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base, three models near it, and a file."""
    monkeypatch.chdir(tmp_path)
    models("base", "a", "b", "c", layers=2, base="base")
    tiny.write("one.safetensors", tiny.arrays(0, shapes_of(2)))
    Path("recipe.yml").write_text("merge_method: linear\nmodels: [{model: a}]\n")


def printed(line):
    done = run(*line.split(), "--print-recipe", "mergekit")
    assert done.exit_code == 0, done.stderr
    Path("printed.yml").write_text(done.stdout)
    return done.stdout


@pytest.mark.parametrize("line", SAME)
def test_a_printed_recipe_is_the_same_merge(world, line):
    text = printed(line)
    assert not Path("merged").exists()
    assert run("printed.yml", "-o", "theirs").exit_code == 0
    assert run(*line.split(), "-o", "ours").exit_code == 0
    close(tiny.read("theirs"), tiny.read("ours"))
    remarks = [row for row in text.splitlines() if row.startswith("#")]
    assert all("ours" in row or "our seed" in row for row in remarks)


@pytest.mark.parametrize(("line", "message"), NOT_SAID)
def test_what_mergekit_cannot_say_is_refused_by_name(world, line, message):
    done = run(*line.split(), "--print-recipe", "mergekit")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split()), done.stderr
    assert done.stdout == ""


def test_another_tool_is_refused(world):
    assert "expected mergekit" in run("a", "b", "--print-recipe", "other").stderr


def test_every_method_is_printed_or_refused_by_name(world):
    for name, method in METHODS.items():
        count = method.tasks or 2
        line = [*"abc"[:count], *(["--base", "base"] if method.needs_base else [])]
        if method.needs_precision:
            continue  # which the weights decide
        done = run(*line, "--method", name, "--print-recipe", "mergekit")
        assert (done.exit_code == 0) != ("cannot be said" in done.stderr), (name, done.stderr)


def test_della_has_half_the_range_and_says_what_differs(world):
    text = printed(f"a b {NEAR} --method della --param density=0.6 --param epsilon=0.2 --scale 0.5")
    content = yaml.safe_load(text)
    assert content["parameters"] == {
        "density": 0.6,
        "epsilon": 0.1,
        "normalize": True,
        "lambda": 0.5,
    }
    for remark in ("random numbers", "L1 norm", "half the range"):
        assert remark in text


def test_dtypes_are_those_of_our_arithmetic_and_output(world):
    folder("half", 5, 2, dtype="BF16")
    recipe, content = "half a", yaml.safe_load(printed("half a"))
    assert (content["dtype"], content["out_dtype"]) == ("float32", "bfloat16"), recipe
    assert "out_dtype" not in yaml.safe_load(printed("a b"))
    assert yaml.safe_load(printed("a b --dtype f16"))["out_dtype"] == "float16"
    assert yaml.safe_load(printed("a b --dtype f64"))["dtype"] == "float64"


def test_our_own_recipe_can_be_printed(world):
    assert run("a", "b", "--scale", "0.3", "--scale", "0.7", "-o", "ours").exit_code == 0
    text = printed("ours/merge_recipe.yaml")
    (recipe,) = read_recipes(Path("printed.yml"))
    assert [source.parameters["weight"] for source in recipe.models] == [0.3, 0.7], text
