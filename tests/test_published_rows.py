"""The settings for published models run on data sets of the published layout, from a Hub."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import hub_double
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
SCORES = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")


def parquet(columns):
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def sentences(count, seed, words=9):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, words)) for _ in range(count)]


def card(folder, config, splits):
    lines = [f"  - split: {split}\n    path: {folder}/{split}-*\n" for split in splits]
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(lines)}---\n".encode()


def civil(rows, seed):
    toxicity = np.resize(np.asarray([0.0, 0.0, 0.5, 0.85, 0.95, 0.8], np.float32), rows)
    scores = {name: np.zeros(rows, np.float32) for name in (*SCORES, "sexual_explicit")}
    return parquet({"text": sentences(rows, seed), **scores, "toxicity": toxicity})


def prompts(rows):
    scores = {"toxicity": 0.2, "profanity": 0.1, "severe_toxicity": None}
    for i, text in enumerate(sentences(rows, 5, words=4)):
        part = {"text": text, **scores}
        row = {"filename": f"{i}.txt", "begin": 0, "end": 9, "challenging": False}
        yield json.dumps(row | {"prompt": part, "continuation": part}) + "\n"


def folder_files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    with hub_double.serving() as hub:
        splits = ("train", "validation", "test")
        names = {split: f"{split}-00000-of-00001.parquet" for split in splits}
        hub.add(
            "datasets/google/civil_comments",
            {f"data/{names[s]}": civil(60, i) for i, s in enumerate(splits)}
            | {"README.md": card("data", "default", splits)},
        )
        wiki = "wikitext-2-raw-v1"
        texts = ["", " = A title = \n", *sentences(30, 9, words=80)]
        hub.add(
            "datasets/Salesforce/wikitext",
            {f"{wiki}/{names[split]}": parquet({"text": texts}) for split in splits}
            | {"README.md": card(wiki, wiki, splits)},
        )
        hub.add(
            "datasets/allenai/real-toxicity-prompts",
            {"prompts.jsonl": "".join(prompts(24)).encode(), "README.md": b"---\n---\n"},
        )
        hub.add("openai-community/gpt2", folder_files(tiny_gpt2(made / "gpt2")))
        names = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
        bert = tiny_bert(
            made / "bert", labels=6, names=names, problem_type="multi_label_classification"
        )
        hub.add("unitary/toxic-bert", folder_files(bert))
        hate = tiny_bert(made / "hate", names=["nothate", "hate"], seed=1)
        hub.add("facebook/roberta-hate-speech-dynabench-r4-target", folder_files(hate))
        yield hub


@pytest.fixture(scope="module")
def work(hub, tmp_path_factory):
    """A folder with the rows that the script writes."""
    folder = tmp_path_factory.mktemp("work")
    done = run(hub, folder, ROOT / "scripts/published_rows.py", "-o", "rows")
    assert done.returncode == 0, done.stderr
    return folder


def run(hub, folder, *words):
    variables = hub_double.environment(hub, folder / "home", token=None)
    variables |= {"HF_DATASETS_OFFLINE": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | variables
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def read(folder, name):
    return [json.loads(line) for line in (folder / "rows" / name).read_text().splitlines()]


def test_the_rows_are_those_that_the_settings_name(work):
    for split in ("train", "test"):
        toxic = read(work, f"toxic_{split}.jsonl")
        assert len(toxic) == 20
        assert {round(row["toxicity"], 2) for row in toxic} == {0.85, 0.95}
        assert {row["toxicity"] for row in read(work, f"civil_{split}.jsonl")} == {0}
        assert len(read(work, f"wiki_{split}.jsonl")) == 30
    valid, test = (read(work, f"prompts_{kind}.jsonl") for kind in ("valid", "test"))
    assert len(valid) == len(test) == 12
    named = [{row["filename"] for row in rows} for rows in (valid, test)]
    assert not named[0] & named[1]


@pytest.mark.parametrize("name", ["gpt2", "llama-7b-lora"])
def test_the_settings_run(hub, work, name):
    """As they are, but for fewer steps and a small model in place of a gated one."""
    few = ["max_steps=4", "check_every=2", "new_tokens=3", "flush_batches=2", "max_length=32"]
    if name != "gpt2":
        few += ["model=openai-community/gpt2", "lora.target_modules=[c_attn]"]
    words = [f"--set={word}" for word in few]
    line = ["-m", "bmerge_cli", "adapt", ROOT / f"configs/adapt/{name}.yaml", *words, "--json"]
    plan = run(hub, work, *line, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert [part["rows"] for part in json.loads(plan.stdout)["parts"]] == [20, 50]
    done = run(hub, work, *line)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["checks"][0]["toxic_share"] is not None
    assert report["checks"][0]["memory_kl"] == 0
    assert report["removed"] == json.loads(plan.stdout)["removed"]


def test_the_comparison_runs(hub, work):
    """As it is, but for fewer steps, prompts and looks."""
    few = ["finetune.max_steps=3", "precision.examples=8", "scales=[1]", "steps=[1,2]"]
    few += ["evaluate.prompts=3", "evaluate.continuations=2", "evaluate.max_rows=5"]
    few += ["adapt.batch_size=2", "finetune.batch_size=2", "finetune.flush_batches=2"]
    words = [f"--set={word}" for word in (*few, "extra_scales=0", "guard=0.2")]
    done = run(hub, work, "-m", "bmerge_cli", "detox", ROOT / "configs/detox/gpt2.yaml", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((work / "gpt2-detox/report.json").read_text())
    assert len(report["base"]["toxicity"]) == 2
    assert set(report["base"]["perplexity"]) == {
        "civil comments",
        "wikitext",
        "held-out toxic text",
    }
    assert len(report["curves"]) == 6
