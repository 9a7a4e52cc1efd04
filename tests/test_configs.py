"""Settings files: unknown keys, all errors at once, overrides."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import configs, recipes
from mergekit_bayes.configs import load_config
from mergekit_bayes.detox.settings import DetoxConfig, Rows
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.finetune.settings import FinetuneConfig, LoraSettings
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.records import Config

CONFIGS = (
    DetoxConfig,
    EvaluateConfig,
    FinetuneConfig,
    LoraSettings,
    MergeConfig,
    PrecisionConfig,
    Rows,
)


class Inner(Config):
    rate: float = 0.1


class Outer(Config):
    name: str
    size: int = 1
    inner: Inner = Inner()


def load(tmp_path, text, overrides=()):
    path = Path(tmp_path) / "c.yaml"
    path.write_text(text)
    return load_config(Outer, path, overrides)


def test_overrides_beat_the_file_and_the_file_beats_defaults(tmp_path):
    config = load(tmp_path, "name: x\nsize: 2\n", ["inner.rate=0.5", "size=3"])
    assert (config.name, config.size, config.inner.rate) == ("x", 3, 0.5)


def test_an_unknown_key_offers_the_nearest_known_one(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        load(tmp_path, "name: x\nsiez: 2\n")
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        load(tmp_path, "name: x\ninner:\n  rtae: 2\n")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr: 1", "learning_rate"),
        ("num_train_epochs: 2", "epochs"),
        ("lora: {lora_alpha: 2}", "alpha"),
    ],
)
def test_names_of_transformers_and_peft_are_answered_with_ours(theirs, ours):
    with pytest.raises(ConfigError, match=f"did you mean '{ours}'"):
        configs.parse_config(FinetuneConfig, yaml.safe_load(theirs), "c.yaml")


def test_all_errors_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "size: many\nwhat: 1\n")
    assert all(word in str(caught.value) for word in ("name", "size", "what", "c.yaml"))


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "merge_method: ties\n"])
def test_files_that_are_no_settings_are_explained(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(tmp_path, text)


@pytest.mark.parametrize("name", recipes._MERGEKIT)
def test_a_recipe_of_mergekit_is_answered_with_a_line_that_parses(tmp_path, name):
    recipe = tmp_path / "c.yaml"
    recipe.write_text(f"merge_method: {name}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        recipes.read_recipe(recipe)
    line = re.search(r"`bmerge merge (.*?)`", str(caught.value))[1].split()
    done = CliRunner().invoke(app, ["merge", *line])
    assert done.exit_code == 2
    assert re.match(r"CheckpointError: '(A|BASE)': no such file", done.output)


@pytest.mark.parametrize("override", ["size", "=3", "name.inner=3"])
def test_a_bad_override_is_named(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, "name: x\n", [override])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_says_what_it_does(config):
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name}"
        assert field.description.endswith("."), f"{config.__name__}.{name}"
