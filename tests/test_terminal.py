"""No text from a file, a folder or a server commands the terminal."""

import ast
import io
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress, TextColumn
from rich.text import Text
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bmerge_cli import render
from bmerge_cli.guarded_console import GuardedConsole
from bmerge_cli.main import app
from bmerge_cli.terminal import GuardedStream, guarded_streams
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, printable
from mergekit_bayes.models.quiet import with_bar

# A title, a cleared screen, an answer typed for the user, C1, a bell, backspaces, a line that is
# overwritten, the other direction, half of a surrogate pair.
_ATTACKS = (
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x1b[6n",
    "\x9b2J",
    "\x07\x08\x08",
    "good\rbad",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u2028b",
    "\udcff",
    "\x7f",
)


@pytest.mark.parametrize("attack", _ATTACKS)
def test_nothing_that_a_console_prints_commands_the_terminal(attack):
    file = io.StringIO()
    screen = GuardedConsole(file=file, force_terminal=True, width=200, markup=False, emoji=False)
    screen.print(f"note: {attack}", markup=False)
    screen.print(Text(attack))
    screen.print(render.table([attack, "n"], [[attack, "1"]], title=attack))
    with Progress(TextColumn("{task.description}"), console=screen) as bar:
        bar.update(bar.add_task(attack), completed=1)
    written = file.getvalue()
    assert printable(attack) in written
    for character in set(printable(attack)) ^ set(attack):
        if character not in "\x1b\r\\" and not character.isalnum():
            assert character not in written
    assert attack not in written


def test_markup_and_ordinary_text_are_printed_as_they_are():
    text = "[bold]x[/bold] :smile: \tÄ 中 é 😀 [/]\n"
    assert printable(text) == text
    assert printable("a\r\nb") == "a\r\nb"
    file = io.StringIO()
    screen = render.console()
    screen.rich.file = file
    screen.print(text.strip())
    screen.print(render.table(["[red]a"], [["[/nothing] :smile:"]], title="[b]t"))
    for part in ("[bold]x[/bold] :smile:", "[red]a", "[/nothing] :smile:", "[b]t"):
        assert part in file.getvalue()


@pytest.mark.parametrize("attack", _ATTACKS)
def test_a_message_of_an_error_is_printable(attack, capsys):
    @render.failures()
    def command():
        raise CheckpointError(f"'{attack}' is wrong")

    with pytest.raises(Exception, match="2"):
        command()
    assert printable(attack) in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"guard": "x" * 500_000},
        {"scale": "x" * 500_000},
        {"x" * 500_000: 1},
        dict.fromkeys(map(str, range(1_000))),
        {"models": ["x" * 500_000]},
    ],
)
def test_a_message_is_short_whatever_the_file_says(settings, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"models": ["a", "b"], **settings}))
    done = CliRunner().invoke(app, ["merge", str(recipe), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert len(done.stderr) < 8000


def test_a_bar_of_another_library_may_return_to_its_line():
    stream = io.StringIO()
    guarded = GuardedStream(stream)
    guarded.write("\r 50 %\x1b[A\n")
    guarded.writelines(["\x1b]0;t\x07", "\x1b[2J"])
    assert stream.getvalue() == "\r 50 %\x1b[A\n\\x1b]0;t\\x07\\x1b[2J"
    assert guarded.isatty() is False


def test_streams_are_guarded_and_given_back():
    stdout, stderr = sys.stdout, sys.stderr
    with guarded_streams():
        assert isinstance(sys.stderr, GuardedStream)
        assert not isinstance(sys.stdout, GuardedStream)  # no terminal
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


@pytest.mark.parametrize(("name", "code"), [("[bold red]w", 0), ("\x1b]0;owned\x07\x1b[2Jw", 2)])
def test_a_command_on_a_real_terminal_prints_names_as_escapes(tmp_path, name, code):
    folder = tmp_path / "m\x1b[5m"
    folder.mkdir()
    save_file(
        {f"{name}.{i}.weight": np.ones((2, 2), np.float32) for i in range(2)},
        folder / "model.safetensors",
    )
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "bmerge_cli.main", "inspect", str(folder)]
    done = subprocess.run(command, stdout=follower, stderr=follower, check=False)
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 1 << 16):
            shown += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    finally:
        os.close(leader)
    assert done.returncode == code
    # Rich breaks what is longer than a line, and sets the style of the second one anew.
    shown = shown.replace(b"\x1b[0m\r\n\x1b[1m", b"")
    assert b"m\\x1b[5m" in shown
    assert repr(name)[1:-1].encode() in shown
    for sequence in (b"\x1b]0;", b"\x07", b"\x1b[2J", b"\x1b[5m"):
        assert sequence not in shown


