"""No command runs the Python code of a model folder, unless it is told to trust it."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import dynamic_module_utils
from typer.testing import CliRunner

import bmerge_cli
import mergekit_bayes
from bmerge_cli.main import app
from mergekit_bayes.detox import DetoxConfig
from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.settings import evaluate_config, finetune_config, precision_config
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.models import limits
from mergekit_bayes.models.load import is_classifier, load_model
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests.tiny_models import tiny_bert, tiny_gpt2

# Each file of code leaves its name in the folder of marks when it is imported.
MARK = "import pathlib\npathlib.Path({folder!r}, {name!r}).touch()\n"
CONFIG = (
    "from transformers import {base}Config\nclass OwnConfig({base}Config):\n    model_type = 'o'\n"
)
MODEL = (
    "from transformers import {base}\nfrom .configuration_own import OwnConfig\n"
    "class OwnModel({base}):\n    config_class = OwnConfig\n"
)
TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n"
    "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copied(folder, to):
    return str(shutil.copytree(folder, to / Path(folder).name))


def add_code(folder, marks, base, model, auto):
    """Make a folder's model one of its own code, which transformers does not know."""
    files = {"configuration_own.py": CONFIG.format(base=base), "modeling_own.py": MODEL}
    for name, code in files.items():
        (folder / name).write_text(
            MARK.format(folder=str(marks), name=name) + code.format(base=model)
        )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", auto: "modeling_own.OwnModel"}
    change(folder / "config.json", model_type="o", auto_map=auto_map)


