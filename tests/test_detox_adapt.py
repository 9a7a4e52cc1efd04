"""Adaptations in a removal: their settings, one run for all looks, and what is said of them."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli import detox as detox_command
from bmerge_cli.main import app
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.configs import load_config, parse_config
from mergekit_bayes.detox import journey as journey_module
from mergekit_bayes.detox.adaptations import adapt_config, passes_of
from mergekit_bayes.detox.analysis import rivals
from mergekit_bayes.detox.costs import Cost, total
from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.markdown import as_markdown
from mergekit_bayes.detox.settings import (
    KINDS,
    DetoxConfig,
    curves,
    finetune_config,
    needs_precision,
)
from mergekit_bayes.errors import CheckpointError, ConfigError
from tests import tiny_models
from tests.detox_worlds import measured

ADAPTATIONS = [method for method, kind in KINDS.items() if kind.unit == "step"]
MEMORY = {"memory": {"data": "m"}, "memory_rows": 9, "memory_held_out": 0.2, "kappa": 3.0}


def config(**given):
    settings = {"base": "base", "output": "o", "toxic": {"data": "t"}, "evaluate": {}, "steps": [5]}
    return parse_config(DetoxConfig, settings | {"methods": ADAPTATIONS} | given, "detox")


def settings_of(removal, method, **given):
    curve = next(c for c in curves(removal) if c.method == method)
    return adapt_config(removal, curve, "out", 7, "elsewhere", **given)


def test_each_adaptation_takes_what_it_is_named_after():
    removal = config(adapt=MEMORY | {"learning_rate": 1e-3, "pool": "row"})
    found = {method: settings_of(removal, method, keep=(5, 7)) for method in ADAPTATIONS}
    for adapt in found.values():
        assert (adapt.model, adapt.output, adapt.max_steps) == ("base", "out", 7)
        assert (adapt.remove.data, adapt.learning_rate, adapt.keep_steps) == ("t", 1e-3, (5, 7))
        assert adapt.posterior == "none"
    with_memory = {m: (a.memory is not None, a.memory_rows, a.kappa) for m, a in found.items()}
    assert with_memory.pop("adapt") == (True, 9, 3.0)
    assert set(with_memory.values()) == {(False, None, None)}
    assert {m: (a.prior, a.pool, a.precision) for m, a in found.items()} == {
        "adapt": ("auto", "row", None),
        "adapt_weights": ("stored", "row", "elsewhere"),
        "adapt_pool": ("stored", "tensor", "elsewhere"),
        "npo": ("none", None, None),
    }
    written = {"memory_self_generated": 9, "memory_filter": "words:w", "threshold": 0.9}
    filtered = config(adapt=written)
    assert settings_of(filtered, "adapt").threshold == 0.9
    assert settings_of(filtered, "npo").memory_filter is None  # nor is the threshold refused
    contrast = {"removal": "contrast", "contrast": {"data": "c"}}
    npo = settings_of(config(adapt=contrast, methods="npo"), "npo")
    assert (npo.removal, npo.contrast) == ("npo", None)


def test_an_adaptation_with_memory_and_weights_needs_the_precision():
    both = config(adapt=MEMORY | {"prior": "stored"}, methods="adapt")
    assert needs_precision(both)
    assert settings_of(both, "adapt").precision == "elsewhere"
    assert not needs_precision(config(adapt=MEMORY, methods=["adapt", "npo"]))
    mixed = config(methods=["adapt_weights", "task_arithmetic"], finetune={"posterior": "none"})
    assert needs_precision(mixed)
    finetune_config(mixed, "toxic")  # whose precision no merge needs


@pytest.mark.parametrize(
    ("given", "named"),
    [
        *(
            ({"adapt": MEMORY | {key: 1}}, f"adapt: {key}: detox sets this itself")
            for key in ("model", "out", "remove", "until", "keep_steps", "max_steps", "posterior")
        ),
        ({"adapt": {}}, "the method adapt needs a memory"),
        ({"adapt": MEMORY | {"learning_rat": 1}}, "learning_rate"),
        ({"adapt": MEMORY | {"removal": "contrast"}}, "adapt: removal: contrast and the matched"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        settings_of(config(**given), "adapt")


def test_adaptations_meet_their_rivals():
    compared = curves(config(methods=list(KINDS), scales=[1], adapt=MEMORY, guard=[0.2, 1]))
    against = {c.method: [r.label for r in rivals(c, compared)] for c in compared}
    assert against["adapt"] == [
        "task arithmetic",
        "gradient matching, guard 0.2",
        "gradient matching, guard 1",
        "NPO",
    ]
    assert against["adapt_weights"] == ["task arithmetic", "adaptation control"]
    assert not against["adapt_pool"]
    assert not against["npo"]


def test_passes_are_those_of_the_model_and_of_its_start():
    def passes(**given):
        adapt = {"model": "m", "output": "o", "remove": {"data": "t"}, "batch_size": 4} | given
        return passes_of(AdaptConfig(**adapt), 10)

    memory = {"memory": {"data": "m"}}
    assert passes() == 10 * 4 * 2  # the removed rows, by the model and by its start
    assert passes(**memory) == 10 * 4 * 4
    assert passes(**memory, teacher="stored") == 10 * 4 * 2
    assert passes(removal="ascent", **memory) == 10 * 4 * 3
    assert passes(gradient_accumulation=3) == 10 * 4 * 2 * 3


def test_a_time_that_is_not_known_leaves_the_sum_unknown():
    one = Cost(seconds=1.5, passes=3)
    assert total([one, one]) == Cost(seconds=3, passes=6)
    assert total([one, None]) is None


class Stage:
    """A removal whose models are a number in a file: where they lie on the path of a world."""

    def __init__(self, folder, monkeypatch):
        tiny_models.tiny_gpt2(folder / "base")
        for name in ("bad", "nice", "prompts", "list"):
            (folder / f"{name}.txt").write_text("bad\n")
        self.folder, self.runs, self.evaluated = folder, [], 0
        self.fails_at = None
        monkeypatch.setattr(journey_module, "run_adapt", self.adapt)
        monkeypatch.setattr(journey_module, "run_evaluate", self.evaluate)
        monkeypatch.setattr(journey_module, "read_report", report_of)
        monkeypatch.setattr(journey_module, "draw", lambda report, path: path.touch())
        monkeypatch.setattr(journey_module, "as_markdown", lambda report: "")

    def adapt(self, settings, *, quiet):
        assert not Path(settings.output).exists() or settings.force
        self.runs.append((settings.max_steps, settings.keep_steps))
        output = Path(settings.output)
        for step in settings.keep_steps:
            write_place(output.with_name(f"{output.name}.steps") / str(step), step / 20)
        write_place(output, settings.max_steps / 20)
        return SimpleNamespace(steps=settings.max_steps)

    def evaluate(self, settings, *, quiet):
        self.evaluated += 1
        if self.evaluated == self.fails_at:
            raise KeyboardInterrupt
        place = Path(settings.model) / "place"
        write_place(Path(settings.output), float(place.read_text()) if place.exists() else 0.0)

    def run(self, **given):
        texts = {name: str(self.folder / f"{name}.txt") for name in ("bad", "nice", "prompts")}
        settings = {
            "base": str(self.folder / "base"),
            "output": str(self.folder / "out"),
            "toxic": {"data": texts["bad"]},
            "adapt": {"memory": {"data": texts["nice"]}, "batch_size": 2},
            "evaluate": {
                "perplexity": {"nice": texts["nice"]},
                "toxicity": texts["prompts"],
                "scorer": [f"words:{self.folder / 'list.txt'}"],
                "new_tokens": 4,
            },
            "methods": "adapt",
            "steps": [10, 20, 40],
            "levels": [0.2],
        }
        return run_detox(DetoxConfig(**settings | given), quiet=True)


def report_of(folder):
    """The evaluation of a model at a place: the further, the less toxic, and the dearer."""
    place = float((folder / "place").read_text())
    return measured([0.6 * 2**-place] * 10, [2 + 0.1 * place] * 10)


def write_place(folder, place):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "place").write_text(str(place))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    return Stage(tmp_path, monkeypatch)


def test_all_looks_are_of_one_run(stage):
    report = stage.run()
    assert stage.runs[0] == (40, (10, 20, 40))
    (points,) = report.curves.values()
    assert [(p.scale, p.unit) for p in points] == [(10, "step"), (20, "step"), (40, "step")]
    assert [p.passes for p in points] == [10 * 2 * 4, 20 * 2 * 4, 40 * 2 * 4]
    assert points[2].seconds == pytest.approx(4 * points[0].seconds)
    assert report.toxic_model is None
    assert report.base_precision is None
    assert [p.toxicity["s"].share.value for p in points] == pytest.approx(
        [0.6 * 2**-0.5, 0.3, 0.15]
    )
    assert not list(stage.folder.glob("out/steps/**/model"))

    kept = report.kept
    assert (kept.curve, kept.unit, kept.path) == ("adaptation", "step", f"{stage.folder}/out/model")
    assert stage.runs[1:] == [(int(kept.scale), ())]  # as many steps as that look had
    words = shlex.split(kept.command)
    assert words[:3] == ["bmerge", "adapt", f"{stage.folder}/out/adapt.yaml"]
    again = load_config(AdaptConfig, Path(words[2]), [w for w in words[3:] if w != "--set"])
    assert (again.max_steps, again.output) == (kept.scale, kept.path)
    assert again.memory.data == str(stage.folder / "nice.txt")
    assert again.posterior == "none"

    text = as_markdown(report)
    assert f"adaptation at step {kept.scale:g}" in text
    assert "if the curves of adaptations are smooth between their steps" in text
    assert "| model | scale or step |" in text
    (row,) = re.findall(r"\| adaptation \| `s` \| 20.0% \| (.*)", text)
    assert re.fullmatch(r"\+0\.1\d\d .* \| step 3\d \| .* \| 320 \|", row)


def test_a_look_is_made_once_and_another_one_alone(stage):
    first = stage.run()
    done, evaluated = len(stage.runs), stage.evaluated
    assert stage.run() == first
    assert (len(stage.runs), stage.evaluated) == (done, evaluated)
    stage.run(steps=[10, 20, 30, 40])
    assert stage.runs[done] == (30, (30,))
    assert stage.evaluated == evaluated + 1
    (stage.folder / "nice.txt").write_text("other\n")
    stage.run(steps=[10, 20])
    assert (20, (10, 20)) in stage.runs[done + 1 :]


def test_a_run_is_not_repeated_for_looks_that_it_has_kept(stage):
    stage.fails_at = 3  # the base and one look are evaluated
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert len(stage.runs) == 1
    report = stage.run()
    assert stage.runs[1:] == [(int(report.kept.scale), ())]
    assert all(p.seconds is not None for p in report.curves["adaptation"])


def test_a_run_that_was_broken_off_is_made_anew(stage, monkeypatch):
    adapt = stage.adapt

    def broken(settings, *, quiet):
        adapt(settings, quiet=quiet)
        shutil.rmtree(Path(settings.output).with_name("model.steps") / "40")
        raise KeyboardInterrupt

    monkeypatch.setattr(journey_module, "run_adapt", broken)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    monkeypatch.setattr(journey_module, "run_adapt", adapt)
    report = stage.run()
    assert len(report.curves["adaptation"]) == 3
    assert any(p.seconds is not None for p in report.curves["adaptation"])


def test_models_of_looks_are_kept_on_demand(stage):
    stage.run(keep_models=True)
    places = sorted(p.read_text() for p in stage.folder.glob("out/steps/*/model/place"))
    assert places == ["0.5", "1.0", "2.0"]
    stage.run()
    assert not list(stage.folder.glob("out/steps/*/model"))
    made = len(stage.runs)
    stage.run(keep_models=True)
    assert stage.runs[made] == (40, (10, 20, 40))


def test_no_steps_and_no_scales_are_refused(stage):
    with pytest.raises(ConfigError, match="steps: adapt needs one or more"):
        stage.run(steps=[])
    with pytest.raises(ConfigError, match="scales: task_arithmetic needs one or more"):
        stage.run(methods=["adapt", "task_arithmetic"])
    assert not (stage.folder / "out").exists()


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("step", ["push", "out/model", "org/m"]),
        ("scale", ["merge", "t", "--scale", "-1", "--push-to", "org/m"]),
    ],
)
def test_an_adaptation_is_pushed_as_it_was_kept(monkeypatch, unit, line):
    started = []

    def run(words, **options):
        started.append(words[3:])
        return SimpleNamespace(returncode=1, stderr="it is full")

    monkeypatch.setattr(detox_command.subprocess, "run", run)
    point = SimpleNamespace(command="bmerge merge t --scale -1")
    report = SimpleNamespace(
        best=lambda: ("a curve", point, 0.1), kept=SimpleNamespace(unit=unit, path="out/model")
    )
    with pytest.raises(CheckpointError, match=f"it is full.*`bmerge {' '.join(line)}`"):
        detox_command._push(report, "org/m")
    assert started == [[*line, "--quiet"]]


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.mark.slow
def test_a_removal_with_all_methods_from_end_to_end(tmp_path, monkeypatch):
    """And the kept look has the bits that were evaluated, as its command makes them."""
    monkeypatch.chdir(tmp_path)
    base = tiny_models.tiny_gpt2(tmp_path / "base")
    nice = [f"the {a} was very {b}" for a in ("cat", "dog", "film") for b in ("nice", "fun")] * 3
    bad = [f"the {a} was not {b}" for a in ("cat", "dog", "film") for b in ("good", "bad")] * 3
    (tmp_path / "list.txt").write_text("bad\ndull\nnot\n")
    (tmp_path / "other.txt").write_text("good\n")
    methods = list(KINDS)
    settings = {
        "base": str(base),
        "output": "out",
        "toxic": {"data": rows(tmp_path / "bad.jsonl", bad)},
        "held_out_toxic": {"data": rows(tmp_path / "bad_test.jsonl", bad[:8])},
        "finetune": {"max_steps": 3, "batch_size": 4, "flush_batches": 2},
        "precision": {"data": rows(tmp_path / "all.jsonl", nice + bad), "examples": 20},
        "adapt": {
            "memory": {"data": rows(tmp_path / "nice.jsonl", nice)},
            "batch_size": 4,
            "learning_rate": 3e-3,
        },
        "evaluate": {
            "perplexity": {"nice": rows(tmp_path / "nice_test.jsonl", nice[:8])},
            "toxicity": rows(tmp_path / "prompts.jsonl", ["the", "the cat", "a film", "a dog"]),
            "scorer": ["words:list.txt", "words:other.txt"],
            "continuations": 4,
            "new_tokens": 5,
            "bootstrap": 50,
        },
        "methods": methods,
        "scales": [1],
        "steps": [2, 6],
        "extra_scales": 0,
        "levels": [0.9],
        "keep_models": True,
    }
    Path("detox.yaml").write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, ["detox", "detox.yaml", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report["curves"]) == [kind.name for kind in KINDS.values()]
    for method, kind in KINDS.items():
        points = report["curves"][kind.name]
        assert [p["scale"] for p in points] == ([1] if kind.unit == "scale" else [2, 6])
        assert all(p["unit"] == kind.unit and p["seconds"] > 0 for p in points), method
    assert (
        len({p["perplexity"]["nice"]["nats"] for c in report["curves"].values() for p in c}) == 12
    )
    text = Path("out/report.md").read_text()
    assert "## All models, scored by `words:other.txt`" in text

    looks = {p.parts[2].split("-")[0] for p in Path("out/steps").glob("*/model/adapt.yaml")}
    assert set(looks) == set(ADAPTATIONS)
    for method in ADAPTATIONS:
        points = report["curves"][KINDS[method].name]
        words = shlex.split(points[1]["command"])
        done = CliRunner().invoke(app, [*words[1:], "--set", f"output={method}", "-q"])
        assert done.exit_code == 0, done.output
        made = (Path(method) / "model.safetensors").read_bytes()
        found = [p.read_bytes() for p in Path("out/steps").glob(f"{method}-*/model/*.safetensors")]
        assert made in found
