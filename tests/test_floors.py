"""The order of the house: imports go down, and heavy libraries stay where they are used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bmerge_cli.main import COMMANDS
from mergekit_bayes.mix import MixConfig, run_mix
from scripts.floors import (
    circles,
    import_graph,
    list_errors,
    modules,
    parse_floors,
    upward_imports,
)
from tests import tiny

ROOT = Path(__file__).parent.parent
ROOMS = parse_floors(ROOT / "README.md")
EDGES = import_graph(ROOT)
# Families whose members must not know each other: all modules of a room but those that they share.
FAMILIES = {
    "methods": ROOMS["methods"].steps.keys()
    - {"table", "base", "dropping", "election", "histogram", "matrices", "means", "kronecker"}
    - {"tensors", "recipe_table", "sphere", "adding", "sparsifying", "measuring"},
    # The scoring of windows in `perplexity` is shared by `conditional`, and by `quality` with it.
    "metrics": ROOMS["metrics"].steps.keys()
    - {"base", "calibration", "conditional", "paired", "perplexity"},
    # The matrices of inputs are one factor of `kronecker`, and what has none is root-GGN in both.
    "curvature": {"fisher", "fisher_empirical", "fisher_exact", "ivon", "kronecker"},
    "optim": {"ivon", "vogn", "bsam"},
}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "sklearn",
    "huggingface_hub",
}


def test_every_room_and_module_is_in_the_list_of_the_readme():
    assert not list_errors(ROOT, ROOMS)


def test_rooms_import_from_lower_floors_and_modules_from_later_steps():
    assert not upward_imports(EDGES, ROOMS)


def test_no_modules_import_each_other_in_a_circle():
    assert not circles(EDGES)


def test_members_of_a_family_do_not_import_each_other():
    """The list could be made to permit such an import; this names the rooms where it may not."""
    for family, members in FAMILIES.items():
        assert len(members & ROOMS[family].steps.keys()) > 1, family
        for edge in EDGES:
            source, target = edge.source.split("."), edge.target.split(".")
            if len(source) == len(target) == 3 and source[1] == target[1] == family:
                assert not {source[2], target[2]} <= members, edge


def test_the_package_never_imports_the_command_line():
    assert not [e for e in EDGES if e.target.startswith("bmerge_cli") and "bmerge" not in e.source]


def test_every_init_only_hands_names_on():
    """An `__init__` holds no definition, so that each name has one home.

    A module `__getattr__` that imports a name on first use hands it on, too.
    """
    for name, path in modules(ROOT).items():
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            defined = [getattr(node, "name", "")]
            if isinstance(node, ast.Assign):
                defined = [ast.unparse(target) for target in node.targets]
            allowed = {"", "__all__", "__version__", "__getattr__", "_MODULES"}
            assert set(defined) <= allowed, f"{name} defines {defined}"


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_the_commands_and_the_merge_load_no_heavy_library():
    """Commands are loaded one by one, when they are called."""
    commands = (f"bmerge_cli.{name}" for name in COMMANDS)
    light = ", ".join(["bmerge_cli.main", *commands, "mergekit_bayes.merge"])
    loaded = loaded_by(f"import {light}")
    assert loaded >= {"bmerge_cli.merge", "bmerge_cli.detox"}
    assert not HEAVY & loaded
    assert not {f"bmerge_cli.{name}" for name in COMMANDS} & loaded_by("import bmerge_cli.main")


@pytest.mark.parametrize("refused", ["an output that exists", "a mixture"])
def test_a_preview_is_refused_before_a_heavy_library_is_loaded(tmp_path, refused):
    for i, name in enumerate(("base", "a", "b")):
        file = tmp_path / name / "model.safetensors"
        tiny.posterior(file, tiny.arrays(i), tiny.precisions(i))
        tiny.into_folder(file.parent)
    base, a, b, mixed, out = (str(tmp_path / name) for name in ("base", "a", "b", "mixed", "out"))
    run_mix(MixConfig(runs=(a, b), out=mixed))
    recipe = {"models": [mixed], "base": base, "weights": "precision"}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    message = "is a run of a mixture"
    if refused == "an output that exists":
        Path(out).mkdir()
        message = "out' exists"
    words = ["preview", str(tmp_path / "r.yaml"), "--data", "x=x.csv", "-o", out]
    code = f"""import contextlib, io
from bmerge_cli.main import app
said = io.StringIO()
with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
    app({words!r}, standalone_mode=False)
assert {message!r} in said.getvalue(), said.getvalue()"""
    assert not HEAVY & loaded_by(code)


@pytest.mark.parametrize("rest", [["--dry-run"], ["-o", "OUT"]])
def test_a_quiet_merge_of_plain_models_loads_nothing_that_only_others_need(tmp_path, rest):
    """Neither what reads adapters and recipes of mergekit, nor what draws on a terminal.

    YAML is loaded to write the recipe, after the merge.
    """
    refs = []
    for i, name in enumerate(("a", "b", "base")):
        file = tmp_path / name / "model.safetensors"
        tiny.posterior(file, tiny.arrays(i), tiny.precisions(i))
        tiny.into_folder(file.parent)
        refs.append(str(file.parent))
    words = ["merge", *refs[:2], "--base", refs[2], "-q", *rest]
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    loaded = loaded_by(f"from bmerge_cli.main import app\napp({words!r}, standalone_mode=False)")
    of_adapters = ROOMS["lora"].steps.keys() - {"config", "opening", "variants", "writers"}
    unused = {"rich", "numpy.random", "mergekit_bayes.mergekit", "mergekit_bayes.plan.unions"}
    unused |= {f"mergekit_bayes.lora.{name}" for name in of_adapters}
    if "--dry-run" in rest:
        unused.add("yaml")
    assert sorted(loaded & unused) == []


@pytest.mark.parametrize("command", ["help", "merge", "inspect"])
def test_commands_on_local_files_load_no_heavy_library(tmp_path, command):
    a, b = (
        str(tiny.posterior(tmp_path / f"{name}.safetensors", tiny.arrays(i), tiny.precisions(i)))
        for i, name in enumerate("ab")
    )
    words = {
        "help": ["--help"],
        "merge": ["merge", a, b, "--weights", "precision", "-o", str(tmp_path / "ab"), "-q"],
        "inspect": ["inspect", a, b, "-q"],
    }
    run = f"app({words[command]!r}, standalone_mode=False)"
    silent = "contextlib.redirect_stdout(io.StringIO())"
    code = f"import contextlib, io\nfrom bmerge_cli.main import app\nwith {silent}: {run}"
    assert not HEAVY & loaded_by(code)


def test_a_fine_tune_that_only_starts_processes_does_not_load_what_trains(tmp_path):
    settings = tmp_path / "c.yaml"
    settings.write_text("model: m\ndata: t.jsonl\noutput: o\nnum_processes: 2\n")
    code = f"""import sys
from mergekit_bayes import launcher
launcher.launch = lambda command, count: 0
from bmerge_cli.main import app
assert app(['finetune', {str(settings)!r}], standalone_mode=False) == 0
assert 'mergekit_bayes.launcher' in sys.modules
assert 'mergekit_bayes.finetune.run' not in sys.modules"""
    loaded_by(code)
