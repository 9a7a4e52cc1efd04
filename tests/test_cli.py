"""The command line: start-up cost, exit codes, and one clear message for each error that the user
can correct.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bmerge_cli.main import app
from bmerge_cli.render import Screen, steps_bar
from tests import tiny


def bmerge(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i), tiny.precisions(i))


def test_a_step_may_be_named_like_markup():
    screen = Screen()
    screen.rich = Console(file=io.StringIO(), force_terminal=True, width=100)
    with steps_bar(screen) as advance:
        advance("perplexity of [red]a[/x]", 1, 2)
    assert "perplexity of [red]a[/x]" in screen.rich.file.getvalue()


def test_help_is_quick_and_loads_nothing_heavy():
    """CPU seconds of a whole process; the best of three, since the machine may be busy."""
    code = (
        "import sys, contextlib\nfrom bmerge_cli.main import app\n"
        "with contextlib.suppress(SystemExit): app(['--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'matplotlib'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    # As users have it: with the bytecode that the first run leaves.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("timeout", [None, "26"])
def test_the_entry_sets_what_libraries_read_and_collects_again_once_all_is_loaded(timeout):
    """Idle threads of OpenBLAS sleep soon, unless the user says otherwise."""
    code = """import atexit, gc, os, sys
sys.argv = ["bmerge", "--version"]
def say():
    assert gc.isenabled() and gc.get_freeze_count()
    print(os.environ["OPENBLAS_THREAD_TIMEOUT"], os.environ["PYDANTIC_DISABLE_PLUGINS"])
