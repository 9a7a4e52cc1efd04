"""`bmerge adapt`: its line, its dry run, and what it says."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import launcher
from mergekit_bayes.adapt import AdaptReport, Check
from mergekit_bayes.adapt.objective import Objective
from mergekit_bayes.adapt.teacher import FrozenCopy
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2

RUN = CliRunner()
REPORT = AdaptReport(
    path=Path("out"),
    steps=30,
    kept_step=20,
    reached=True,
    checks=(
        Check(step=0, toxic_share=0.5, memory_kl=0.0),
        Check(step=20, toxic_share=0.0432, memory_kl=0.01234),
        Check(step=30, memory_kl=0.5),
    ),
    unit="token",
    removed=6_000,
    added=0,
    memory=1_234,
    base=30_000.0,
    kappa=24.3,
    tau=1.0,
    prior="none",
    learning_rate=1e-4,
    refused_steps=2,
    reconstruction_error=0.125,
    estimator="ggn",
    without_precision=None,
    health={"precision_median": 12.3},
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a model, rows and settings."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2("base")
    for seed, name in enumerate(("bad", "good", "other")):
        texts(f"{name}.jsonl", rows=24, seed=seed)
    return write({})


def write(changes):
    settings = {
        "model": "base",
        "output": "out",
        "remove": {"data": "bad.jsonl", "where": {"label": 1}},
        "memory": {"data": "good.jsonl"},
        "memory_held_out": 0.25,
        "posterior": "none",
        "max_steps": 3,
        "batch_size": 4,
    }
    Path("c.yaml").write_text(yaml.safe_dump(settings | changes))


def adapt(*words):
    done = RUN.invoke(app, ["adapt", "c.yaml", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def planned(*words):
    done = adapt("--dry-run", "--json", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def reported(monkeypatch, report=REPORT, *words):
    """What the command says of a report."""
    monkeypatch.setattr("mergekit_bayes.adapt.run.run_adapt", lambda *_, **__: report)
    return adapt(*words)


def files():
    return {p.as_posix(): p.stat().st_mtime_ns for p in Path().rglob("*")}


def test_a_dry_run_writes_nothing_and_says_what_the_run_then_does(world, monkeypatch):
    before = files()
    plan = planned()
    assert files() == before
    counts = {"trained": 0, "teacher": 0}
    for name, kind, method in (
        ("trained", Objective, "__call__"),
        ("teacher", FrozenCopy, "_logits"),
    ):
        original = getattr(kind, method)

        def counted(*words, name=name, original=original):
            counts[name] += len(words[-1]["input_ids"])
            return original(*words)

        monkeypatch.setattr(kind, method, counted)
    # The guard's looks at single batches are not planned.
    monkeypatch.setattr("mergekit_bayes.adapt.leap.mean_divergence", lambda *_: 0.0)
    done = adapt("--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    for name in ("unit", "removed", "added", "base", "kappa", "tau", "learning_rate", "steps"):
        assert plan[name] == report[name], name
    remove, memory = plan["parts"]
    labels = [json.loads(line)["label"] for line in Path("bad.jsonl").read_text().splitlines()]
    assert remove["rows"] == remove["examples"] == sum(labels)
    assert memory["observations"] == report["memory"]
    assert (memory["examples"], memory["held_out"]) == (18, 6)
    passes = plan["passes"]
    assert passes["reconstructed"] == 24
    assert passes["trained"] == counts["trained"]
    assert passes["teacher"] + passes["reconstructed"] == counts["teacher"]
    for path, what in plan["stored"].items():
        assert Path(path).exists() != what.startswith("nothing"), path


def test_a_dry_run_counts_the_weights_that_are_held(world):
    whole = planned()
    assert whole["trained"] == whole["parameters"]
    assert whole["bytes"]["weights"] == whole["bytes"]["teacher"] == 4 * whole["parameters"]
    assert whole["bytes"]["optimizer"] == 2 * whole["bytes"]["gradients"]
    adapter = planned("--set", "lora={r: 2}")
    assert adapter["parameters"] == whole["parameters"] + adapter["trained"]
    assert adapter["bytes"]["teacher"] == 0  # the model with its adapter off
    assert adapter["bytes"]["gradients"] == 4 * adapter["trained"]


def test_one_scorer_may_filter_the_memory_and_rate_the_checks(world):
    Path("words.txt").write_text("bad\n")
    scored = ["scorer=words:words.txt", "prompts=bad.jsonl", "until={toxic_share: 0.1}"]
    written = ["memory_self_generated=7", "memory_filter=words:words.txt"]
    planned(*(word for name in scored + written for word in ("--set", name)))


def test_texts_that_the_model_will_write_are_not_counted(world, monkeypatch):
    def write_texts(*_, **__):
        raise AssertionError("a dry run writes no text")

    monkeypatch.setattr("mergekit_bayes.adapt.memory.write_texts", write_texts)
    plan = planned("--set", "memory_self_generated=7")
    assert plan["memory_self_generated"] == 7
    assert plan["kappa"] is None
    assert "out/memory.jsonl" in plan["stored"]
    assert planned("--set", "memory_self_generated=7", "--set", "kappa=2")["kappa"] == 2


def test_a_dry_run_reads_well(world):
    done = adapt("--dry-run", "--set", "until={held_out_rise: 0.5}")
    assert done.exit_code == 0, done.output
    assert not done.stdout
    for words in (
        "remove: bad.jsonl",
        "memory: good.jsonl",
        "(assumed) tokens; kappa",
        "removal npo, prior none, teacher copy, adamw, learning rate",
        "at most 3 steps: 24 examples forward and backward",
        "ends at: held-out loss risen by 0.5",
        "stores out: the model and its tokenizer",
    ):
        assert words in done.stderr, words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "'out' exists"),
        (("output=other", "remove=null"), "nothing to do"),
        (("output=other", "until={memory_kl: 1}", "memory=null"), "until: memory_kl needs a mem"),
        (("output=other", "until={toxic_share: 0.1}"), "until: toxic_share needs prompts"),
        (("output=other", "text_column=txt"), "no column 'txt'"),
        (("output=other", "prompts=none.jsonl", "scorer=words:good.jsonl"), "none.jsonl"),
        (("output=other", "prompts=good.jsonl", "scorer=words:none.txt"), "none.txt"),
        (("removal=npoo",), "removal: 'npoo' is not"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(world, words, message):
    Path("out").mkdir()
    done = adapt("--dry-run", *(f"--set={word}" for word in words))
    assert done.exit_code == 2
    assert message in done.stderr, done.stderr


def test_the_report_says_what_was_found_kept_and_what_to_do_next(world, monkeypatch):
    write({"scorer": "words:list.txt"})
    done = reported(monkeypatch)
    assert done.exit_code == 0
    assert done.stdout == "out\n"
    lines = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert lines[0] == (
        "6,000 removed, 1,234 in the memory (tokens); the start stands for 30,000; kappa 24.3, "
        "tau 1, learning rate 0.0001"
    )
    alone = REPORT.model_copy(update={"memory": 0, "kappa": 0.0, "prior": "stored"})
    assert "30,000; prior stored, tau 1" in " ".join(reported(monkeypatch, alone).stderr.split())
    assert lines[1:5] == [
        "step toxic share memory KL, nats/token",
        "0 50.0% 0.0000",
        "20 4.3% 0.0123",
        "30 0.5000",
    ]
    assert lines[5] == "a goal was reached after 30 steps; step 20 is stored"
    assert lines[6].startswith("2 steps undone")
    assert lines[7].startswith("gradient-reconstruction error of the K-prior: 0.125")
    assert lines[8] == "posterior: ggn, median precision 12.3 (1/weight^2)"
    assert lines[9] == (
        "check it: bmerge evaluate out --perplexity RELATED.jsonl --perplexity UNRELATED.jsonl "
        "--toxicity TEST_PROMPTS.jsonl --scorer words:list.txt"
    )
    assert lines[10] == "undo it: base is as it was"


def test_the_report_says_where_no_goal_was_reached_or_set(world, monkeypatch):
    missed = reported(monkeypatch, REPORT.model_copy(update={"reached": False}))
    assert "no goal was reached in 30 steps; step 20, the best of the checks" in missed.stderr
    unset = reported(monkeypatch, REPORT.model_copy(update={"reached": None, "checks": ()}))
    assert "30 steps made (no goal was set)" in unset.stderr
    assert "memory KL" not in unset.stderr
    noisy = REPORT.model_copy(update={"reconstruction_error": -0.01})
    assert "of the K-prior: below its noise" in reported(monkeypatch, noisy).stderr
    assert reported(monkeypatch, REPORT, "-q").stderr == ""
    document = json.loads(reported(monkeypatch, REPORT, "--json").stdout)
    assert document == REPORT.model_dump(mode="json")


def test_the_report_says_what_a_budget_alone_kept(world, monkeypatch):
    write({"until": {"memory_kl": 0.1}, "max_steps": 200})
    done = reported(monkeypatch, REPORT.model_copy(update={"reached": None}))
    assert "step 20, the last check within the budget of memory_kl, is stored" in done.stderr
    nothing = REPORT.model_copy(update={"reached": None, "kept_step": 0})
    assert "the start is stored as it was" in reported(monkeypatch, nothing).stderr
    missed = reported(monkeypatch, REPORT.model_copy(update={"reached": False})).stderr
    assert "where the budget of memory_kl (0.1) was spent" in missed
    assert "Raise max_steps" not in missed


def test_prompts_may_be_objects_in_a_column_of_their_own(world):
    rows = [{"prompt": {"text": f"the {word}", "toxicity": 0.1}} for word in ("cat", "dog")]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("list.txt").write_text("bad\n")
    words = ("prompts=prompts.jsonl", "scorer=words:list.txt", "check_every=2", "continuations=3")
    line = [f"--set={word}" for word in words]
    for column in ("prompt", "prompt.text"):
        plan = planned(*line, f"--set=prompt_column={column}")
        assert (plan["checks"], plan["passes"]["continuations"]) == (3, 3 * 2 * 3)
    refused = adapt("--dry-run", *line)
    assert "no column 'text'" in refused.stderr


def test_several_processes_get_the_same_line(world, monkeypatch):
    started = []

    def launch(command, processes):
        started.append((command[1:], processes))
        return 3

    monkeypatch.setattr(launcher, "launch", launch)
    done = adapt("--num-processes", "2", "--set", "seed=4", "--force", "--json")
    assert done.exit_code == 3
    words = ["-m", "bmerge_cli.main", "adapt", "c.yaml", "--set=seed=4"]
    words += ["--set=num_processes=2", "--set=force=true", "--json"]
    assert started == [(words, 2)]
    assert planned("--num-processes", "2")["passes"]["trained"] == 48


def test_a_source_alone_stands_for_all_of_its_rows(world):
    named = planned("--set", "memory=good.jsonl")
    assert named == planned("--set", "memory={data: good.jsonl}")
    assert planned("--set", "memory=[good.jsonl, good.jsonl]")["parts"][1]["rows"] > 0


def test_a_record_of_few_observations_is_told(world, caplog):
    with_a_precision = ["precision", "base", "--data", "other.jsonl", "--examples", "4", "-q"]
    assert RUN.invoke(app, with_a_precision).exit_code == 0
    few = planned()
    assert few["base_is_recorded"]
    assert few["base"] < 5 * few["removed"]
    assert "give base_observations" in caplog.text
    caplog.clear()
    planned("--set", "base_observations=1e6")
    planned("--set", "base_multiple=0.01")
    assert "base_observations" not in caplog.text


def test_a_folder_of_no_kept_step_is_no_obstacle(world):
    Path("out.steps").mkdir()
    planned("--set", "keep_steps=[2]")
    Path("out.steps/2").mkdir()
    refused = adapt("--dry-run", "--set", "keep_steps=[2]")
    assert (refused.exit_code, "out.steps" in refused.stderr) == (2, True)
