"""A Hub on the loopback interface, and the folders that the tests push to it and fetch from it."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from mergekit_bayes.merge import MergeConfig, run_merge
from tests import hub_double, tiny

RUN = CliRunner()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client library of this process talks to."""
    with hub_double.serving() as server:
        hub_double.use(server, monkeypatch, tmp_path / "home")
        yield server


def folder(path, seed=0, precision=True):
    """A model folder with a posterior."""
    mean = tiny.arrays(seed)
    if precision:
        tiny.posterior(path / "model.safetensors", mean, tiny.precisions(seed))
        tiny.into_folder(path)
        (path / "posterior" / "posterior.json").write_text("{}")
    else:
        tiny.write(path / "model.safetensors", mean)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return path


def adapter(path, base, seed=0):
    """A LoRA adapter of rank 1 on the attention weight of `folder`'s model, in PEFT's layout."""
    shapes = {
        "base_model.model.h.0.attn.lora_A.weight": (1, 5),
        "base_model.model.h.0.attn.lora_B.weight": (4, 1),
    }
    mean = tiny.arrays(seed, shapes)
    tiny.posterior(path / "adapter_model.safetensors", mean, tiny.precisions(seed, shapes))
    tiny.into_folder(path, "adapter_model")
    about = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["attn"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }
    (path / "adapter_config.json").write_text(json.dumps(about))
    return path


def files(path):
    """The files below a folder: content by relative path."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def merged(hub, tmp_path):
    """org/a minus half of org/b on org/base, in a folder."""
    for seed, name in enumerate(("base", "a", "b")):
        card = b"---\nlicense: apache-2.0\n---\n"
        hub.add(f"org/{name}", files(folder(tmp_path / name, seed)) | {"README.md": card})
    out = tmp_path / "ab"
    run_merge(
        MergeConfig(
            models=("org/a", "org/b"),
            base="org/base",
            scale=(1.0, -0.5),
            weights="precision",
            out=str(out),
        )
    )
    return out


def front(card):
    """The front matter of a card."""
    return yaml.safe_load(card.split("---\n")[1])


def peft_adapter(path):
    """An adapter with the README that PEFT itself writes beside it."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import tiny_gpt2

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2(path.parent / "under"))
    get_peft_model(
        model, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    ).save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/base"})
    )
    return path
