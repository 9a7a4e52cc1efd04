"""Ctrl-C ends every command with one line that says what is there and how to go on."""

import pytest

from bmerge_cli.main import app
from tests.pushing import RUN

# Where each command's work begins, what is typed, and what the line says.
COMMANDS = {
    "inspect": ("mergekit_bayes.inspect.run.run_inspect", ["m"], "starts again"),
    "merge": ("bmerge_cli.merge.plan_merge", ["a", "b"], "starts again"),
    "mix": ("bmerge_cli.mix.run_mix", ["a", "b", "-o", "o"], "starts again"),
    "extract": (
        "mergekit_bayes.extract.run.run_extract",
        ["m", "--base", "b", "-o", "o"],
        "starts again",
    ),
    "precision": ("mergekit_bayes.precision.run.run_precision", ["m", "--data", "d"], "again"),
    "evaluate": ("mergekit_bayes.compare.run.run_compare", ["m"], "starts again"),
    "convert": ("mergekit_bayes.convert.run_convert", ["m", "-o", "o"], "starts again"),
    "push": ("mergekit_bayes.hub.push_folder", ["m", "org/m"], "same line goes on"),
    "detox": ("bmerge_cli.detox.load_config", ["c.yaml"], "repeats no step"),
    "preview": (
        "mergekit_bayes.preview.asking.refuse_early",
        ["r", "--data", "d", "-o", "o"],
        "again",
    ),
    "finetune": ("bmerge_cli.training.load_config", ["c.yaml"], "--resume"),
    "adapt": ("bmerge_cli.training.load_config", ["c.yaml"], "--resume"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, words, text = COMMANDS[command]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    (tmp_path / "c.yaml").write_text("model: m\n")
    done = RUN.invoke(app, [command, *words])
    assert done.exit_code == 130, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("stopped; ")
    assert text in line


def test_every_command_that_works_for_long_is_here():
    names = {command.name for command in app.registered_commands}
    assert names - {"methods"} == set(COMMANDS)
