"""The README and the settings files say what is true."""

import pydoc
import re
from pathlib import Path

import pytest
from typer.main import get_command

from bmerge_cli.main import app
from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.configs import load_config
from mergekit_bayes.detox import DetoxConfig
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.methods import METHODS
from scripts.changelog import changelog
from scripts.floors import list_errors, parse_floors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {"adapt": AdaptConfig, "detox": DetoxConfig, "finetune": FinetuneConfig}


def commands():
    return {name: c.loaded for name, c in get_command(app).commands.items()}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_settings_file_loads(path):
    load_config(KINDS[path.parent.name], path)


def test_every_command_is_in_the_readme():
    for name in commands():
        assert f"bmerge {name}" in README, name


def test_every_method_is_in_the_readme():
    of_weights = {"average", "task_arithmetic", "precision_average", "gradient_matching"}
    for name in set(METHODS) - of_weights:
        assert f"`{name}`" in README, name


def test_every_flag_that_the_documents_name_exists():
    flags = {
        option
        for command in commands().values()
        for parameter in command.params
        for option in parameter.opts + parameter.secondary_opts
    }
    flags |= {"--slow", "--version", "--help"}
    for path in DOCUMENTS:
        for line in re.findall(r"bmerge [a-z]+ .*", path.read_text().replace("\\\n", " ")):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line):
                assert flag in flags, f"{flag} in: {line}"


def test_every_option_says_what_it_does():
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            if parameter.name not in ("install_completion", "show_completion", "help"):
                assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_files_that_a_document_links_to_exist(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_sections_that_a_document_links_to_exist(path):
    for target, section in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", path.read_text()):
        linked = (path.parent / target) if target else path
        assert section in anchors(linked), f"{target}#{section}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_files_that_a_document_names_exist(path):
    names = re.findall(
        r"(?:`|bash |python )((?:docs|tests|configs|scripts|mergekit_bayes)/[\w./-]+)",
        path.read_text(),
    )
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_names_of_the_library_that_a_document_uses_exist(path):
    text = path.read_text()
    names = set(re.findall(r"\bmergekit_bayes(?:\.\w+)+", text))
    for module, imported in re.findall(r"from (mergekit_bayes[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in names:
        assert pydoc.locate(name) is not None, name


def test_the_house_in_the_readme_is_the_house():
    assert list_errors(ROOT, parse_floors(ROOT / "README.md")) == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index, path.name


def test_the_changelog_is_made_of_the_fragments():
    assert (ROOT / "CHANGELOG.md").read_text() == changelog(ROOT)


def anchors(path: Path) -> set[str]:
    """Sections of a document as links name them: lower case, spaces as hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
