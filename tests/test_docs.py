"""The README and the settings files say what is true."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from bmerge_cli.main import app
from mergekit_bayes.configs import load_config
from mergekit_bayes.detox.settings import DetoxConfig
from mergekit_bayes.finetune import FinetuneConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
KINDS = {"detox": DetoxConfig, "finetune": FinetuneConfig}


def commands():
    return get_command(app).commands


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_settings_file_loads(path):
    load_config(KINDS[path.parent.name], path)


def test_every_command_is_in_the_readme():
    for name in commands():
        assert f"bmerge {name}" in README, name


def test_every_flag_that_the_documents_name_exists():
    texts = [README, *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
    known = {
        option
        for command in commands().values()
        for p in command.params
        for option in p.opts + p.secondary_opts
    }
    known |= {"--slow", "--version", "--help"}
    for text in texts:
        for line in re.findall(r"bmerge [a-z]+ .*", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line):
                assert flag in known, f"{flag} in: {line}"


def test_every_option_says_what_it_does():
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            if parameter.name not in ("install_completion", "show_completion", "help"):
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_the_files_that_the_readme_names_exist():
    for path in re.findall(
        r"\((docs/[\w./-]+)\)|`((?:docs|tests|configs|scripts|mergekit_bayes)/[\w./-]+)`", README
    ):
        name = path[0] or path[1]
        assert (ROOT / name).exists(), name


def test_the_house_in_the_readme_is_the_house():
    listed = set(re.findall(r"^[0-9 ]  (\w+)(?:/|\.py)", README, re.M)) - {"cli"}
    listed |= {"gaussian", "errors"}
    rooms = {
        p.stem if p.is_file() else p.name
        for p in (ROOT / "mergekit_bayes").iterdir()
        if p.name[0] != "_" and (p.is_dir() or p.suffix == ".py")
    }
    assert listed == rooms