atexit.register(say)
from bmerge_cli.entry import main
assert "numpy" not in sys.modules and "pydantic" not in sys.modules
main()"""
    names = ("OPENBLAS_THREAD_TIMEOUT", "PYDANTIC_DISABLE_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if timeout is not None:
        environment[names[0]] = timeout
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == f"{timeout or 20} __all__"


def test_every_command_has_help():
    assert bmerge("--version").stdout.startswith("bmerge ")
    for command in (
        "merge",
        "finetune",
        "adapt",
        "precision",
        "evaluate",
        "inspect",
        "convert",
        "detox",
    ):
        done = bmerge(command, "--help")
        assert done.exit_code == 0
        assert done.stdout.count("--") > 3


def test_the_readmes_merge_line_works_as_written(world):
    done = bmerge(
        "merge", "a.safetensors", "b.safetensors", "--weights", "precision", "-o", "ab.safetensors"
    )
    assert done.exit_code == 0
    assert done.stdout.strip() == "ab.safetensors"
    assert {p.name for p in Path().glob("ab.*")} == {
        "ab.safetensors",
        "ab.posterior",
        "ab.merge_recipe.yaml",
        "ab.merge_report.json",
    }


def test_the_module_runs_like_the_console_script(world):
    line = [
        sys.executable,
        "-m",
        "bmerge_cli.main",
        "merge",
        "a.safetensors",
        "b.safetensors",
        "-q",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("merged.safetensors").exists()


def test_json_is_one_document_on_stdout(world):
    done = bmerge(
        "merge",
        "a.safetensors",
        "b.safetensors",
        "--base",
        "base.safetensors",
        "--weights",
        "precision",
        "--scale",
        "1",
        "--scale",
        "-0.5",
        "--json",
    )
    report = json.loads(done.stdout)
    assert report["method"] == "gradient_matching"
    assert [m["scale"] for m in report["models"]] == [None, 1.0, -0.5]
    assert "guard 0.2 acted on" in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(world):
    before = set(Path().iterdir())
    done = bmerge(
        "merge", "a.safetensors", "b.safetensors", "--weights", "precision", "--dry-run", "--json"
    )
    assert json.loads(done.stdout)["method"] == "precision_average"
    assert "4 tensors merged" in done.stderr
    assert set(Path().iterdir()) == before


def truncated():
    data = Path("a.safetensors").read_bytes()
    Path("a.safetensors").write_bytes(data[: len(data) // 2])


def lying_offsets():
    text = json.dumps(
        {"wte.weight": {"dtype": "F32", "shape": [7, 4], "data_offsets": [0, 100]}}
    ).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 112)


def other_shape():
    shapes = dict(tiny.SHAPES, **{"wte.weight": (8, 4)})
    Path("a.safetensors").unlink()
    Path("a.posterior").unlink()
    tiny.posterior("a.safetensors", tiny.arrays(1, shapes), tiny.precisions(1, shapes))


def no_precision():
    Path("a.posterior").unlink()


def other_weights():
    Path("a.safetensors").unlink()
    tiny.write("a.safetensors", tiny.arrays(7))


def not_a_number_in_the_mean():
    mean = tiny.arrays(1)
    mean["h.0.attn.weight"][1, 2] = np.nan
    for file in ("a.safetensors", "a.posterior"):
        Path(file).unlink()
    tiny.posterior("a.safetensors", mean, tiny.precisions(1))


def not_a_number_in_the_precision():
    from mergekit_bayes.posterior import open_posterior

    info = open_posterior("a.safetensors").info
    precision = tiny.precisions(1)
    precision["h.0.attn.weight"][1, 2] = np.nan
    Path("a.posterior").unlink()
    tiny.write("a.posterior", precision, metadata=info.to_metadata())


def nothing():
    pass


def existing_output():
    Path("out.safetensors").write_text("mine")


MERGE = (
    "merge",
    "a.safetensors",
    "b.safetensors",
    "--weights",
    "precision",
    "-o",
    "out.safetensors",
)


@pytest.mark.parametrize(
    ("spoil", "extra", "words"),
    [
        (truncated, (), ("a.safetensors", "truncated")),
        (lying_offsets, (), ("a.safetensors", "wte.weight", "112", "100")),
        (other_shape, (), ("wte.weight", "[8, 4]", "[7, 4]", "b.safetensors")),
        (
            no_precision,
            (),
            ("a.safetensors", "a.posterior", "bmerge precision", "--isotropic"),
        ),
        (other_weights, (), ("a.safetensors", "other weights")),
        (not_a_number_in_the_mean, (), ("a.safetensors", "h.0.attn.weight", "nan", "index 7")),
        (
            not_a_number_in_the_precision,
            (),
            ("a.posterior", "h.0.attn.weight", "nan", "index 7"),
        ),
        (nothing, ("--scale", "many"), ("--scale", "many")),
        (nothing, ("0.5",), ("0.5", "--scale 1 --scale 0.5")),
        (nothing, ("--scale", "nan"), ("--scale", "finite")),
        (
            nothing,
            ("--isotropic", "a.safetensors=1", "--precision", "a.safetensors=b.safetensors"),
            ("both",),
        ),
        (nothing, ("--scale", "-1"), ("--base",)),
        (nothing, ("--scale", "1", "--scale", "1", "--scale", "1"), ("3 given for 2 models",)),
        (nothing, ("--weights", "precise"), ("weights", "'uniform' or 'precision'")),
        (nothing, ("--shrink", "lots"), ("--shrink", "lots")),
        (nothing, ("--isotropic", "a.safetensors"), ("--isotropic", "MODEL=VALUE")),
        (nothing, ("--isotropic", "c=1"), ("no such model",)),
        (nothing, ("--observations", "a.safetensors=x"), ("--observations", "3x")),
        (nothing, ("--anchor", "sea", "--base", "base.safetensors"), ("--anchor", "sea", "h0")),
        (nothing, ("--guard", "0"), ("guard",)),
        (
            nothing,
            ("--weights", "uniform", "--counts", "recorded"),
            ("--counts", "--weights precision"),
        ),
        (nothing, ("--base", "org/nowhere"), ("org/nowhere",)),
        (existing_output, (), ("out.safetensors", "--force")),
    ],
)
def test_bad_input_gets_one_message_and_leaves_nothing_behind(
    world, monkeypatch, spoil, extra, words
):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spoil()
    before = {p.name: p.read_bytes() for p in Path().iterdir()}
    done = bmerge(*MERGE, *extra)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert {p.name: p.read_bytes() for p in Path().iterdir()} == before


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_full_disk_gets_one_message_and_leaves_nothing_behind(world, out):
    """A limit on file size stands for the full disk: the write is refused in the same way."""
    before = {p.name for p in Path().iterdir()}
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        f"import sys; sys.argv = ['bmerge', *{MERGE[:-1]!r}, {out!r}]\n"
        "from bmerge_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "writing failed (File too large)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {p.name for p in Path().iterdir()} == before


def test_a_negative_number_after_a_scale_gets_the_hint(world):
    line = [
        sys.executable,
        "-m",
        "bmerge_cli.main",
        *MERGE[:-2],
        "--base",
        "base.safetensors",
        "--scale",
        "1",
        "-0.5",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--scale 1 --scale -0.5" in done.stderr


def test_brackets_in_names_are_only_text(world):
    Path("[red]").mkdir()
    Path("a.safetensors").rename("[red]/a.safetensors")
    done = bmerge("merge", "[red]/a.safetensors", "b.safetensors", "--dry-run")
    assert done.exit_code == 0
    assert "[red]/a.safetensors" in done.stderr


def test_a_bug_is_a_traceback_and_exit_code_one(world, monkeypatch):
    import mergekit_bayes.plan.plan

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(mergekit_bayes.plan.plan, "match_tensors", broken)
    done = bmerge(*MERGE)
    assert done.exit_code == 1
    assert isinstance(done.exception, ZeroDivisionError)


def test_the_list_of_commands_is_not_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    commands = shown.partition("Commands:")[2].strip().splitlines()
    assert len(commands) == len(app.registered_commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)
