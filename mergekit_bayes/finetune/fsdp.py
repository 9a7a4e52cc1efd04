"""Whether a run trains on shards (FSDP2), by its own setting or because a launcher says so.

`accelerate launch --use_fsdp` tells its processes by environment variables. The run shards the
model itself, as it is loaded (`models.sharding`), and transformers' Trainer then leaves it as it
is; so accelerate is not told, whose own way takes whole weights into every process.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.ranks import launched

_SWITCH = "ACCELERATE_USE_FSDP"
_DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
# What else accelerate's launcher can ask of FSDP2, and what to do in its place.
_OTHERS = {
    "FSDP_OFFLOAD_PARAMS": (
        "--fsdp_offload_params: the optimizer's state lies with its weights. Start more processes"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "--fsdp_activation_checkpointing wraps the blocks, whose names are stored. Leave it out"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism config: every process has rows of every tensor. Leave it out"
    ),
}


def is_on(name: str, environment: Mapping[str, str]) -> bool:
    """Whether a variable switches something on, as accelerate reads it."""
    return environment.get(name, "false").lower() in ("1", "true", "yes", "y", "on")


def is_asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher asks for FSDP2."""
    return is_on(_SWITCH, environment) and environment.get("FSDP_VERSION", "1") == "2"


def as_launched(config: FinetuneConfig) -> FinetuneConfig:
    """The settings, with the shards that a launcher asks for."""
    return config.model_copy(update={"shard": True}) if is_asked() else config


@contextmanager
def without_plugin() -> Iterator[None]:
    """Inside, accelerate and transformers do not know that a launcher asks for FSDP2."""
    before = os.environ.pop(_SWITCH, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_SWITCH] = before


def refuse_shards(config: FinetuneConfig, environment: Mapping[str, str]) -> None:
    """Refuse shards where there is nothing to shard over, and settings that they exclude.

    Raises:
        ConfigError: There is one process or no GPU; `rank_noise` or `torch_compile`; or the
            launcher asks for more than shards.
    """
    if not has_devices():
        raise ConfigError(
            "shard: this machine has no GPU to shard over, and each process takes one. Leave shard "
            "out: one process on the CPU needs no more memory than all shards together."
        )
    if not launched():
        raise ConfigError(
            "shard: there is one process, which would keep everything. Start several with "
            "--num-processes N, or with accelerate launch --use_fsdp --fsdp_version 2."
        )
    if config.rank_noise:
        raise ConfigError(
            "rank_noise: of a sharded model all processes see one sample of the weights. Leave "
            "rank_noise or shard out."
        )
    if config.torch_compile or (environment.get(_DYNAMO) or "no").lower() != "no":
        raise ConfigError(
            "torch_compile: a sharded model is not compiled, since its samples were not tested "
            "there. Leave torch_compile (or the launcher's --dynamo_backend) or shard out."
        )
    for name, problem in _OTHERS.items():
        if is_on(name, environment):
            raise ConfigError(f"shard: the launcher asks for {problem}.")


def has_devices() -> bool:
    """Whether this machine has devices to shard over."""
    return torch.cuda.is_available()


def refuse_coded(loaded: Loaded, name: str) -> None:
    """Refuse to shard quantised weights, whose codes do not lie in rows.

    Raises:
        ConfigError: The model holds some.
    """
    for parameter_name, parameter in loaded.model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise ConfigError(
                f"shard: '{name}' is quantised ('{parameter_name}' is "
                f"{str(parameter.dtype).removeprefix('torch.')}), and quantised weights are not "
                "sharded. Train replicas of it (leave shard out), or shard its unquantised "
                "checkpoint."
            )
