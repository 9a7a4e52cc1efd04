"""A Hub on the loopback interface and a merged folder to push to it."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from mergekit_bayes.merge import MergeConfig, run_merge
from tests import hub_double
from tests.test_hub import files, folder

RUN = CliRunner()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_double.serving() as server:
        hub_double.use(server, monkeypatch, tmp_path / "home")
        yield server


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
