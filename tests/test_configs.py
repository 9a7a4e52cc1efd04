"""Settings files: unknown keys, all errors at once, overrides."""

import datetime
import json
import re
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import configs, recipes
from mergekit_bayes.adapt.settings import AdaptConfig, Rows, Until
from mergekit_bayes.configs import Config, load_config, parse_config, read_yaml
from mergekit_bayes.detox.settings import DetoxConfig
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.finetune.settings import FinetuneConfig, LoraSettings
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.precision.settings import PrecisionConfig

CONFIGS = (
    AdaptConfig,
    DetoxConfig,
    EvaluateConfig,
    FinetuneConfig,
    LoraSettings,
    MergeConfig,
    PrecisionConfig,
    Rows,
    Until,
)


# What makes a config of each class, so that one setting at a time can be wrong.
GOOD = {
    AdaptConfig: {"model": "m", "output": "o"},
    DetoxConfig: {"base": "b", "output": "o", "toxic": {"data": "d"}, "evaluate": {}},
    EvaluateConfig: {"model": "m"},
    FinetuneConfig: {"model": "m", "output": "o", "data": "d"},
    LoraSettings: {},
    MergeConfig: {"models": ("a", "b")},
    PrecisionConfig: {"model": "m"},
    Rows: {"data": "d"},
    Until: {},
}


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


def test_a_file_of_something_else_is_told_in_few_lines(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({f"hidden_{i}": i for i in range(40)}))
    with pytest.raises(ConfigError) as caught:
        load_config(MergeConfig, file)
    *first, last = str(caught.value).splitlines()
    assert len(first) == 10
    assert sum("unknown key" in line for line in first) >= 9  # and what is required
    assert "more such lines. Is it the right file?" in last


def test_all_errors_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "size: many\nwhat: 1\n")
    assert all(word in str(caught.value) for word in ("name", "size", "what", "c.yaml"))


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "merge_method: ties\n"])
def test_files_that_are_no_settings_are_explained(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(tmp_path, text)


def test_a_recipe_of_mergekit_is_answered_with_the_command_that_carries_it_out(tmp_path):
    recipe = tmp_path / "c.yaml"
    recipe.write_text("merge_method: ties\n")
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        recipes.read_recipe(recipe)
    line = re.search(r"`bmerge merge (.*?)`", str(caught.value))[1].split()
    done = CliRunner().invoke(app, ["merge", *line])
    assert done.exit_code == 2
    assert "c.yaml" in done.output  # the recipe itself is read, and lacks its models
    assert "'models', 'slices' and 'modules'" in " ".join(done.output.split())


@pytest.mark.parametrize("override", ["size", "=3", "name.inner=3"])
def test_a_bad_override_is_named(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, "name: x\n", [override])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_says_what_it_does(config):
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name}"
        assert field.description.endswith("."), f"{config.__name__}.{name}"


class Odd:
    """A value that no setting takes."""


def wrong_values(config):
    """For each setting a value of a wrong type, and one beyond each bound."""
    for name, field in config.model_fields.items():
        yield name, Odd()
        for constraint in field.metadata:
            for bound, step in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
                if (value := getattr(constraint, bound, None)) is not None:
                    beyond = value + step
                    # A large float has no neighbour at a distance of one.
                    yield name, 2 * value if step and beyond == value else beyond


@pytest.mark.parametrize("config", CONFIGS)
def test_a_wrong_value_is_one_readable_line_however_a_config_is_made(config):
    ways = (lambda values: config(**values), config.model_validate)
    checked = 0
    for name, value in wrong_values(config):
        values = GOOD[config] | {name: value}
        for make in ways:
            with pytest.raises(ConfigError) as caught:
                make(values)
            message = str(caught.value)
            shown = "a value of type Odd" if isinstance(value, Odd) else re.escape(str(value))
            found = rf"expected .+, found {shown}( as number 1 of the list)?\."
            line = rf"{config.__name__}: {name}: ({found}|{shown} is not .+)"
            assert re.fullmatch(line, message), message
            assert "pydantic" not in message
            assert "Input should" not in message
        checked += 1
    assert checked >= len(config.model_fields)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_misspelled_or_missing_setting_is_named_however_a_config_is_made(config):
    good = GOOD[config]
    for name in config.model_fields:
        with pytest.raises(ConfigError, match=rf"{name}x: unknown key; did you mean '{name}'\?$"):
            config(**good, **{f"{name}x": 1})
        if name in good:
            with pytest.raises(ConfigError, match=f"^{config.__name__}: {name}: is required"):
                config(**{k: v for k, v in good.items() if k != name})


