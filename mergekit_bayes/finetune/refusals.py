"""Settings, launchers and models that a fine-tune refuses.

`refuse_before` comes before anything is loaded and `refuse_after` as soon as the model is there.
The other two need what exists only later: the process group and transformers' accelerator.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.errors import ConfigError, did_you_mean
from mergekit_bayes.finetune.fsdp import is_asked, is_on, refuse_coded, refuse_shards
from mergekit_bayes.finetune.rates import refuse_rate
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.load import Loaded, other_head

if TYPE_CHECKING:
    from accelerate import Accelerator

# Schedules of transformers that follow the held-out loss, and those that need further numbers.
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")
_INCOMPLETE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
# Below it the ess that keeps the first noise quiet, and so the prior, leaves float32.
_LEAST_DECAY = 1e-20
_ONLY_REPLICAS = (
    "this command trains replicas (--num-processes N, or accelerate launch --multi_gpu). "
    "Sharded training is that of bmerge finetune"
)
_SHARDS = (
    "Train on shards by FSDP2 instead (shard: true, or accelerate launch --use_fsdp --fsdp_version "
    "2), or replicas (--num-processes N, or accelerate launch --multi_gpu)"
)
_NO_FP16 = (
    "fp16 with a gradient scaler is switched on (by the launcher, if not by the settings), and "
    "IVON takes its gradients before they are unscaled. Use bf16 (bf16: true, or "
    "--mixed_precision bf16), or no mixed precision."
)
_NO_SHARDING = {
    "DeepSpeed": "DeepSpeed keeps flat copies of the weights, so that IVON would perturb weights "
    "that no forward pass reads",
    "FSDP1": "FSDP1 keeps flat views of the weights, which have no names under which a posterior "
    "could be stored",
    "FSDP2": "its plugin has been set up beside this command, which shards the model itself",
}


def refuse_before(config: FinetuneConfig) -> None:
    """Refuse settings and launchers, before anything is loaded.

    Raises:
        ConfigError: Settings that contradict each other, an unknown scheduler, a learning rate in
            IVON's own unit, or something that the launcher has switched on and a fine-tune cannot
            do.
    """
    _refuse_settings(config)
    refuse_rate(config)
    refuse_launcher(config)
    if config.shard:
        refuse_shards(config, os.environ)


def refuse_after(config: FinetuneConfig, loaded: Loaded) -> None:
    """Refuse models, once they are loaded and have their adapter.

    Raises:
        ConfigError: A classifier with another loss, or quantised weights that would be trained.
    """
    _refuse_other_heads(loaded, config.model)
    refuse_quantised(loaded.model, config.model)
    if config.shard:
        refuse_coded(loaded, config.model)


def refuse_launcher(config: FinetuneConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what a launcher has switched on by its environment variables.

    Raises:
        ConfigError: DeepSpeed, FSDP1, or FSDP2 for a run that does not train on shards; fp16 with
            IVON.
    """
    if is_on("ACCELERATE_USE_DEEPSPEED", environment):
        raise _sharding_error("DeepSpeed")
    if is_asked(environment):
        if not config.shard:
            raise ConfigError(f"FSDP2 is switched on by the launcher: {_ONLY_REPLICAS}.")
    elif is_on("ACCELERATE_USE_FSDP", environment):
        raise _sharding_error("FSDP1")
    if config.optimizer == "ivon" and environment.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise ConfigError(_NO_FP16)


def refuse_accelerator(accelerator: "Accelerator", *, ivon: bool) -> None:
    """Refuse the same once more, whichever way it was switched on.

    Raises:
        ConfigError: DeepSpeed or FSDP; a gradient scaler with IVON.
    """
    backend = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if backend == "DEEPSPEED":
        raise _sharding_error("DeepSpeed")
    if backend == "FSDP":
        raise _sharding_error("FSDP2" if getattr(accelerator, "is_fsdp2", False) else "FSDP1")
    if ivon and accelerator.scaler is not None:
        raise ConfigError(_NO_FP16)


