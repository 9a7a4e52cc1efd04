"""`bmerge methods`, and the settings of a method."""

import io
import json

import pytest
from typer.testing import CliRunner

from bmerge_cli import methods
from bmerge_cli.main import app
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods import METHODS, settings_of


def test_the_methods_are_listed_with_all_that_one_must_know():
    text = CliRunner().invoke(app, ["methods"]).stdout
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert [m["name"] for m in listed] == list(METHODS)
    for method in METHODS.values():
        assert f"{method.name}: {method.summary}" in text
        assert method.example in text
        for parameter in method.parameters:
            assert f"--param {parameter.name}=" in text
            assert parameter.meaning in text
    density = next(m for m in listed if m["name"] == "ties")["parameters"][0]
    assert (density["default"], density["low"], density["high"]) == (0.2, 0, 1)


def test_in_a_terminal_all_lines_but_commands_fit(monkeypatch):
    plain = CliRunner().invoke(app, ["methods"]).stdout
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(methods.sys, "stdout", Terminal())
    methods.command(as_json=False)
    text = methods.sys.stdout.getvalue()
    assert all(len(line) <= 60 or "bmerge merge" in line for line in text.splitlines())
    assert text.split() == plain.split()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_example_lines_are_settings_that_the_methods_take():
    for method in METHODS.values():
        words = method.example.split()
        assert ("--base" in words) == method.needs_base
        given = dict(words[i + 1].split("=") for i, word in enumerate(words) if word == "--param")
        assert set(settings_of(method, given)) == {p.name for p in method.parameters}
        if "--method" in words:
            assert words[words.index("--method") + 1] == method.name


def test_settings_are_checked():
    ties = METHODS["ties"]
    assert settings_of(ties, {}) == {"density": 0.2, "scope": "model"}
    assert settings_of(ties, {"density": "0.5", "scope": "tensor"}) == {
        "density": 0.5,
        "scope": "tensor",
    }
    for given, message in (
        ({"densty": 1}, "did you mean 'density'"),
        ({"density": 2}, "from 0 to 1"),
        ({"density": "much"}, "a number"),
        ({"density": float("nan")}, "a number"),
        ({"scope": "row"}, "model or tensor"),
    ):
        with pytest.raises(ConfigError, match=r"(?i)" + message):
            settings_of(ties, given)
    for name, given, message in (
        ("fisher", {"floor": "inf"}, "a number from 0"),
        ("dare_linear", {"seed": 1.5}, "a whole number"),
        ("dare_ties", {"density": 0}, "from 1e-06 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings_of(METHODS[name], given)
    with pytest.raises(ConfigError, match="has none"):
        settings_of(METHODS["average"], {"x": 1})
