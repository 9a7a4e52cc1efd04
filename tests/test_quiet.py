"""Stderr holds our own lines only: no warnings, logs and bars of other libraries, and no bar of
ours where there is no terminal. Failures are still told.
"""

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import transformers

from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.quiet import quiet_libraries, with_bar
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests import finetuning
from tests.tiny_models import tiny_bert, tiny_gpt2

data = finetuning.data
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "peft", "accelerate", "torch")
# What bmerge itself prints on stderr while it trains, estimates and measures.
OURS = (
    r"\d+ steps? of [\d,]+ (tokens|examples), (ivon|adamw): learning_rate .*",
    r"step \d+/\d+  loss .*",
    r"\d+ steps?, mean training loss .*",
    r"posterior: .*",
    r"ggn: looked at .*",
    r"loss: .*",
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def noise():
    """All that other libraries like to say."""
    for name in LIBRARIES:
        logging.getLogger(name).warning("%s warns", name)
        logging.getLogger(f"{name}.inner").warning("%s warns", name)
    transformers.utils.logging.get_logger("transformers.x").warning_once("loss_type=None")
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.warn("soon", category, stacklevel=1)
    for _ in transformers.utils.logging.tqdm(range(2)), datasets.utils.tqdm(range(2)):
        list(_)


def test_other_libraries_are_silent_inside_the_block_and_as_before_after_it(capfd, recwarn):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    try:
        levels = [logging.getLogger(name).level for name in LIBRARIES]
        with quiet_libraries():
            noise()
            assert (records, list(recwarn)) == ([], [])
            assert "it/s" not in capfd.readouterr().err
            logging.getLogger("transformers").error("it broke")
            warnings.warn("overflow", RuntimeWarning, stacklevel=1)
        assert [r.getMessage() for r in records] == ["it broke"]
        assert [str(w.message) for w in recwarn] == ["overflow"]
        assert [logging.getLogger(name).level for name in LIBRARIES] == levels
        noise()
        assert len(records) > len(LIBRARIES)
        assert "it/s" in capfd.readouterr().err
    finally:
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(handler)


def test_who_asks_a_library_for_more_gets_it(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "warning")
    with quiet_libraries():
        logging.getLogger("accelerate").warning("about devices")
    assert "about devices" in caplog.text


def test_our_bar_is_shown_on_a_terminal_only_and_not_if_quiet(monkeypatch, tmp_path, data):
    model = str(tiny_gpt2(tmp_path / "m"))
    for screen, quiet, expected in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr(sys, "stderr", screen)
        run_precision(PrecisionConfig(model=model, data=data, force=True), quiet=quiet)
        assert ("curvature" in screen.getvalue()) == expected
    monkeypatch.setattr(sys, "stderr", Terminal())
    with quiet_libraries(bars=False), quiet_libraries():  # the outer one is obeyed
        assert list(with_bar("ab", "x", 2)) == ["a", "b"]
    assert sys.stderr.getvalue() == ""


def test_a_run_says_nothing_but_our_own_lines(tmp_path, data, capfd, recwarn):
    """Python warnings count, too, which pytest would keep from stderr."""
    gpt2, bert = str(tiny_gpt2(tmp_path / "g")), str(tiny_bert(tmp_path / "b"))
    capfd.readouterr()
    settings = {"data": data, "max_steps": 2, "save_steps": 2, "logging_steps": 1}
    settings["flush_batches"] = 2
    for name, model, changes in (
        ("tuned", gpt2, {}),
        ("head", gpt2, {"task": "classification"}),
        ("adapter", bert, {"lora": {"r": 2, "target_modules": ["query"]}, "optimizer": "adamw"}),
    ):
        out = str(tmp_path / name)
        run_finetune(FinetuneConfig(model=model, output=out, **settings, **changes))
    run_precision(PrecisionConfig(model=gpt2, data=data, examples=8))
    run_evaluate(EvaluateConfig(model=str(tmp_path / "tuned"), perplexity={"t": data}))
    run_evaluate(EvaluateConfig(model=str(tmp_path / "head"), classify={"t": data}))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 3
    for line in lines:
        assert any(re.fullmatch(pattern, line) for pattern in OURS), line
    assert [str(w.message) for w in recwarn] == []


def test_a_model_whose_file_lacks_parameters_is_told_in_our_words(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    path = tiny_bert(tmp_path / "b")
    tensors = load_file(path / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if not n.startswith("classifier")},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with quiet_libraries():
        load_model(str(path))
    assert "b' does not hold classifier.bias, classifier.weight: the values were made up" in (
        caplog.text
    )
    caplog.clear()
    base = tiny_gpt2(tmp_path / "g")
    with quiet_libraries():  # here a new head is asked for
        load_model(str(base), "classification", num_labels=2)
    assert caplog.text == ""


@pytest.mark.slow
def test_every_verb_as_a_process_says_nothing_but_our_own_lines(tmp_path, data):
    """What pytest may swallow: imports, handlers bound to the real stderr, the launcher's ranks."""
    gpt2, bert = tiny_gpt2(tmp_path / "g"), tiny_bert(tmp_path / "b")
    (tmp_path / "words.txt").write_text("bad\n")
    settings = {"data": data, "max_steps": 4, "save_steps": 2, "logging_steps": 2}
    for name, model in (("tuned", gpt2), ("head", gpt2), ("adapter", bert)):
        changes = {"model": str(model), "output": str(tmp_path / name)}
        if name == "head":
            changes["task"] = "classification"
        if name == "adapter":
            changes["lora"] = {"r": 2, "target_modules": ["query"]}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings | changes))
    (tmp_path / "one.txt").write_text("the cat sat\n")
    words = f"words:{tmp_path / 'words.txt'}"
    for line in (
        ("finetune", "tuned.yaml", "--set", "keep_checkpoints=true"),
        ("finetune", "tuned.yaml", "--resume", "--force", "--set", "keep_checkpoints=true"),
        ("finetune", "head.yaml"),
        ("finetune", "adapter.yaml"),
        ("finetune", "tuned.yaml", "--force", "--num-processes", "2", "--set", "save_steps=null"),
        ("precision", "g", "--data", data),
        ("precision", "b", "--data", data, "--json"),
        ("evaluate", "tuned", "--perplexity", data, "--toxicity", data, "--scorer", words, "-q"),
        ("evaluate", "head", "--classify", data, "--json", "-q"),
        ("evaluate", "adapter", "--classify", data, "-q"),
        ("merge", "tuned", "g", "-o", "ab", "-q"),
        ("inspect", "tuned", "g", "-q"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bmerge_cli.main", *line],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")},
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
        for text in done.stderr.splitlines():
            assert any(re.fullmatch(pattern, text) for pattern in OURS), (line, text)
    assert Path(tmp_path, "ab").exists()
