"""What `bmerge preview` refuses, finds and writes."""

import io
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.guarded_console import GuardedConsole
from bmerge_cli.main import app
from bmerge_cli.preview_tables import show_preview
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import run_merge
from mergekit_bayes.plan import MergeConfig
from mergekit_bayes.preview import (
    Point,
    PreviewConfig,
    PreviewReport,
    memory,
    read_preview,
    run,
    search,
)
from mergekit_bayes.preview.choosing import cost, edge, pareto
from mergekit_bayes.preview.designs import vectors_of
from mergekit_bayes.preview.held import Held
from mergekit_bayes.preview.markdown import as_markdown
from mergekit_bayes.preview.picture import make_figure
from mergekit_bayes.preview.run import run_preview
from mergekit_bayes.preview.wording import sentences
from tests import previews, tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return previews.world(tmp_path_factory.mktemp("world"), weights=False)


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    previews.recipe("r.yaml")
    return tmp_path


TEXTS = ("--data", "x=cats.csv", "-o", "out")


def preview(*words, recipe="r.yaml"):
    """Run the command; nothing may be left of it but its output."""
    before = set(os.listdir())
    done = CliRunner().invoke(app, ["preview", recipe, *words])
    assert set(os.listdir()) - before <= {"out"}
    return done


def config(**settings):
    return PreviewConfig(**{"recipe": "r", "data": {"x": "t"}, "output": "o", **settings})


