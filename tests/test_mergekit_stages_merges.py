"""What is made again, kept, removed and recorded: parts, several documents, the recipe."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.hub import parents
from tests.mergekit_models import folder, merge, models, refused, run, tokens


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(done):
    """What a command told, on one line."""
    return " ".join((done.stderr + done.stdout).split())


def set_config(name, **keys):
    """Change keys of a model's config, and no tensor."""
    file = Path(name) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


STAGES = """
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
merge_method: task_arithmetic
base_model: first
models: [{model: b, parameters: {weight: 0.5}}]
"""
GRADIENT = """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: [0, 1]}}]
"""
SETTING = """
merge_method: slerp
base_model: base
models: [{model: a}]
parameters: {t: [0, 1]}
"""


@pytest.mark.parametrize("text", [GRADIENT, SETTING], ids=["weight", "setting"])
def test_parts_of_merges_with_other_weights_or_settings_are_not_joined(text):
    models("base", "a", base="base", layers=4)
    Path("recipe.yml").write_text(text)
    assert run("recipe.yml", "-o", "out", "--shard", "1/2").exit_code == 0
    for name in ("base", "a"):  # of which gradients depend, and no tensor
        set_config(name, num_hidden_layers=3)
    joined = run("recipe.yml", "-o", "out")
    assert joined.exit_code == 2, said(joined)
    assert "out.partial" in said(joined)
    assert not Path("out").exists()


TOKENS_OF_A_STAGE = """
name: first
merge_method: linear
parameters: {weight: 1}
tokenizer_source: union
models: [{model: a}, {model: b}]
---
merge_method: linear
parameters: {weight: 1}
tokenizer_source: first
models: [{model: a}, {model: c}]
"""


def test_the_tokens_of_a_stage_are_taken_whether_it_is_merged_or_not():
    models("a", "b", "c")
    for name, words in (("a", "abcdefgh"), ("b", "hgfedcba"), ("c", "abcdefgh")):
        tokens(name, words)
    merge(TOKENS_OF_A_STAGE.replace("source: first", "source: union"), out="alone")
    merge(TOKENS_OF_A_STAGE)
    written = json.loads(Path("out/tokenizer.json").read_text())["model"]["vocab"]
    assert written == json.loads(Path("alone/tokenizer.json").read_text())["model"]["vocab"]


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("first@main", "'first@main'"),
        ("a+first@main", "'first@main'"),
        ("a+first", "'refused.stages/first'"),
    ],
)
def test_a_name_without_a_revision_is_a_stage_as_a_model_and_as_an_adapter(model, place):
    models("a", "b")
    message = refused(STAGES.replace("model: b, parameters", f"model: {model}, parameters"))
    assert place in message, message


def stop_after_the_first(*flags):
    """Carry out the first of two documents, whose second one fails for lack of tensors."""
    shutil.move("c/model.safetensors", "c.safetensors")
    stopped = run("recipe.yml", "-o", "out", *flags)
    shutil.move("c.safetensors", "c/model.safetensors")
    assert stopped.exit_code == 2, said(stopped)
    assert Path("out.stages/first/model.safetensors").exists()


def other_flags():
    return ["--dtype", "BF16"]


def other_config():
    set_config("a", rope_theta=5.0)
    return []


def other_layers():
    for name in ("a", "b"):
        set_config(name, num_hidden_layers=2)
    return []


@pytest.mark.parametrize("change", [other_flags, other_config, other_layers])
def test_a_stage_is_made_again_with_other_flags_or_configs(change):
    models("a", "b", "c")
    text = STAGES.replace("model: b, p", "model: c, p").replace("{weight: 1}", "{weight: [1, 3]}")
    Path("recipe.yml").write_text(text)
    stop_after_the_first()
    flags = change()
    done = run("recipe.yml", "-o", "out", *flags)
    assert done.exit_code == 0, said(done)
    assert "is there already" not in said(done)
    assert not Path("out.stages").exists()
    merge(text, *flags, out="again")
    for file in ("model.safetensors", "config.json"):
        assert (Path("out") / file).read_bytes() == (Path("again") / file).read_bytes(), file


def test_what_no_merge_wrote_is_kept_whatever_lies_in_the_folder_of_stages():
    models("a", "b", "c")
    Path("recipe.yml").write_text(STAGES.replace("model: b, p", "model: c, p"))
    stop_after_the_first()
    for file in ("mine/notes.txt", "first/thesis.txt"):
        Path("out.stages", file).parent.mkdir(exist_ok=True)
        Path("out.stages", file).write_text("precious")
    refused = run("recipe.yml", "-o", "out", "--dtype", "F16")  # another merge in the same place
    assert refused.exit_code == 2
    assert "'out.stages/first/thesis.txt' is where" in said(refused)
    assert run("recipe.yml", "-o", "out").exit_code == 0
    left = sorted(str(p) for p in Path("out.stages").rglob("*") if p.is_file())
    assert left == ["out.stages/first/thesis.txt", "out.stages/mine/notes.txt"]