def refuse_quantised(model: torch.nn.Module, name: str) -> None:
    """Refuse to train quantised weights; below an adapter they are frozen and may stay.

    Args:
        model: The model, with its adapter if there is one.
        name: How the user named it.

    Raises:
        ConfigError: A quantised weight would be trained.
    """
    is_quantised = bool(getattr(model, "is_quantized", False)) and not hasattr(model, "peft_config")
    for parameter_name, parameter in model.named_parameters():
        is_coded = not parameter.is_floating_point() or parameter.dtype.itemsize == 1
        if is_coded and (is_quantised or parameter.requires_grad):
            raise ConfigError(
                f"'{name}' is quantised ('{parameter_name}' is "
                f"{str(parameter.dtype).removeprefix('torch.')}), and a quantised weight has no "
                "gradient step. Train an adapter on it (lora: {r: 8}), or start from its "
                "unquantised checkpoint."
            )
    if is_quantised:
        raise ConfigError(
            f"'{name}' is quantised, and quantised weights have no gradient step. Train an adapter "
            "on it (lora: {r: 8}), or start from its unquantised checkpoint."
        )


def _refuse_settings(config: FinetuneConfig) -> None:
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
    if (
        config.optimizer == "ivon"
        and config.curvature == "ggn"
        and config.weight_decay < _LEAST_DECAY
    ):
        raise ConfigError(
            "curvature: ggn needs weight_decay > 0, at least 1e-20, or entries without curvature "
            "have no precision. Give one (1e-6), or curvature: price."
        )
    if config.damping and (config.optimizer, config.curvature) != ("ivon", "ggn"):
        raise ConfigError(
            f"damping: {config.damping:g} is of optimizer: ivon with curvature: ggn. Leave it out."
        )
    if config.resume and config.save_steps is None:
        raise ConfigError(
            "resume: checkpoints are kept only with save_steps; give the save_steps of the first "
            "run."
        )
    _refuse_evaluation(config)
    schedulers = [s.value for s in SchedulerType if s.value not in _INCOMPLETE]
    if config.scheduler in _INCOMPLETE:
        raise ConfigError(
            f"scheduler: {config.scheduler} needs numbers of its own, for which there is no "
            f"setting; take one of {', '.join(schedulers)}."
        )
    if config.scheduler in _FOLLOWING and config.eval_data is None:
        raise ConfigError(
            f"scheduler: {config.scheduler} follows the loss on held-out rows: name them by "
            "eval_data, or take another schedule."
        )
    if config.scheduler not in schedulers:
        hint = did_you_mean(config.scheduler, schedulers) or f"one of {', '.join(schedulers)}."
        raise ConfigError(f"scheduler: transformers knows no '{config.scheduler}'; {hint}")


def _refuse_evaluation(config: FinetuneConfig) -> None:
    if config.eval_data is None:
        for name in ("eval_steps", "load_best", "patience"):
            if getattr(config, name):
                raise ConfigError(f"{name} needs held-out rows: name them by eval_data.")
    if config.load_best and config.save_steps is None:
        raise ConfigError("load_best chooses among checkpoints: give save_steps.")
    if config.load_best and config.evaluates_every != config.save_steps:
        raise ConfigError(
            f"load_best: each checkpoint needs its loss and each loss its checkpoint, but "
            f"eval_steps is {config.eval_steps} and save_steps {config.save_steps}. Leave "
            "eval_steps out."
        )


def _refuse_other_heads(loaded: Loaded, name: str) -> None:
    """Refuse a classifier whose own loss is not the softmax cross-entropy that is trained here."""
    if head := other_head(loaded):
        raise ConfigError(
            f"'{name}' is a classifier with {head}; bmerge finetune trains one label out of two or "
            "more. Use such a base, or give num_labels and a base without a head."
        )


def _sharding_error(backend: str) -> ConfigError:
    return ConfigError(
        f"{backend} is switched on by the launcher: {_NO_SHARDING[backend]}. {_SHARDS}."
    )