@pytest.fixture(autouse=True)
def stdin(monkeypatch, tmp_path):
    """A user who says yes to everything, and a cache of modules of its own."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def world(built, tmp_path):
    for mark in built["marks"].iterdir():
        mark.unlink()
    return built | {"out": str(tmp_path / "out")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A language model, a classifier and an adapter's base with code, and rows."""
    tmp_path = tmp_path_factory.mktemp("world")
    marks = tmp_path / "marks"
    marks.mkdir()
    rows = [{"text": "the cat sat", "label": 0}, {"text": "a bad dog", "label": 1}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 2))
    (tmp_path / "w.txt").write_text("bad\n")
    tiny_gpt2(tmp_path / "plain", width=8, layers=1)
    own = tiny_gpt2(tmp_path / "own", width=8, layers=1)
    adapted = get_peft_model(
        transformers.GPT2LMHeadModel.from_pretrained(own),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(own)
    adapted.save_pretrained(tmp_path / "adapter")
    add_code(own, marks, "GPT2", "GPT2LMHeadModel", "AutoModelForCausalLM")
    add_code(
        tiny_bert(tmp_path / "scorer"),
        marks,
        "Bert",
        "BertForSequenceClassification",
        "AutoModelForSequenceClassification",
    )
    tokens = tiny_gpt2(tmp_path / "tokens", width=8, layers=1)
    code = MARK.format(folder=str(marks), name="tokenization_own.py") + TOKENIZER
    (tokens / "tokenization_own.py").write_text(code)
    change(
        tokens / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    return {
        name: str(tmp_path / name) for name in ("own", "plain", "scorer", "adapter", "tokens")
    } | {
        "rows": str(tmp_path / "t.jsonl"),
        "words": f"words:{tmp_path / 'w.txt'}",
        "marks": marks,
    }


def test_what_an_adapter_loads_is_not_asked_about(world, tmp_path, monkeypatch):
    """peft loads a model for some adapters without saying whether its code is trusted."""
    adapter = Path(copied(world["adapter"], tmp_path))
    config = {"peft_type": "SHADOW", "shadow_model": world["own"]}
    change(adapter / "adapter_config.json", base_model_name_or_path=world["plain"], **config)
    with pytest.raises(CheckpointError, match="shadow_model"):
        load_model(str(adapter))
    monkeypatch.setattr(limits, "_ELSEWHERE", {})  # as of a kind that is not known yet
    with pytest.raises(CheckpointError, match="needs Python code of its own"):
        load_model(str(adapter))
    assert not list(world["marks"].iterdir())
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


def evaluate(world, model, scorer=None, **settings):
    return run_evaluate(
        EvaluateConfig(
            model=world[model],
            perplexity={"rows": world["rows"]},
            toxicity=world["rows"] if scorer else None,
            scorer=(scorer,) if scorer else (),
            continuations=1,
            new_tokens=2,
            bootstrap=0,
            **settings,
        )
    )


def finetune(world, **settings):
    config = {"data": world["rows"], "output": world["out"], "max_steps": 1} | settings
    return run_finetune(FinetuneConfig(model=world["own"], **config), quiet=True)


def precision(world, model, **settings):
    config = PrecisionConfig(
        model=world[model], data=world["rows"], output=world["out"], **settings
    )
    return run_precision(config, quiet=True)


def detox_settings(world, **settings):
    return DetoxConfig(
        base=world["own"],
        output=world["out"],
        toxic={"data": world["rows"]},
        evaluate={
            "perplexity": {"rows": world["rows"]},
            "toxicity": world["rows"],
            "scorer": [world["words"]],
        },
        methods="task_arithmetic",
        scales=0.5,
        **settings,
    )


COMMANDS = {
    "evaluate": lambda w, **s: evaluate(w, "own", **s),
    "evaluate an adapter": lambda w, **s: evaluate(w, "adapter", **s),
    "evaluate with a scorer": lambda w, **s: evaluate(
        w, "plain", f"model:{w['scorer']}#LABEL_1", **s
    ),
    "precision": lambda w, **s: precision(w, "own", **s),
    "precision of an adapter": lambda w, **s: precision(w, "adapter", **s),
    "finetune": finetune,
    "finetune with a new head": lambda w, **s: is_classifier(w["own"], **s),
    "detox": lambda w, **s: run_detox(detox_settings(w, **s), quiet=True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_of_a_folder_though_stdin_says_yes(world, name):
    with pytest.raises(CheckpointError) as refused:
        COMMANDS[name](world)
    assert not list(world["marks"].iterdir())
    message = str(refused.value)
    assert world["scorer" if "scorer" in name else "own"] in message
    assert "--trust-remote-code" in message
    assert "configuration_own.OwnConfig" in message


SLOW = ("finetune", "precision of an adapter", "evaluate an adapter")  # as the commands above
TRUSTED = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in COMMANDS
    if name != "detox"
]


@pytest.mark.parametrize("name", TRUSTED)
def test_with_the_flag_the_code_is_run(world, name):
    COMMANDS[name](world, trust_remote_code=True)
    assert list(world["marks"].iterdir())


def test_a_tokenizers_code_is_run_only_with_the_flag(world):
    """transformers has a tokenizer for this architecture, so that the folder's is not needed."""
    assert evaluate(world, "tokens").perplexity
    assert not list(world["marks"].iterdir())
    assert evaluate(world, "tokens", trust_remote_code=True).perplexity
    assert [mark.name for mark in world["marks"].iterdir()] == ["tokenization_own.py"]


def test_detox_hands_the_setting_to_every_step(world):
    for trusted in (False, True):
        config = detox_settings(world, trust_remote_code=trusted)
        steps = (
            finetune_config(config, "o"),
            precision_config(config.model_copy(update={"precision": {"data": "d"}}), "o"),
        )
        for step in (*steps, evaluate_config(config, "m", "o")):
            assert step.trust_remote_code is trusted


def test_the_flag_is_the_field_in_the_command_line(world):
    line = ["precision", world["own"], "--data", world["rows"], "-o", world["out"]]
    refused = CliRunner().invoke(app, line, input="y\n" * 9)
    assert refused.exit_code == 2
    assert not list(world["marks"].iterdir())
    trusted = CliRunner().invoke(app, [*line, "--trust-remote-code"])
    assert trusted.exit_code == 0, trusted.output
    assert list(world["marks"].iterdir())


def test_a_folder_that_transformers_knows_runs_without_its_code(world, tmp_path):
    """`auto_map` alone is no need: a known architecture is loaded by transformers' own code."""
    world["own"] = copied(world["own"], tmp_path)
    change(Path(world["own"]) / "config.json", model_type="gpt2")
    assert evaluate(world, "own").perplexity
    assert not list(world["marks"].iterdir())


def test_an_attention_of_a_repository_is_code(world, tmp_path):
    world["plain"] = copied(world["plain"], tmp_path)
    change(Path(world["plain"]) / "config.json", attn_implementation="org/kernel")
    with pytest.raises(
        CheckpointError, match=r"attn_implementation is 'org/kernel', which is code"
    ):
        load_model(world["plain"])


def test_pickles_are_not_loaded(world, tmp_path):
    plain = Path(copied(world["plain"], tmp_path))
    torch.save({"x": torch.ones(1)}, plain / "pytorch_model.bin")
    (plain / "model.safetensors").rename(plain / "other")
    with pytest.raises(CheckpointError, match="bmerge convert"):
        load_model(str(plain))
    (plain / "other").rename(plain / "model.safetensors")
    change(plain / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(CheckpointError, match="transformers_weights is"):
        load_model(str(plain))
    adapter = Path(copied(world["adapter"], tmp_path))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="bmerge convert"):
        load_model(str(adapter))


LOADERS = {"from_pretrained", "load_dataset", "from_config"}
ROOMS = {
    "models/pretrained.py": {"from_pretrained"},
    "models/rows.py": {"load_dataset"},
    "models/skeleton.py": {"from_config"},
}


def test_models_and_rows_are_loaded_in_one_room_each():
    """There every call of a library that may run code says whether it is trusted."""
    for package in (mergekit_bayes, bmerge_cli):
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            text = file.read_text()
            if not any(f".{name}" in text or f" {name}(" in text for name in LOADERS):
                continue
            allowed = ROOMS.get(file.relative_to(root).as_posix(), set())
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                if name in LOADERS:
                    assert name in allowed, f"{file}: {name}"
                if name == "from_config":
                    assert "trust_remote_code=trust_remote_code" in ast.unparse(node)
                if name == "from_pretrained" and "Peft" not in ast.unparse(node.func):
                    assert "_options(trust_remote_code=trust_remote_code)" in ast.unparse(node)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("finetune", "model: m\noutput: o\ndata: t.jsonl\n"),
        ("detox", "base: m\noutput: o\nscales: [1]\n"),
    ],
)
@pytest.mark.parametrize("value", ["true", "yes", "1", "'true'", "null"])
def test_a_settings_file_cannot_let_code_run(tmp_path, command, settings, value):
    file = tmp_path / "settings.yaml"
    file.write_text(f"{settings}trust_remote_code: {value}\n")
    done = CliRunner().invoke(app, [command, str(file)])
    assert done.exit_code == 2
    assert "Pass --trust-remote-code if you trust that code." in done.stderr
