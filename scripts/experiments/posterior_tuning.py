"""Sections of `posterior_quality` that run `bmerge finetune`: its defaults, one setting off."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from posterior_problems import DATA, is_dense, losses, sentences, tiny_base
from posterior_runs import agreement
from torch import Tensor

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.posterior import open_posterior

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_tiny_lm import train_tokenizer

Records = list[dict[str, Any]]


def finetune(seed: int, folder: Path) -> Records:
    """`bmerge finetune` at its defaults beside AdamW at its defaults, on two tasks."""
    optimizers: dict[str, dict[str, Any]] = {
        "AdamW": {"optimizer": "adamw"},
        "IVON price, our defaults": {"curvature": "price"},
        "IVON ggn, our defaults": {"curvature": "ggn"},
    }
    rates = {  # whether the difference is one of the rate
        "AdamW, rate x 3": {"optimizer": "adamw", "learning_rate": 3e-4},
        "IVON ggn, our defaults, rate / 3": {"curvature": "ggn", "learning_rate": 1e-4 / 3},
    }
    records = []
    for task, (start, data, test, more) in tuning_tasks(seed, folder).items():
        for lora in (None, {"r": 8}):
            for name, settings in (optimizers if lora else {**optimizers, **rates}).items():
                begun = time.process_time()
                config = FinetuneConfig(
                    model=str(start),
                    output=str(folder / "tuned"),
                    data=str(data),
                    seed=seed,
                    batch_size=16,
                    max_steps=240,
                    lora=lora,
                    force=True,
                    logging_steps=10_000,
                    **more,
                    **settings,
                )
                run_finetune(config, quiet=True)
                seconds = time.process_time() - begun
                scores = held_out(folder / "tuned", test)
                records.append(
                    {
                        "section": "finetune",
                        "task": f"{task}, {'LoRA' if lora else 'full'}",
                        "method": name,
                        "seed": seed,
                        **scores,
                        "seconds": seconds,
                    }
                )
    return records


WRONG: dict[str, dict[str, Any]] = {
    "AdamW": {"learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]},
    "price": {
        "": [None],
        "learning_rate": [1e-5, 1e-3, 1e-2],
        "ess": [1e4, 1e5, 1e6, 1e7, 1e9, 1e10],
        "hess_init at ess 1e7": [1e-4, 1e-3, 0.1, 1.0],
        "beta2": [0.9, 0.99, 0.999, 0.99999],
        "antithetic": [True],
    },
    "ggn": {
        "curvature_every": [8, 1],
        "learning_rate": [1e-3],
        "ess": [1e6, 1e14],
        "weight_decay": [1e-4, 1e-9],
    },
}
WRONG_LORA: dict[str, dict[str, Any]] = {
    "AdamW": {"learning_rate": [1e-4, 1e-3, 1e-2]},
    "price": {
        "": [None],
        "learning_rate": [3e-5, 1e-4, 3e-4, 3e-3],
        "ess": [1e4, 1e5, 1e6, 1e8],
        "hess_init at ess 1e7": [1e-3],
        "beta2": [0.99999],
    },
    "ggn": {"curvature_every": [8]},
}


def wrong(seed: int, folder: Path) -> Records:
    """A short fine-tune, 120 steps of 16 rows, with one setting changed at a time.

    The curvature is compared in the matrices of the layers.
    """
    start, texts = tiny_base(folder / f"world{seed}", seed), folder / f"world{seed}" / "texts"
    records: Records = [
        {
            "section": "wrong",
            "task": "",
            "method": "before training",
            "changed": "",
            "seed": seed,
            **held_out(start, texts / "garden_test.jsonl"),
            "seconds": 0.0,
        }
    ]
    for trained, lora, optimizers in (("full", None, WRONG), ("LoRA", {"r": 8}, WRONG_LORA)):
        for optimizer, changes in optimizers.items():
            for name, value in ((n, v) for n, values in changes.items() for v in values):
                begun = time.process_time()
                key, _, at = name.partition(" at ess ")
                settings = {} if value is None else {key: value}
                settings |= (
                    {"optimizer": "adamw"} if optimizer == "AdamW" else {"curvature": optimizer}
                )
                settings |= {"ess": float(at)} if at else {}
                config = FinetuneConfig(
                    model=str(start),
                    output=str(folder / "tuned"),
                    data=str(texts / "garden_train.jsonl"),
                    lora=lora,
                    batch_size=16,
                    max_steps=120,
                    seed=seed,
                    force=True,
                    logging_steps=10_000,
                    **settings,
                )
                record = {
                    "section": "wrong",
                    "task": trained,
                    "method": optimizer,
                    "changed": f"{name} {value}",
                    "seed": seed,
                }
                if optimizer == "AdamW":
                    run_finetune(config.model_copy(update={"posterior": "none"}), quiet=True)
                else:
                    # The seed is the same, and so are the weights.
                    flushed = curvature(run_finetune(config, quiet=True))
                    report = run_finetune(
                        config.model_copy(update={"posterior": "ivon"}), quiet=True
                    )
                    record |= {
                        "noise": report.health["sigma_over_rms"],
                        **({"kappa": report.health["kappa"]} if optimizer == "price" else {}),
                        **agreement(curvature(report), flushed),
                    }
                records.append(
                    {
                        **record,
                        **held_out(folder / "tuned", texts / "garden_test.jsonl"),
                        "seconds": time.process_time() - begun,
                    }
                )
    return records


def curvature(report: Any) -> Tensor:
    """The curvature of an observation that a fine-tune stored, in the matrices of the layers."""
    with open_posterior(str(report.path)) as posterior:
        precision, info = posterior.precision, posterior.info
        assert precision is not None
        assert info is not None
        stored = [
            torch.from_numpy(read_tensor(precision, name)).double().flatten()
            for name in precision.specs
            if is_dense(name) or "lora" in name
        ]
    return (torch.cat(stored) - float(info.prior.precision or 0.0)) / info.ess


def tuning_tasks(seed: int, folder: Path) -> dict[str, tuple[Path, Path, Path, dict[str, Any]]]:
    """Start, training data, held-out data and settings of each task."""
    world = folder / f"world{seed}"
    texts = world / "texts"
    tasks = {
        "lm": (
            tiny_base(world, seed),
            texts / "garden_train.jsonl",
            texts / "garden_test.jsonl",
            {},
        )
    }
    if not DATA.exists():
        return tasks
    start, yelp = folder / f"encoder{seed}", DATA / "yelp"
    common = {"task": "classification", "seed": seed, "max_length": 48, "force": True}
    seen = sentences("sst2/train.jsonl.gz", 6000)[0] + sentences("yelp/train.jsonl.gz", 4000)[0]
    tokenizer = train_tokenizer(seen, 2000, words=True)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=2000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    taught = FinetuneConfig(
        model=str(start),
        output=str(folder / f"taught{seed}"),
        data=str(DATA / "sst2/train.jsonl.gz"),
        optimizer="adamw",
        learning_rate=1e-3,
        batch_size=32,
        max_steps=400,
        posterior="none",
        **common,
    )
    run_finetune(taught, quiet=True)
    more = {**common, "max_rows": 4000}
    del more["seed"], more["force"]
    tasks["classifier"] = (
        folder / f"taught{seed}",
        yelp / "train.jsonl.gz",
        yelp / "test.jsonl.gz",
        more,
    )
    return tasks


@torch.no_grad()
def held_out(folder: Path, test: Path) -> dict[str, float]:
    """Held-out loss, and the accuracy of a classifier."""
    loaded = load_model(str(folder))
    label = "label" if loaded.task == "classification" else None
    examples = encode_rows(load_rows(str(test), max_rows=2000), loaded, label=label)
    rows_losses, right = [], []
    for rows in batches(examples, 100, Collate(loaded.pad)):
        rows_losses.append(losses(loaded.model, rows))
        if label:
            right.append(loaded.model(**rows).logits.argmax(-1) == rows["labels"])
    scores = {"loss": float(torch.cat(rows_losses).mean())}
    return {**scores, "accuracy": float(torch.cat(right).double().mean())} if label else scores
