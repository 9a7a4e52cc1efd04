"""The chat template of a recipe: its text, chatml, or the one that most models have."""

import json
from pathlib import Path

import pytest
from jinja2 import Environment

from mergekit_bayes.mergekit.chat_templates import CHATML
from tests.mergekit_models import merge, models, refused, run

LINEAR = """
merge_method: linear
models: [{model: a}, {model: b}, {model: c}]
parameters: {weight: 1}
"""
FILE = Path("out/chat_template.jinja")
SETTINGS = Path("out/tokenizer_config.json")


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three models without templates."""
    monkeypatch.chdir(tmp_path)
    models("a", "b", "c", layers=1)


def give(model, template, *, inline=False):
    if not inline:
        (Path(model) / "chat_template.jinja").write_text(template)
        return
    content = {"tokenizer_class": "X", "chat_template": template}
    (Path(model) / "tokenizer_config.json").write_text(json.dumps(content))
    (Path(model) / "vocab.json").write_text('{"a": 0}')


def template_of(chosen):
    merge(f"{LINEAR}chat_template: {json.dumps(chosen)}\n")
    return FILE.read_text() if FILE.exists() else None


def test_a_text_is_written_and_takes_the_place_of_all_others(three):
    give("a", "{{ a }}", inline=True)
    give("a", "{{ file of a }}")
    (Path("a") / "chat_template.json").write_text('{"chat_template": "{{ old }}"}')
    assert template_of("{{ messages }}\n") == "{{ messages }}\n"
    assert json.loads(SETTINGS.read_text()) == {"tokenizer_class": "X"}
    assert not Path("out/chat_template.json").exists()


def test_without_the_key_all_is_copied(three):
    give("a", "{{ a }}", inline=True)
    merge(LINEAR)
    assert SETTINGS.read_bytes() == Path("a/tokenizer_config.json").read_bytes()
    assert not FILE.exists()


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"a": "{{ 1 }}", "b": "{{ 2 }}", "c": "{{ 2 }}"}, "{{ 2 }}"),
        ({"a": "{{ 1 }}", "b": "{{ 2 }}", "c": "{{ 3 }}"}, "{{ 1 }}"),
        ({"c": "{{ 3 }}"}, "{{ 3 }}"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("inline", [False, True])
def test_auto_is_what_most_have_and_the_first_of_equally_many(three, given, chosen, inline):
    for model, template in given.items():
        give(model, template, inline=inline)
    assert template_of("auto") == chosen


def test_auto_says_whose_it_is_and_nothing_that_is_no_longer_true(three):
    give("c", "{{ 3 }}")
    Path("recipe.yml").write_text(f"{LINEAR}chat_template: auto\n")
    said = run("recipe.yml", "--dry-run").stderr
    assert "that of 'c', which 1 of 3 models has" in " ".join(said.split())
    assert "no chat template" not in said


def test_chatml_writes_turns_between_its_marks(three):
    assert template_of("chatml") == CHATML
    render = Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML).render
    turns = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "yes"}]
    text = "<|im_start|>user\n hi\n<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert render(messages=turns) == text
    assert render(messages=turns, add_generation_prompt=True) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama3", "chat_template"),
        ("alpaca", "expected the text of a template"),
        ("chatlm", "did you mean 'chatml'"),
    ],
)
def test_other_names_are_refused(three, name, words):
    message = refused(f"{LINEAR}chat_template: {name}\n")
    assert "recipe.yml: chat_template" in message
    assert words.lower() in message.lower()


def test_an_output_without_files_beside_it_is_refused(three):
    Path("recipe.yml").write_text(f"{LINEAR}chat_template: chatml\n")
    done = run("recipe.yml", "-o", "one.safetensors")
    assert done.exit_code == 2
    assert "chat_template: expected an output with files" in " ".join(done.stderr.split())
