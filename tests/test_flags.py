"""Flags are made from the fields of a config: names, types, defaults and help are said once."""

from typing import Literal

import pytest
import typer
from pydantic import Field
from typer.main import get_command
from typer.testing import CliRunner

from bmerge_cli import values
from bmerge_cli.flags import argument, flags_of, option
from bmerge_cli.main import app
from bmerge_cli.render import Quiet, failures
from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.compare import CompareConfig
from mergekit_bayes.configs import Config
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.precision.settings import PrecisionConfig

CONFIGS = {
    "merge": MergeConfig,
    "evaluate": CompareConfig,
    "finetune": FinetuneConfig,
    "adapt": AdaptConfig,
    "precision": PrecisionConfig,
}


class Bakery(Config):
    flours: tuple[str, ...] = Field(description="What is mixed.")
    salt: float = Field(2.0, description="Grams.")
    minutes: int | None = Field(None, description="Time in the oven.")
    crust: Literal["soft", "hard"] = Field("hard", description="soft or hard.")
    seeds: dict[str, float] = Field({}, description="SEED=GRAMS.")
    slice_bread: bool = Field(True, description="Slice it.")
    dry_run: bool = Field(False, description="Only say so.")


def bake(*line):
    """What the command receives, and its result."""
    baked = {}
    small = typer.Typer()

    @small.command()
    @failures()
    @flags_of(
        Bakery,
        argument("flours"),
        option("salt"),
        option("minutes", "--time", "-t", low=1),
        option("crust"),
        option("seeds", read=values.numbers),
        option("slice_bread"),
        option("dry_run"),
    )
    def command(settings, quiet: Quiet = False):
        """Bake bread."""
        baked.update(settings, quiet=quiet)

    return baked, CliRunner().invoke(small, [*line], env={"COLUMNS": "200"})


def test_a_command_receives_only_what_its_line_sets():
    baked, done = bake("rye", "wheat")
    assert done.exit_code == 0
    assert baked == {"flours": ("rye", "wheat"), "quiet": False}


def test_each_value_has_the_type_of_its_field():
    line = "rye --salt 3 -t 40 --crust soft --seeds a=1 --seeds b=2 --no-slice-bread --dry-run -q"
    baked, done = bake(*line.split())
    assert done.exit_code == 0
    assert Bakery(**{k: v for k, v in baked.items() if k != "quiet"}) == Bakery(
        flours=("rye",),
        salt=3,
        minutes=40,
        crust="soft",
        seeds={"a": 1, "b": 2},
        slice_bread=False,
        dry_run=True,
    )
    assert baked["quiet"]


def test_a_value_that_equals_the_default_counts_as_given():
    assert bake("rye", "--salt", "2")[0]["salt"] == 2.0


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ((), "flours"),
        (("rye", "--salt", "much"), "--salt"),
        (("rye", "-t", "0"), "--time"),
        (("rye", "--seeds", "a=much"), "--seeds: 'much' is not a number."),
    ],
)
def test_a_bad_line_is_refused_by_the_name_of_its_flag(line, word):
    baked, done = bake(*line)
    assert done.exit_code == 2
    assert word in done.output
    assert not baked


def test_the_help_says_descriptions_and_defaults():
    text = bake("--help")[1].output
    for word in ("Bake bread.", "What is mixed.", "Grams.", "2.0", "-t", "--no-slice-bread"):
        assert word in text


@pytest.mark.parametrize("name", CONFIGS)
def test_the_flags_of_a_command_are_described_by_its_config(name):
    fields = CONFIGS[name].model_fields
    shared = [p for p in get_command(app).commands[name].loaded.params if p.name in fields]
    assert shared
    for parameter in shared:
        assert parameter.help == fields[parameter.name].description, parameter.name
        if not parameter.required and not parameter.multiple:
            assert parameter.default == fields[parameter.name].default, parameter.name


IDENTITIES = {"identities", "precision_identities"}
IDENTITIES |= {f"full_{name}" for name in IDENTITIES}


@pytest.mark.parametrize(("name", "keys"), [("merge", IDENTITIES)])
def test_every_setting_but_those_of_recipes_has_a_flag(name, keys):
    parameters = {p.name for p in get_command(app).commands[name].loaded.params}
    assert CONFIGS[name].model_fields.keys() - parameters == keys


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge a b --guard 3", "--guard: expected a number above 0 and of at most 1, found 3.0."),
        ("merge a b --weights fisher", "--weights: 'fisher' is not 'uniform' or 'precision'."),
        ("merge a b --dtype F33", "--dtype: 'F33' is not "),
        ("evaluate m --top-p 2", "--top-p: expected a number above 0 and of at most 1, found 2.0."),
        ("evaluate m --batch-size 0", "--batch-size: expected a whole number of at least 1"),
        (
            "precision m --data d --prior -1",
            "--prior: expected a number of at least 0 and of at most",
        ),
        ("precision m --data d --task lm", "--task: 'lm' is not "),
    ],
)
def test_a_value_that_the_config_refuses_is_named_by_its_flag(line, message):
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2
    assert message in done.output, done.output
    assert f"bmerge {line.split()[0]}: {message.split(':')[0]}" in done.output