@pytest.mark.parametrize("name", [*_ATTACKS[:-2], "a\nb", "a\tb"])
def test_a_tensor_whose_name_commands_a_terminal_is_refused(tmp_path, name):
    file = tmp_path / "model.safetensors"
    save_file({name: np.ones(1, np.float32)}, file)
    with pytest.raises(CheckpointError, match="holds control characters") as caught:
        SafetensorsSource([file])
    assert printable(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize(
    "show",
    [
        lambda: render.progress_bar(render.console(), "merging"),
        lambda: render.steps_bar(render.console()),
        lambda: _drawn(with_bar(range(2), "curvature", 2)),
    ],
)
def test_a_bar_commands_the_terminal_and_text_beside_it_does_not(show, monkeypatch):
    """The guard lies below rich's proxies, so that it must not take the bar's codes for text."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with guarded_streams(), show():
            print("\x1b]0;owned\x07", file=sys.stderr)
    assert "\x1b[2K" in stream.getvalue()
    assert "\\x1b[2K" not in stream.getvalue()
    assert "\x1b]0;" not in stream.getvalue()


@contextmanager
def _drawn(items):
    for _ in items:
        yield
        break


def test_a_path_that_is_not_utf8_is_refused_by_its_bytes(tmp_path):
    for i, name in enumerate("ab"):
        save_file({"w": np.full((2, 2), i, np.float32)}, tmp_path / f"{name}.safetensors")
    out = os.path.join(os.fsencode(tmp_path), b"caf\xe9.safetensors")
    inputs = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    command = [sys.executable, "-m", "bmerge_cli.main", "merge", *inputs, "-o", out]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"ConfigError: b'")
    assert b"caf\\xe9" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert not os.path.exists(out)


def test_only_one_room_prints():
    """No module prints past the guarded console: `print`, `rich.print`, `sys.stdout.write`."""
    root = Path(__file__).parent.parent
    for file in (*(root / "mergekit_bayes").rglob("*.py"), *(root / "cli").rglob("*.py")):
        if file.name == "quiet.py" or file.parts[-2:] == ("lm_eval_task", "__main__.py"):
            continue  # a bar of rich's with words of our own; our own folder, for a shell
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="print"), keywords=[ast.keyword(arg="file")]):
                    continue  # to stderr, which is guarded
                case ast.Call(func=ast.Name(id="print" | "Console")):
                    pytest.fail(f"{file}:{node.lineno} prints by itself")
                case ast.Attribute(
                    value=ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"),
                    attr="write",
                ):
                    pytest.fail(f"{file}:{node.lineno} writes to a stream by itself")


@pytest.mark.parametrize("during", ["typer", "bmerge_cli.main", "mergekit_bayes.plan"])
def test_an_interrupt_while_the_commands_are_loaded_is_one_line(during):
    """The signal comes from an import hook, so that it hits the same place each time."""
    code = f"""
import os, signal, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == {during!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hook())
sys.argv = ["bmerge", "merge", "--help"]
from bmerge_cli.entry import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr == b"stopped; nothing was written\n"


def test_a_process_in_the_background_goes_on_ignoring_interrupts():
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "os.kill(os.getpid(), signal.SIGINT); sys.argv = ['bmerge', '--version'];"
        "from bmerge_cli.entry import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_cleans_up(tmp_path, number):
    """The signal comes while the output is being written, into a folder beside its final name."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "m.bin")
    code = f"""
import os, sys
from mergekit_bayes.checkpoint.sink import SafetensorsSink
SafetensorsSink.write_bytes = lambda *_: os.kill(os.getpid(), {int(number)})
sys.argv = ["bmerge", "convert", "m.bin", "-o", "out.safetensors"]
from bmerge_cli.entry import main
main()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, b"")
    assert os.listdir(tmp_path) == ["m.bin"]


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_streams_that_the_caller_has_closed_are_opened_on_nothing(closed, tmp_path):
    """Else the output could get the number of stderr, and what libraries say with it."""
    code = (
        "import os, sys; from bmerge_cli.entry import main; sys.argv = ['bmerge', '--version']\n"
        "try: main()\n"
        "except SystemExit as end: open('seen', 'w').write(f'{end.code} {os.open(\".\", 0)}')"
    )
    script = "; ".join(f"exec {number}>&-" for number in closed)
    shell = ["bash", "-c", f'{script}; exec "$0" "$@"', sys.executable, "-c", code]
    subprocess.run(shell, capture_output=True, check=False, cwd=tmp_path)
    status, number = (tmp_path / "seen").read_text().split()
    assert status == "0"
    assert int(number) > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full of Linux")
def test_a_full_device_is_one_message():
    command = [sys.executable, "-m", "bmerge_cli", "methods"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"CheckpointError: standard output: No space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_lines_between_words_and_a_log_gets_them_whole(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "dumb")
    text = " ".join(["curvature"] * 30)
    render.console().print(text)
    lines = stream.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == text
    assert (len(lines) > 1) == is_terminal