REFUSED = {
    "no recipe": (("none.yaml",), (), "none.yaml: cannot be read"),
    "the folder of a merge": (
        ("merged",),
        (),
        "Name its recipe itself, 'merged/merge_recipe.yaml'",
    ),
    "another folder": (
        ("in",),
        (),
        "'in' is a folder without a merge_recipe.yaml, so it is no merge",
    ),
    "no texts": (("r.yaml",), ("--data", "y=none.csv"), "none.csv"),
    "a wrong length": (("r.yaml",), ("--scales", "1,2,3"), "3 numbers for 2 models"),
    "no number": (("r.yaml",), ("--grid", "1,x"), "--grid: 'x' is not a number"),
    "an infinite one": (("r.yaml",), ("--grid", "inf"), "must be finite"),
    "a design alone": (("r.yaml",), ("--design", "one"), "--grid, which has none"),
    "an unknown design": (("r.yaml",), ("--grid", "1", "--design", "on"), "Did you mean 'one'"),
    "a range alone": (("r.yaml",), ("--between", "0,1"), "--between is about --search"),
    "half a range": (("r.yaml",), ("--search", "2", "--between", "1"), "expected LOW,HIGH"),
    "no range": (("r.yaml",), ("--search", "2", "--between", "1,0"), "the lower first"),
    "a grid that is too large": (
        ("r.yaml",),
        ("--design", "product", "--grid", ",".join(map(str, range(1, 120)))),
        "more than 10,000",
    ),
    "no share": (("average.yaml",), ("--grid", "0.3,0.4"), "no 2 of these values sum to 1"),
    "a negative share": (("average.yaml",), ("--scales", "1,-1"), "name it with --base"),
    "a method without scales": (("slerp.yaml",), (), "slerp takes no scales"),
    "files without a config": (("files.yaml",), (), "has no config.json"),
    "texts that chose": (
        ("r.yaml",),
        ("--scales", "2", "--test", "y=./cats.csv"),
        "--test y=./cats.csv is --data x, which the merge is chosen on",
    ),
    "a missing model": (("missing.yaml",), (), "'nowhere'"),
    "a recipe in the output": (
        ("in/r.yaml",),
        ("-o", "in", "--force"),
        "would replace 'in/r.yaml'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_preview_that_cannot_be_made_is_refused_in_one_message(here, case):
    (recipe,), words, text = REFUSED[case]
    previews.recipe("average.yaml", base=None)
    previews.recipe("slerp.yaml", base=None, method="slerp")
    previews.recipe("missing.yaml", models=["a", "nowhere"])
    tiny.write("f.safetensors", tiny.arrays(0))
    tiny.write("g.safetensors", tiny.arrays(1))
    previews.recipe("files.yaml", models=["f.safetensors"], base="g.safetensors")
    Path("in").mkdir()
    previews.recipe("in/r.yaml")
    Path("merged").mkdir()
    previews.recipe("merged/merge_recipe.yaml")
    if "search" in str(words):
        pytest.importorskip("optuna", reason="a test dependency")
    done = preview(*TEXTS, *words, recipe=recipe)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert text in line
    assert not Path("out").exists()
    assert Path("in/r.yaml").exists()


def test_a_search_without_optuna_names_the_extra(here, monkeypatch):
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    done = preview(*TEXTS, "--search", "3")
    assert done.exit_code == 2
    assert "pip install 'mergekit-bayes[search]'" in done.stderr


def test_inputs_that_do_not_fit_into_memory_are_refused(here, monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: 100_000)
    done = preview(*TEXTS)
    assert done.exit_code == 2
    assert "in memory, here 0.0 GiB, and 0.0 GiB are free" in done.stderr


def test_the_memory_that_is_free_is_known_here():
    assert memory._free_bytes() is None or memory._free_bytes() > 1 << 20


@pytest.mark.parametrize("output", ["new", "old"])
def test_an_interrupt_leaves_no_half_report(here, monkeypatch, output):
    left = itertools.count()

    def measure(self):
        if next(left) == 2:
            raise KeyboardInterrupt
        return real(self)

    real = run.Measurer.measure
    monkeypatch.setattr(run.Measurer, "measure", measure)
    if output == "old":
        Path("out").mkdir()
        Path("out/preview.json").write_text("mine")
    done = preview(*TEXTS, "--grid", "0.1,0.2,0.3", "--force")
    assert done.exit_code == 130
    assert done.stderr.strip() == "stopped; nothing was written; the same line starts again"
    if output == "old":
        assert Path("out/preview.json").read_text() == "mine"
    else:
        assert not Path("out").exists()


@pytest.mark.slow
def test_a_merge_that_is_not_finite_is_one_point_that_failed(here):
    previews.recipe("half.yaml", dtype="F16")
    done = preview(*TEXTS, "--scales", "1e9,1", "--json", recipe="half.yaml")
    assert done.exit_code == 0, done.stderr
    assert "1 merge could not be measured" in done.stderr
    text = Path("out/report.md").read_text()
    assert "| 1e+09, 1 | infinite | given | failed |" in text
    assert "does not fit F16" in text


def test_the_vectors_of_each_design():
    recipe = MergeConfig(models=("a", "b"), base="base", scale=(1.0, -0.5))

    def of(recipe=recipe, **settings):
        return list(vectors_of(config(**settings), recipe))

    own = (1.0, -0.5)
    assert of() == [own]
    assert of(scales=[(2.0,), (1.0, -0.5), (0.0, 1.0)]) == [own, (2.0, 2.0), (0.0, 1.0)]
    assert of(grid=(0.0, 1.0)) == [own, (0.0, -0.5), (1.0, 0.0), (1.0, 1.0)]
    assert of(grid=(0.0, 1.0), design="common") == [own, (0.0, 0.0), (1.0, 1.0)]
    assert of(grid=(0.0, 1.0), design="product")[1:] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    average = MergeConfig(models=("a", "b", "c"))
    shares = of(average, grid=[i / 10 for i in range(11)])
    assert len(shares) == 1 + 66  # (12 choose 2)
    np.testing.assert_allclose([sum(vector) for vector in shares], 1)
    pair = MergeConfig(models=("a", "b"))
    assert of(pair) == [(0.5, 0.5)]
    assert of(pair, grid=(0.0, 0.5, 1.0), scales=[(3.0,), (1.0, 3.0)]) == [
        (0.5, 0.5),
        (0.25, 0.75),
        (0.0, 1.0),
        (1.0, 0.0),
    ]
    ruled = MergeConfig(models=("a", "b"), scale=("b:mlp=0.4",))
    assert of(ruled) == [(1.0, 1.0)]


def test_the_pareto_set_and_the_choice():
    losses = [
        {"x": 1.0, "y": 5.0},
        {"x": 2.0, "y": 2.0},
        {"x": 2.0, "y": 2.5},  # beaten
        {"x": 0.5, "y": 9.0},
        {"x": 0.1, "y": np.inf},  # was not measured
        {"x": 2.0, "y": 2.0},  # as good as another
    ]
    assert pareto(losses) == (3, 0, 1, 5)
    assert pareto([]) == ()
    assert [cost(point, losses[0], "mean") for point in losses[:2]] == [3.0, 2.0]
    assert [cost(point, losses[0], "worst") for point in losses[:4]] == [0.0, 1.0, 1.0, 4.0]
    assert cost(losses[0], losses[4], "worst") == 5.0


def test_a_scale_is_at_an_edge_where_the_losses_fall_towards_it():
    def edges(best, *others):
        costs = {best: 1.0, **{vector: 2.0 + i for i, vector in enumerate(others)}}
        return [edge(costs, best, task) for task in range(len(best))]

    # All scales differ together: the third has two values only, and is told as the others are.
    assert edges((0.2, 0.2, 0.2), (0.5, 0.5, 1.0), (1.0, 1.0, 1.0)) == ["smallest"] * 3
    assert edges((1.0, 0.5), (0.0, 0.0), (0.5, 1.0)) == ["largest", None]
    assert edges((1.0, 2.0)) == [None, None]
    assert edges((1.0, 2.0), (1.0, 3.0)) == [None, "smallest"]
    # (1, 0.5) costs less than (1, 1): of the second scale less is better, although 1 was chosen.
    assert edges((0.5, 1.0), (1.0, 0.5), (1.0, 1.0)) == ["smallest", None]
    assert edges((0.5, 1.0), (1.0, 1.0), (1.0, 0.5)) == ["smallest", "largest"]
    assert edge({(0.0,): 1.0, (1.0,): 1.0}, (0.0,), 0) is None  # a scale of no effect


def test_arrays_are_kept_once_and_gathered():
    held, a, b = Held(), ("a", "w", 0.0), ("b", "w", 0.0)
    buffer = np.array([[1, 2], [3, 4]])
    place = ("mean", "w", 0, 2)
    kept = held.get(place, [a, b], lambda: buffer)
    buffer[:] = 0
    np.testing.assert_array_equal(kept, [[1, 2], [3, 4]])
    assert held.get(place, [a, b], lambda: buffer) is kept
    np.testing.assert_array_equal(held.get(place, [b, b], lambda: buffer), [[3, 4], [3, 4]])
    assert held.get(place, [a, ("c", "w", 0.0)], lambda: buffer) is buffer
    assert held.nbytes == kept.nbytes


def test_a_search_finds_a_minimum_and_repeats_itself():
    pytest.importorskip("optuna", reason="a test dependency")

    def sought(seed, between):
        finder = search.Search(
            config(search=1, seed=seed, between=between), (0.5, 0.5), shares=False
        )
        finder.know((9.0, 0.0), 1.0)  # outside of the range
        finder.know((1.0, 1.0), float("inf"))
        finder.know((1.0, 1.0), 1.0)
        result = []
        for _ in range(25):
            x, y = finder.propose()
            result.append(((x - 0.3) ** 2 + (y + 1.2) ** 2, x, y))
            finder.learn(result[-1][0] if x > -1.5 else float("inf"))
        return result

    first = sought(0, (-2.0, 2.0))
    assert sought(0, (-2.0, 2.0)) == first
    assert sought(1, (-2.0, 2.0)) != first
    assert min(first)[0] < 0.3
    assert all(-2 <= number <= 2 for _, *xy in first for number in xy)


def test_a_search_stays_in_its_ranges():
    pytest.importorskip("optuna", reason="a test dependency")
    finder = search.Search(config(search=1), (0.5, -0.25, 0.0), shares=False)
    found = [finder.propose() for _ in range(5)]
    assert np.all(np.min(found, axis=0) >= [0, -0.5, 0])
    assert np.all(np.max(found, axis=0) <= [1, 0, 1])
    assert np.all(np.ptp(found, axis=0) > 0.1)
    shares = search.Search(config(search=1), (1.0, 1.0, 1.0), shares=True)
    shares.know((1.0, 1.0, 0.0), 1.0)
    for _ in range(3):
        vector = shares.propose()
        np.testing.assert_allclose(sum(vector), 1)
        assert min(vector) > 0
        shares.learn(1.0)


def report(sets=2, tasks=2, **changes):
    """A made-up report of the recipe, a grid and a search."""
    rng = np.random.default_rng(0)
    names = [f"set {i} with $a_long name" for i in range(sets)]
    points = [
        Point(
            scales=tuple(float(x) for x in rng.uniform(0, 2, tasks)) if i else (1.0,) * tasks,
            origin="search" if i else "recipe",
            loss={name: float(np.inf if i == 3 else rng.uniform(3, 4)) for name in names},
            failure="it is | not finite" if i == 3 else None,
        )
        for i in range(12)
    ]
    losses = [point.loss for point in points]
    values = {
        "settings": config(data={name: f"{name}.csv" for name in names}).model_dump(mode="json"),
        "summary": "a sum",
        "formula": "m = m0",
        "base": "base",
        "tasks": tuple(f"models/task-{i}/final" for i in range(tasks)),
        "unit": "token",
        "observations": dict.fromkeys(names, 1234),
        "points": points,
        "pareto": pareto(losses),
        "chosen": int(np.argmin([point.mean for point in points])),
        "held_bytes": 1 << 21,
        "seconds": 1.0,
        "path": "out",
    }
    return PreviewReport(**(values | changes))


@pytest.mark.parametrize(
    ("sets", "tasks"), [(1, 1), (2, 2), pytest.param(4, 5, marks=pytest.mark.slow)]
)
def test_all_of_a_picture_is_in_it(sets, tasks):
    figure = make_figure(report(sets, tasks))
    figure.draw_without_rendering()
    assert len(figure.axes) == sets * (sets - 1) // 2 + tasks
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in (*boxes, *(legend.get_window_extent() for legend in figure.legends)):
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_other_rows_of_one_file_are_other_texts():
    both = {"data": {"x": "t.csv"}, "test": {"y": "t.csv"}}
    run._refuse_texts_twice(config(**both, where={"x": {"part": 1}, "y": {"part": 2}}))
    for where in ({}, {"part": 1}, {"x": {"part": 1}, "y": {"part": 1}}):
        with pytest.raises(ConfigError, match=r"--test y=t\.csv is --data x"):
            run._refuse_texts_twice(config(**both, where=where))


def test_an_example_has_its_article():
    assert "nats an example" in as_markdown(report(unit="example"))
    assert "nats a token" in as_markdown(report())


def test_the_version_stands_in_the_report_as_it_is():
    lines = as_markdown(report(version="0.1.0")).splitlines()
    assert lines[-1] == "- bmerge 0.1.0; all settings and numbers are in preview.json."


def with_far(made, index):
    """Its points, one of them of losses far above the others."""
    far = {"loss": dict.fromkeys(made.observations, 90.0)}
    return tuple(p.model_copy(update=far) if i == index else p for i, p in enumerate(made.points))


@pytest.mark.parametrize(("sets", "tasks"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("far", "count", "is_cut"), [(0, 12, False), (1, 12, False), (6, 7, False), (6, 8, True)]
)
def test_only_a_nameless_merge_of_many_is_cut(sets, tasks, far, count, is_cut):
    made = report(sets, tasks, chosen=1, pareto=(1,))
    figure = make_figure(made.model_copy(update={"points": with_far(made, far)[:count]}))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("beyond" in text for text in legend) == is_cut
    assert all((axes.get_ylim()[1] < 90) == is_cut for axes in figure.axes)
    assert all((axes.get_xlim()[1] < 90) == is_cut for axes in figure.axes[: sets - 1])


def test_only_the_last_row_of_a_picture_has_gaps():
    figure = make_figure(report(2, 3))
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        *((0, 0), (0, 1)),
        *((1, 0), (1, 1)),
    ]


def test_losses_beyond_the_axis_are_marked_and_counted():
    made = report(2, 2)
    points = with_far(made, next(i for i in range(1, 12) if i != made.chosen))
    for found, count in ((made, 0), (made.model_copy(update={"points": points}), 1)):
        figure = make_figure(found)
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        said = [text for text in texts if "beyond the axis" in text]
        assert said == ["1 of 12 merges at the edge lie beyond the axis"] * count
        for axes in figure.axes:
            marks = [line for line in axes.lines if line.get_marker() == "^"]
            assert len(marks) == count
            assert all(y == axes.get_ylim()[1] for line in marks for y in line.get_ydata())


def test_every_scale_at_an_edge_is_told():
    made = report(2, 3)
    vectors = [(0.5, 0.5, 1.0), (0.2, 0.2, 0.2), (1.0, 1.0, 1.0)]
    points = tuple(
        p.model_copy(update={"scales": v, "failure": None, "loss": dict.fromkeys(p.loss, x)})
        for p, v, x in zip(made.points, vectors, (0.42, 0.38, 0.44), strict=False)
    )
    said = list(sentences(made.model_copy(update={"points": points, "chosen": 1})))
    told = [sentence for sentence in said if "look beyond" in sentence]
    assert told == [
        f"The scale 0.2 of task-{i}/final is the smallest measured: look beyond it."
        for i in range(3)
    ]


@pytest.mark.parametrize(("base", "is_told"), [(None, False), ("base", True)])
def test_no_share_lies_beyond_zero_and_one(base, is_told):
    made = report(1, 2)
    shares = [0.5, 0.0, 1.0, 0.3]
    points = tuple(
        p.model_copy(update={"scales": (x, 1 - x), "failure": None, "loss": {"x": 3.0 + (x != 0)}})
        for p, x in zip(made.points, shares, strict=False)
    )
    update = {"points": points, "chosen": 1, "base": base, "observations": {"x": 9}}
    said = list(sentences(made.model_copy(update=update)))
    assert any("look beyond" in sentence for sentence in said) == is_told


def test_the_report_names_models_apart_and_warns_of_chosen_texts():
    made = report()
    text = as_markdown(made)
    assert "for task-0/final, task-1/final" in text
    assert "looks better on them than on others" in text
    assert "| failed |" in text
    assert text.count("Pareto") >= len(made.pareto)
    screen = GuardedConsole(file=io.StringIO(), width=140)
    show_preview(screen, made)
    assert "recommended" in screen.file.getvalue()


@pytest.mark.slow
def test_a_search_on_models(here):
    pytest.importorskip("optuna", reason="a test dependency")
    settings = {"recipe": "r.yaml", "data": {"x": "cats.csv"}, "search": 4, "seed": 3}
    first = run_preview(PreviewConfig(**settings, grid=(0.0, 2.0), output="one"))
    again = run_preview(PreviewConfig(**settings, grid=(0.0, 2.0), output="two"))
    assert [p.origin for p in first.points].count("search") == 4
    assert [p.scales for p in first.points] == [p.scales for p in again.points]
    assert [p.loss for p in first.points] == [p.loss for p in again.points]
    chosen = yaml.safe_load(Path("one/chosen.yaml").read_text())["scale"]
    assert tuple(chosen) == first.best.scales


def test_a_vector_of_other_signs_is_planned_before_anything_is_measured(here):
    previews.recipe("r.yaml", base=None)
    with pytest.raises(ConfigError, match="name it with --base"):
        run_preview(
            PreviewConfig(recipe="r.yaml", data={"x": "none.csv"}, scales=[(-1, 2)], output="out")
        )


@pytest.mark.slow
def test_evaluations_are_spent_where_the_prediction_is_good(here, tmp_path_factory):
    world = previews.world(tmp_path_factory.mktemp("weighed"))
    for path in ("base", "a", "b"):
        Path(path).unlink()
        Path(path).symlink_to(world / path)
    previews.recipe("r.yaml", weights="precision", scale=[0.3, 0.3])
    grid = ("--grid", "-2,0.1,1,8", "--design", "common", "--predict-first", "2")
    done = preview(*TEXTS, *grid)
    assert done.exit_code == 0, done.stderr
    report = read_preview("out")
    assert [p.scales for p in report.points] == [(0.3, 0.3), (0.1, 0.1), (1.0, 1.0)]
    assert report.skipped == 2
    merged = run_merge(
        MergeConfig(models=("a", "b"), base="base", weights="precision", scale=(1.0,), out="m")
    )
    rises = [increase.nats for increase in merged.predicted]
    assert report.points[2].predicted == pytest.approx(sum(rises) / 3)
    assert "2 merges of a larger predicted rise were not measured" in done.stderr
    assert "Rank correlation of the predicted rise" in done.stderr


def test_a_prediction_needs_precisions(here):
    done = preview(*TEXTS, "--predict-first", "2")
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert "precision" in line