@pytest.mark.parametrize("config", CONFIGS)
def test_one_value_stands_for_a_list_of_one_and_a_path_for_its_text(config):
    for name, field in config.model_fields.items():
        if get_origin(field.annotation) is tuple:
            values = [v for v in ("task_arithmetic", 0.5, 2) if accepts(config, name, (v,))]
            assert values, name
            for value in values:
                one = config(**GOOD[config] | {name: value})
                assert getattr(one, name) == getattr(
                    config(**GOOD[config] | {name: [value]}), name
                ), name
        if field.annotation is str:
            one = config(**GOOD[config] | {name: Path("a/b")})
            assert getattr(one, name) == "a/b"
    assert FinetuneConfig(model=Path("m"), output="o", data=[Path("a"), "b"]).paths == ("a", "b")
    adapter = LoraSettings(target_modules="all-linear")
    assert adapter.target_modules == "all-linear"  # text has a meaning of its own here


def accepts(config, name, value):
    try:
        config(**GOOD[config] | {name: value})
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("config", [c for c in CONFIGS if {"out", "output"} & set(c.model_fields)])
def test_out_and_output_are_one_setting_of_every_config(tmp_path, config):
    field, other = ("out", "output") if "out" in config.model_fields else ("output", "out")
    good = {k: v for k, v in GOOD[config].items() if k != field}
    assert getattr(config(**good, **{other: "x"}), field) == "x"
    with pytest.raises(ConfigError, match=f"'{field}' and '{other}' are one setting"):
        config(**good, out="x", output="y")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(good)) | {field: "file"}))
    assert getattr(load_config(config, path, [f"{other}=line"]), field) == "line"
    for names in ((field, other), (other, field)):
        path.write_text("".join(f"{name}: x\n" for name in names))
        with pytest.raises(ConfigError, match=f"c.yaml: '{field}' and '{other}' are one setting"):
            load_config(config, path)


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3\n", "c:\n  a: 1\n  a: 1\n", "c: [{a: 1, a: 2}]"]
)
def test_of_two_values_for_one_key_none_wins_in_silence(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: is not YAML \(the key 'a' is there twice"):
        read_yaml(path)
    path.write_text("c: &c {a: 1, b: 2}\nd: {<<: *c, a: 3}\n")  # which a merge key is for
    assert read_yaml(path)["d"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("key", [1, 1.5, True, None, datetime.date(2020, 1, 1)], ids=str)
def test_a_key_that_is_no_text_is_told_wherever_it_is(tmp_path, config, key):
    """YAML makes other keys of `1`, `on` and `null`, and Python takes all of them."""
    inner = [n for n, f in config.model_fields.items() if takes_keys(f.annotation)]
    path = tmp_path / "c.yaml"
    for place in (None, *inner):
        good = json.loads(json.dumps(GOOD[config]))
        given = good | ({key: 2} if place is None else {place: {key: 2}})
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        for make in (
            config.model_validate,
            lambda values: parse_config(config, values, "here"),
            lambda _: load_config(config, path),
        ):
            with pytest.raises(ConfigError) as caught:
                make(given)
            where = "" if place is None else f"{place}: "
            assert f": {where}expected text as a key, found " in str(caught.value)
            assert "in quotes" in str(caught.value)


def takes_keys(annotation):
    allowed = [annotation, *get_args(annotation)]
    return any(
        get_origin(a) is dict or (isinstance(a, type) and issubclass(a, Config)) for a in allowed
    )


def test_a_list_names_the_value_that_is_wrong():
    with pytest.raises(
        ConfigError, match=r"scale: .* found nothing .null. as number 2 of the list"
    ):
        MergeConfig(models=("a", "b"), scale=(1, None))
    with pytest.raises(ConfigError, match="isotropic: expected a number, found 'x' for 'a'"):
        MergeConfig(models=("a", "b"), isotropic={"a": "x"})
    with pytest.raises(ConfigError, match=r"DetoxConfig: toxic\.data: is required"):
        DetoxConfig(**GOOD[DetoxConfig] | {"toxic": {}})


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (EvaluateConfig, {"model": "m"}),
        (FinetuneConfig, {"model": "m", "data": "d", "output": "o"}),
        (PrecisionConfig, {"model": "m", "data": "d"}),
    ],
)
@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "many"])
def test_a_seed_that_no_generator_takes_is_refused_where_it_is_given(config, given, seed):
    with pytest.raises(ConfigError, match="seed"):
        config(**given, seed=seed)
