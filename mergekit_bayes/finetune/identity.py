"""What decides the bits of a training run, and whether a run may continue from a checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.rates import in_present_unit
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.lora import INITIAL_A
from mergekit_bayes.posterior import Identity

# Settings that may change between a run and its continuation: where things are, and what happens
# after training. The model and the data are compared by their content.
_FREE = {
    "trust_remote_code",
    "output",
    "model",
    "data",
    "resume",
    "force",
    "report_to",
    "keep_checkpoints",
    "num_processes",
    "shard",  # added below where there are shards: older checkpoints do not name it
    "posterior",
    "flush_batches",
    "text_column",
    "messages_column",
    "prompt_column",
    "completion_column",
    "chat_template",
}

# Settings that earlier versions did not have, and how these trained.
_NEW = {"load_best": False, "gradient_checkpointing": False, "torch_compile": False}


def identity_of(
    config: FinetuneConfig,
    choices: Mapping[str, str | float],
    base: Identity | None,
    examples: Sequence[Mapping[str, object]],
    held_out: Sequence[Mapping[str, object]] = (),
) -> dict[str, object]:
    """All that decides the bits of a training run, as JSON values.

    Args:
        config: Settings as given; those that change no bits are left out.
        choices: Settings as chosen, which stand in for those that were not given.
        base: Content hash of the model, which replaces its name.
        examples: Training data, of which the hash is kept.
        held_out: Held-out data, likewise.
    """
    settings: dict[str, object] = {
        name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE
    }
    settings |= {name: value for name, value in choices.items() if settings.get(name) is None}
    if config.shard:
        settings["shard"] = True
    settings |= {
        "model": base.blocks if base is not None else config.model,
        "data": digest(examples),
    }
    if held_out:
        settings["eval_data"] = digest(held_out)
    return settings


def refuse_other_settings(checkpoint: Checkpoint, identity: Mapping[str, object]) -> None:
    """Refuse to continue from a checkpoint of another run.

    Raises:
        ConfigError: Names every setting in which the checkpoint differs from this run.
    """
    stored = _as_today(checkpoint.settings, identity)
    lines = []
    for name in sorted(set(stored) | set(identity)):
        if stored.get(name) != identity.get(name):
            if name in ("model", "data", "eval_data", "held", "prompts"):
                lines.append(f"{name} holds something else")
            elif name == INITIAL_A:  # a hash, which says nothing to anyone
                lines.append("the adapter starts from other factors")
            else:
                there, here = _said(stored.get(name)), _said(identity.get(name))
                lines.append(f"{name} is {there} there and {here} here")
    if lines:
        raise ConfigError(
            f"'{checkpoint.path}' belongs to a run with other settings: {'; '.join(lines)}. Resume "
            "with the settings of the checkpoint, or leave --resume out and start from the "
            "beginning with --force."
        )


def _as_today(settings: Mapping[str, Any], identity: Mapping[str, object]) -> dict[str, Any]:
    """The settings of a checkpoint, which an earlier version may have written."""
    stored = in_present_unit(settings)
    compared = {n: v for n, v in stored.items() if n not in _FREE or n in identity}
    if compared.get("pack") is True:
        compared["pack"] = "joined"  # as it is named now
    new: dict[str, Any] = {name: value for name, value in _NEW.items() if name in identity}
    if identity.get("damping") is not None:  # left out where the optimizer has none
        new["damping"] = 0.0
    return new | compared


def _said(value: object) -> str:
    """A setting as its YAML file says it."""
    if value is None:
        return "left out"
    return str(value).lower() if isinstance(value, bool) else str(value)


def digest(examples: Sequence[Mapping[str, object]]) -> str:
    """SHA-256 of encoded examples, in order."""
    content = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            values = np.atleast_1d(np.asarray(example[name], dtype=np.int64))
            content.update(f"{name} {len(values)} ".encode())
            content.update(values.tobytes())
    return content.hexdigest()
