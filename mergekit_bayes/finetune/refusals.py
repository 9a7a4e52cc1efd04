"""Settings, launchers and models that a fine-tune refuses."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.load import Loaded, other_head


def refuse_settings(config: FinetuneConfig) -> None:
    from transformers import SchedulerType

    if config.posterior == "ivon" and config.optimizer != "ivon":
        raise ConfigError(
            "posterior: ivon needs optimizer: ivon; AdamW leaves none. Use posterior: flush."
        )
    if config.antithetic and config.mc_samples > 1 and config.mc_samples % 2:
        raise ConfigError(
            f"mc_samples: {config.mc_samples} samples do not make antithetic pairs; give an even "
            "number."
        )
    if config.optimizer == "ivon" and config.curvature == "ggn" and not config.weight_decay:
        raise ConfigError(
            "curvature: ggn needs weight_decay > 0, or entries without curvature have no "
            "precision. Give one (1e-6), "
            "or curvature: price."
        )
    if config.resume and config.save_steps is None:
        raise ConfigError(
            "resume: checkpoints are kept only with save_steps; give the save_steps of the first "
            "run."
        )
    known = [kind.value for kind in SchedulerType]
    if config.scheduler not in known:
        close = difflib.get_close_matches(config.scheduler, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(known)}."
        raise ConfigError(f"scheduler: transformers knows no '{config.scheduler}'; {hint}")


_REPLICAS = "Train replicas instead (--num-processes N, or accelerate launch --multi_gpu)"


def refuse_launcher(config: FinetuneConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raise a `ConfigError` for what a launcher has switched on and this cannot do, before anything
    is loaded.
    """

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("1", "true", "yes", "y", "on")

    if on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(_no_sharding("DeepSpeed"))
    if on("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            _no_sharding("FSDP2" if environment.get("FSDP_VERSION", "1") == "2" else "FSDP1")
        )
    if config.optimizer == "ivon" and environment.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise ConfigError(_NO_FP16)


def refuse_accelerator(accelerator: Any, *, ivon: bool) -> None:
    """The same, asked of the accelerator itself, which knows of every other way in which it can be
    switched on.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "DEEPSPEED":
        raise ConfigError(_no_sharding("DeepSpeed"))
    if kind == "FSDP":
        raise ConfigError(
            _no_sharding("FSDP2" if getattr(accelerator, "is_fsdp2", False) else "FSDP1")
        )
    if ivon and accelerator.scaler is not None:
        raise ConfigError(_NO_FP16)


def refuse_other_heads(loaded: Loaded, name: str) -> None:
    """Raise a `ConfigError` for a classifier whose own loss is not the softmax cross-entropy that
    is trained here.
    """
    if other := other_head(loaded):
        raise ConfigError(
            f"'{name}' is a classifier with {other}; bmerge finetune trains one label out of two "
            "or more. Take such a "
            "base, or give num_labels and a base without a head."
        )


def refuse_quantised(model: Any, name: str) -> None:
    """Raise a `ConfigError` if quantised weights themselves would be trained; under an adapter they
    are frozen.
    """
    whole = bool(getattr(model, "is_quantized", False)) and not hasattr(model, "peft_config")
    for parameter_name, parameter in model.named_parameters():
        quantised = not parameter.is_floating_point() or parameter.dtype.itemsize == 1
        if quantised and (whole or parameter.requires_grad):
            raise ConfigError(
                f"'{name}' is quantised ('{parameter_name}' is "
                f"{str(parameter.dtype).removeprefix('torch.')}), and a "
                "quantised weight has no gradient step. Train an adapter on it (lora: {r: 8}), or "
                "start from its "
                "unquantised checkpoint."
            )
    if whole:
        raise ConfigError(
            f"'{name}' is quantised, and quantised weights have no gradient step. Train an adapter "
            "on it "
            "(lora: {r: 8}), or start from its unquantised checkpoint."
        )


_NO_FP16 = (
    "fp16 with a gradient scaler is switched on (by the launcher, if not by the settings), and "
    "IVON takes its "
    "gradients before they are unscaled. Use bf16 (bf16: true, or --mixed_precision bf16), or no "
    "mixed precision."
)


def _no_sharding(what: str) -> str:
    if what == "DeepSpeed":
        why = "DeepSpeed keeps flat copies of the weights, so that IVON would perturb what no forward pass reads"
    elif what == "FSDP1":
        why = "FSDP1 keeps flat views of the weights, which have no names that a posterior could be stored under"
    else:
        why = (
            "under FSDP2 bmerge finetune cannot yet write its model and posterior from shards (the "
            "optimizer itself "
            "works on fully_shard, in a script of one's own)"
        )
    return f"{what} is switched on by the launcher: {why}. {_REPLICAS}."