@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_a_model_of_somebody_is_not_replaced_by_a_stage(flags):
    models("a", "b", "c")
    shutil.copytree("c", "out.stages/first")
    Path("recipe.yml").write_text(STAGES)
    done = run("recipe.yml", "-o", "out", *flags)
    assert done.exit_code == 2, said(done)
    assert "'out.stages/first' is where" in said(done)
    for file in ("model.safetensors", "config.json"):
        assert Path("out.stages/first", file).read_bytes() == Path("c", file).read_bytes()


@pytest.mark.parametrize("name", ["a.partial", "a.safetensors", "a.plan.json", "..", "a/b", "a+b"])
def test_a_name_that_is_no_folder_of_a_stage_is_refused(name):
    models("a", "b")
    assert "document 1: name: " in refused(STAGES.replace("first", f"'{name}'"))


LATE = [
    (STAGES.replace("task_arithmetic", "task_arithmetics"), [], "did you mean 'task_arithmetic'"),
    (STAGES.replace("{weight: 0.5}", "{}"), [], "document 2: models[0].parameters.weight"),
    (STAGES.replace("base_model: first\n", ""), [], "document 2: base_model: "),
    (STAGES, ["--param", "seed=1"], "draws nothing"),
    (STAGES, ["-o", "a+b/out"], "-o a+b/out: "),
    (STAGES, ["-o", "a"], "'a' exists. Choose another -o"),
    (STAGES, ["-o", "plain", "--force"], "'plain' is a folder without a model in it"),
]


@pytest.mark.parametrize(("text", "flags", "message"), LATE, ids=[case[2] for case in LATE])
def test_what_is_wrong_in_a_later_document_is_told_before_the_first_is_merged(text, flags, message):
    models("a", "b")
    Path("plain").mkdir()
    Path("plain/notes.txt").write_text("precious")
    Path("recipe.yml").write_text(text)
    done = run("recipe.yml", "-o", "out", *flags)
    assert done.exit_code == 2, said(done)
    assert message in said(done)
    assert not list(Path().rglob("*.stages"))


def test_a_seed_is_that_of_the_documents_that_draw():
    models("a", "b")
    text = STAGES.replace("task_arithmetic", "dare_linear").replace("0.5}", "0.5, density: 0.5}")
    first, again, other = (
        merge(text, "--param", f"seed={seed}", out=f"out{i}") for i, seed in enumerate((1, 1, 2))
    )
    name = "lm_head.weight"
    assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


BYTES = ("model.safetensors", "config.json", "merge_recipe.yaml")


def command_of(recipe):
    """The command that a recipe names above it, as words."""
    first = Path(recipe).read_text().split("\n")[0]
    assert first.startswith("# bmerge merge THIS")
    return shlex.split(first.partition("THIS")[2].partition(" -o OUT")[0])


def repeats(flags, out="out"):
    """That the recipe of a merge, with the flags that it names, gives the same files."""
    recipe = Path(out, "merge_recipe.yaml")
    assert command_of(recipe) == flags
    done = run(recipe, "-o", "repeated", *flags)
    assert done.exit_code == 0, said(done)
    written = sorted(p.name for p in Path(out).iterdir() if p.name != "merge_report.json")
    for file in written:
        assert Path(out, file).read_bytes() == Path("repeated", file).read_bytes(), file
    return recipe.read_text()


ONE = """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
"""


RULES = ["--on-missing", "base", "--on-bad", "base", "--on-config", "base"]
STORED = ["--vocab", "common", "--max-shard-size", "1kB", "--dtype", "F8_E4M3"]


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ([], []),
        (["--dtype", "BF16", "--verify"], []),  # which the recipe says, and which changes nothing
        (RULES, RULES),
        (STORED, STORED),
        (["--side-files", "b"], ["--side-files", "b"]),
    ],
    ids=["none", "dtype", "rules", "stored", "side files"],
)
@pytest.mark.parametrize("text", [ONE, STAGES], ids=["one", "stages"])
def test_the_recipe_that_is_written_repeats_the_bytes_with_the_flags_that_it_names(
    text, given, recorded
):
    found = models("base", "a", "b", base="base")
    Path("b/generation_config.json").write_text('{"top_k": 3}')
    if given == RULES:
        text = text.replace("merge_method: linear", "merge_method: ties\nbase_model: base")
        found["b"].pop("model.layers.1.input_layernorm.weight")
        Path("b/model.safetensors").unlink()
        folder("b", 2, tensors=found["b"])
    merge(text, *given)
    written = repeats(recorded)
    documents = list(yaml.safe_load_all(written))
    assert [d.get("name") for d in documents] == ["first", None][-text.count("merge_method") :]
    assert "out.stages" not in written
    dtypes = {d.get("out_dtype") for d in documents}
    assert dtypes == ({"bfloat16"} if "BF16" in given else {None})


