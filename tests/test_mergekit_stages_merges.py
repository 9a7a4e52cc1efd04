"""What is made again, kept, removed and recorded: parts, several documents, the recipe."""

import json
from pathlib import Path

import pytest

from tests.mergekit_models import models, run


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
