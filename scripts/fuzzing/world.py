"""The small world that `scripts/fuzz.py` breaks: models, texts and settings."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import yaml

from scripts.fuzzing.lines import Line

OUTSIDE = "outside"
CANARY = "canary-7f3a91c4-nothing-may-hold-this"
WORDS = ("the", "cat", "dog", "sat", "on", "good", "bad", "film", "was", "dull", "nice", "and")
CARD = """---
license: apache-2.0
base_model: org/base
tags: [merge, test]
model-index:
- name: a
  results: []
---
# A model

Some text.
"""


def make_world(root: Path) -> None:
    """Write all models, texts and settings below a folder."""
    root.mkdir(parents=True)
    with contextlib.chdir(root):
        make_outside(root.parent / OUTSIDE)
        _write_texts()
        _write_models()
        _write_pickles()
        _write_settings()
        _write_results()


def make_outside(folder: Path) -> None:
    """Write, anew, what links out of a model lead to and no line may show, copy or change."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "secrets").mkdir(parents=True)
    for name in ("key", "secrets/id_rsa"):
        folder.joinpath(name).write_text(CANARY)
    folder.joinpath("secrets/config.json").write_text(json.dumps({"secret": CANARY}))


def _write_texts() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(12)]
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(texts)]
    for name in ("rows.jsonl", "labelled.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rows.csv").write_text(
        "text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(texts))
    )
    Path("rows.txt").write_text("\n".join(texts) + "\n")
    Path("words.txt").write_text("bad\ndull\n")
    import pyarrow
    import pyarrow.parquet

    Path("texts").mkdir()
    shutil.copy("rows.jsonl", "texts/rows.jsonl")
    card = {"configs": [{"config_name": "default", "data_files": "rows.jsonl"}]}
    Path("texts/README.md").write_text(f"---\n{yaml.safe_dump(card)}---\nTexts.\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "rows.parquet")


def _write_models() -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import tiny_bert, tiny_gpt2

    tiny_gpt2("base", width=8, layers=1, context=16)
    tiny_bert("classifier")
    for seed, name in enumerate(("base", "a", "b")):
        folder = Path(name)
        if name != "base":
            shutil.copytree("base", name)
            model = transformers.AutoModelForCausalLM.from_pretrained("base")
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
            model.save_pretrained(name)
        _add_side_files(folder)
    for seed, name in enumerate(("base", "a", "b")):
        _add_posterior(Path(name), seed)
    for name in ("a", "b"):
        shutil.copy(f"{name}/model.safetensors", f"{name}.safetensors")
        _add_posterior(Path(f"{name}.safetensors"), 1)
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    model.save_pretrained("sharded", max_shard_size="4KB")
    _add_posterior(Path("sharded"), 3)
    for seed, name in enumerate(("adapter", "other-adapter")):
        base = transformers.AutoModelForCausalLM.from_pretrained("base")
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
        adapted = get_peft_model(base, lora)
        torch.manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        adapted.save_pretrained(name)
        _add_posterior(Path(name), seed)


def _add_side_files(folder: Path) -> None:
    folder.joinpath("README.md").write_text(CARD)
    folder.joinpath("LICENSE").write_text("Apache License\n")
    folder.joinpath("chat_template.jinja").write_text("{{ messages }}")
    folder.joinpath("special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    folder.joinpath("evaluation.json").write_text('{"model": "a"}')
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def _add_posterior(path: Path, seed: int) -> None:
    from mergekit_bayes.checkpoint.layout import checkpoint_files
    from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
    from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, save_posterior

    source = SafetensorsSource(checkpoint_files(path))
    rng = np.random.default_rng(seed)
    precision = {
        name: np.exp(rng.uniform(-2, 2, spec.shape)).astype(np.float32)
        for name, spec in source.specs.items()
    }
    prior = Prior(kind="isotropic", precision=0.05)
    info = PosteriorInfo(
        estimator="ggn",
        unit="token",
        observations=100.0,
        ess=100.0,
        prior=prior,
        mean=identify(source),
        training={"steps": 3},
        health={"precision_median": 1.0},
    )
    save_posterior(path, precision, info)
    source.close()


def _write_pickles() -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file("base/model.safetensors")
    for name in ("pickled", "pickled-shards"):
        shutil.copytree("base", name)
        (Path(name) / "model.safetensors").unlink()
        shutil.rmtree(Path(name) / "posterior")
    torch.save(tensors, "pickled/pytorch_model.bin")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, f"pickled-shards/{file}")
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    Path("pickled-shards/pytorch_model.bin.index.json").write_text(json.dumps(content))


def _write_settings() -> None:
    short = {"batch_size": 2, "max_steps": 1, "flush_batches": 1}
    finetune = {"model": "a", "data": "rows.jsonl", "output": "out", **short, "save_steps": 1}
    finetune |= {"max_length": 8, "keep_checkpoints": True, "max_steps": 2}
    Path("finetune.yaml").write_text(yaml.safe_dump(finetune))
    labels = {"model": "classifier", "data": "labelled.jsonl", "output": "out", **short}
    Path("labels.yaml").write_text(yaml.safe_dump(labels))
    detox = {
        "base": "base",
        "output": "removed",
        "toxic": {"data": "rows.jsonl"},
        "finetune": short,
        "precision": {"data": "rows.jsonl", "examples": 4},
        "evaluate": {
            "perplexity": {"rows": "rows.jsonl"},
            "toxicity": "rows.jsonl",
            "scorer": ["words:words.txt"],
            "continuations": 2,
            "new_tokens": 3,
            "bootstrap": 20,
        },
        "scales": [0.5],
        "extra_scales": 0,
    }
    Path("detox.yaml").write_text(yaml.safe_dump(detox))


def _write_results() -> None:
    """What commands have written: merges, whole and stopped, checkpoints, and a removal's steps."""
    from mergekit_bayes.detox import DetoxConfig, run_detox
    from mergekit_bayes.finetune.run import run_finetune
    from mergekit_bayes.finetune.settings import FinetuneConfig
    from mergekit_bayes.merge import MergeConfig, Part, carry_out, plan_merge, run_merge

    config = MergeConfig(models=("a", "b"), weights="precision", out="merged")
    run_merge(config)
    _add_side_files(Path("merged"))
    shutil.copy("merged/merge_recipe.yaml", "recipe.yaml")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (
        contextlib.suppress(KeyboardInterrupt),
        plan_merge(config.model_copy(update={"out": "out"})) as plan,
    ):
        carry_out(plan, progress=stop, threads=1)
    with plan_merge(MergeConfig(models=("a", "b"), out="joined")) as plan:
        carry_out(plan, part=Part(1, 2))
    run_finetune(FinetuneConfig(**yaml.safe_load(Path("finetune.yaml").read_text())), quiet=True)
    Path("out").rename("tuned")
    shutil.rmtree("out.checkpoints/checkpoint-2")
    run_detox(DetoxConfig(**yaml.safe_load(Path("detox.yaml").read_text())), quiet=True)


def fresh(world: Path, line: Line, folder: Path) -> None:
    """Copy what a line needs of the world into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in line.needs:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (world / name).is_dir():
            shutil.copytree(world / name, target, symlinks=True)
        else:
            shutil.copy2(world / name, target)
