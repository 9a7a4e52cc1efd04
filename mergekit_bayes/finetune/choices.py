"""Settings that a fine-tune chooses itself: learning rate, steps, warm-up, noise."""

import math
from collections.abc import Mapping
from typing import Any

from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.lora import INITIAL_A, initial_identity
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.load import UNIT, Loaded

# sigma at the start, as a share of the typical weight, where `ess` is left out.
_NOISE = 0.05


def learning_rate(config: FinetuneConfig) -> float:
    """The rate at the start, or its default for the optimizer and what is trained."""
    if config.learning_rate is not None:
        return config.learning_rate
    return (0.1 if config.optimizer == "ivon" else 1e-4) * (1 if config.lora is None else 10)


def run_settings(
    config: FinetuneConfig, arguments: Any, loaded: Loaded, examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the optimizer is given, with what was left out chosen from model, data and run length.

    `batch_size` is observations that enter a step, over micro-batches and ranks; `steps` counts
    ragged epochs.
    """
    ivon = config.optimizer == "ivon"
    per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
    micro_batches = math.ceil(len(examples) / (config.batch_size * arguments.world_size))
    per_epoch = math.ceil(micro_batches / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    total = observations(examples, loaded.task)
    settings: dict[str, Any] = {
        "optimizer": config.optimizer,
        "lr": learning_rate(config),
        "weight_decay": config.weight_decay,
        "scheduler": config.scheduler,
        "steps": steps,
        "batch_size": total / len(examples) * per_step,
        "processes": arguments.world_size,
        "loss_reduction": f"mean over {UNIT[loaded.task]}s of a step",
    }
    if config.lora is not None:
        starts = {
            n: p.detach().float().cpu().numpy()
            for n, p in loaded.model.named_parameters()
            if ".lora_A." in n
        }
        settings[INITIAL_A] = initial_identity(starts)
    if ivon:
        ggn = config.curvature == "ggn"
        # The least curvature that an entry starts from; under ggn an entry that no output depends
        # on keeps it.
        floor = config.weight_decay if ggn else config.hess_init
        memory = 5 * (config.curvature_every if ggn else 1) / steps
        settings |= {
            "ess": config.ess or max(float(total), _quiet_ess(loaded.model, floor)),
            "hess_init": config.hess_init,
            "beta1": config.beta1,
            "beta2": config.beta2
            if config.beta2 is not None
            else min(0.99999, max(0.5 if ggn else 0.9, 1 - memory)),
            "clip_radius": config.clip_radius,
            "rescale_lr": config.rescale_lr,
            "mc_samples": max(2, config.mc_samples) if config.antithetic else config.mc_samples,
            "antithetic": config.antithetic,
            "rank_noise": config.rank_noise,
            "curvature": config.curvature,
            "curvature_every": config.curvature_every,
        }
    return settings


def chosen(settings: Mapping[str, Any], unit: str) -> str:
    """The settings of a run in a line, those that were left out included."""
    line = f"{settings['steps']:,} steps of {settings['batch_size']:,.0f} {unit}s, {settings['optimizer']}: "
    line += f"lr {settings['lr']:g}, weight_decay {settings['weight_decay']:g}"
    if settings["optimizer"] != "ivon":
        return line
    line += f", clip_radius {settings['clip_radius']:g}, ess {settings['ess']:.3g}, beta2 {settings['beta2']:.6g}"
    if settings["curvature"] == "ggn":
        return f"{line}, curvature ggn every {settings['curvature_every']} steps"
    samples = f", {settings['mc_samples']} samples" if settings["mc_samples"] > 1 else ""
    return f"{line}, curvature price, hess_init {settings['hess_init']:g}{samples}"


def _quiet_ess(model: Any, curvature: float) -> float:
    """The ess at which the first noise is `_NOISE` of the median weight matrix' root mean square."""
    sizes = [
        float(p.detach().float().square().mean().sqrt())
        for p in model.parameters()
        if p.requires_grad and p.ndim > 1
    ]
    rms = sorted(s for s in sizes if s > 0)
    if not rms:
        return 0.0
    return float(1 / (curvature * (_NOISE * rms[len(rms) // 2]) ** 2))