def test_the_recipe_that_is_written_tells_the_content_of_the_models():
    models("a", "b")
    merge(STAGES)
    told = json.loads(Path("out/merge_report.json").read_text())["models"]
    hashes = {model["ref"]: model["identity"] for model in told}
    lines = Path("out/merge_recipe.yaml").read_text().splitlines()
    assert f"# b: {hashes['b']}" in lines
    assert [line.split(":")[0] for line in lines if line.startswith("# ")][3:] == [
        "# a",
        "# b",
        "# b",
    ]


def card_of(out):
    """The card that a push would write, and what is told besides."""
    done = CliRunner().invoke(app, ["push", out, "org/out", "--dry-run"])
    assert done.exit_code == 0, said(done)
    return done.stdout + done.stderr


def test_the_card_shows_all_documents_and_the_command_that_repeats_the_bytes():
    models("a", "b")
    merge(STAGES, "--max-shard-size", "1kB")
    card = card_of("out")
    assert "name: first" in card
    assert "base_model: first" in card
    assert "bmerge merge merge_recipe.yaml --max-shard-size 1kB -o again" in card


def test_the_card_takes_no_command_from_a_recipe_of_somebody():
    models("a", "b")
    merge(STAGES)
    recipe = Path("out/merge_recipe.yaml")
    lines = recipe.read_text().split("\n")
    lines[0] = (
        "# bmerge merge THIS --x;y 'b; rm c' --on-bad '$(rm d)' -o OUT gives the same bytes again"
    )
    recipe.write_text("\n".join(lines))
    assert "merge_recipe.yaml --on-bad '$(rm d)' -o again" in card_of("out")


def test_report_and_card_tell_the_models_of_earlier_documents(tmp_path):
    models("a", "b", "c")
    for name in "abc":
        Path(name, "README.md").write_text("---\nlicense: mit\n---\n")
    second = STAGES.replace("base_model: first", "name: second\nbase_model: first")
    third = (
        "merge_method: linear\nparameters: {weight: [1, 2]}\nmodels: [{model: second}, {model: c}]"
    )
    out = tmp_path / "out"
    merge(f"{second}---\n{third}", out=str(out))
    told = json.loads((out / "merge_report.json").read_text())
    stages = {Path(ref).name: [m["ref"] for m in ms] for ref, ms in told["stages"].items()}
    assert stages == {"first": ["a", "b"], "second": [f"{out}.stages/first", "b"]}
    names = {(p.role, p.name) for p in parents(out)}
    first = {("task of first", "a"), ("task of first", "b")}
    assert names == first | {("task of second", "b"), ("task", "c")}
    card = card_of(str(out))
    assert "license: mit" in card
    text = card[card.index("---") : card.index("end -->")]
    assert "weight of 'second' differs between tensors" in text
    assert str(tmp_path) not in text
    Path("a/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert "the parents disagree" in card_of(str(out))


@pytest.mark.parametrize("flags", [[], ["--dtype", "BF16"]], ids=["same", "other"])
def test_a_stage_goes_on_after_a_kill_before_its_files_were_recorded(flags):
    models("a", "b", "c")
    Path("recipe.yml").write_text(STAGES.replace("model: b, p", "model: c, p"))
    stop_after_the_first()
    record = Path("out.stages/first.plan.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": None}))
    done = run("recipe.yml", "-o", "out", *flags)
    assert done.exit_code == 0, said(done)
    assert ("is there already" in said(done)) == (flags == [])
    assert not Path("out.stages").exists()


def test_a_stage_that_lost_a_file_is_made_again():
    models("a", "b", "c")
    Path("recipe.yml").write_text(STAGES.replace("model: b, p", "model: c, p"))
    stop_after_the_first()
    Path("out.stages/first/config.json").unlink()
    done = run("recipe.yml", "-o", "out")
    assert done.exit_code == 0, said(done)
    assert "is there already" not in said(done)
    assert Path("out/config.json").exists()
