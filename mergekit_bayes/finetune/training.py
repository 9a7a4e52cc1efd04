"""The Trainer of a fine-tune: its arguments, its loss, its log, and what it refuses."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.checkpoints import mark_whole
from mergekit_bayes.finetune.health import LOGGED, Watch
from mergekit_bayes.finetune.ranks import mean_over_ranks
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.lora import INITIAL_A, initial_identity
from mergekit_bayes.models import UNIT, Collate, Loaded, observations, other_head
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, classification_loss, unwrap

# sigma at the start, as a share of the typical weight, where `ess` is left out.
_NOISE = 0.05
_IVON = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "rescale_lr", "mc_samples",
         "antithetic", "rank_noise", "curvature", "curvature_every")  # fmt: skip
_REPLICAS = "Train replicas instead (--num-processes N, or accelerate launch --multi_gpu)"


def training_arguments(config: FinetuneConfig, folder: Path, *, quiet: bool) -> Any:
    """`transformers.TrainingArguments`; making them joins the process group, if a launcher made several."""
    import transformers

    ivon = config.optimizer == "ivon"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=learning_rate(config),
        weight_decay=0.0 if ivon else config.weight_decay,
        max_grad_norm=0.0 if ivon else 1.0,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        logging_steps=config.logging_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=list(config.report_to),
        disable_tqdm=quiet,
        ddp_timeout=24 * 3600,  # rank 0 may download and measure for hours; when a process dies, a launcher ends all
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # else the Trainer wraps the model in DataParallel, whose copies IVON does not perturb
        arguments._n_gpu = 1
    if config.num_processes is not None and arguments.world_size != config.num_processes:
        raise ConfigError(
            f"num_processes: {config.num_processes} were asked for and {arguments.world_size} run. Start them with "
            f"bmerge finetune --num-processes {config.num_processes}, or with accelerate launch."
        )
    return arguments


def learning_rate(config: FinetuneConfig) -> float:
    """The rate at the start, or its default for the optimizer and what is trained."""
    if config.learning_rate is not None:
        return config.learning_rate
    return (0.1 if config.optimizer == "ivon" else 1e-4) * (1 if config.lora is None else 10)


def run_settings(
    config: FinetuneConfig, arguments: Any, loaded: Loaded, examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the optimizer is given, with what was left out chosen from model, data and run length.

    `batch_size` is observations that enter a step, over micro-batches and ranks; `steps` counts ragged epochs.
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
        starts = {n: p.detach().float().cpu().numpy() for n, p in loaded.model.named_parameters() if ".lora_A." in n}
        settings[INITIAL_A] = initial_identity(starts)
    if ivon:
        ggn = config.curvature == "ggn"
        # The least curvature that an entry starts from; under ggn an entry that no output depends on keeps it.
        floor = config.weight_decay if ggn else config.hess_init
        memory = 5 * (config.curvature_every if ggn else 1) / steps
        settings |= {
            "ess": config.ess or max(float(total), _quiet_ess(loaded.model, floor)),
            "hess_init": config.hess_init,
            "beta1": config.beta1,
            "beta2": config.beta2 if config.beta2 is not None else min(0.99999, max(0.5 if ggn else 0.9, 1 - memory)),
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


def make_trainer(
    config: FinetuneConfig, arguments: Any, loaded: Loaded, examples: list[dict[str, Any]],
    settings: Mapping[str, Any], identity: Mapping[str, Any], *, quiet: bool, loss_before: float = 0.0,
) -> Any:  # fmt: skip
    """The Trainer, with IVON or AdamW inside; its checkpoints carry `identity` and the loss so far."""
    import transformers

    ivon = config.optimizer == "ivon"
    common: dict[str, Any] = {
        "model": loaded.model,
        "args": arguments,
        "train_dataset": examples,
        "data_collator": Collate(int(loaded.tokenizer.pad_token_id or 0)),
    }
    if loaded.task == "classification":
        common["compute_loss_func"] = classification_loss
    if ivon:
        common["optimizer_cls_and_kwargs"] = (IVON, {**{n: settings[n] for n in _IVON}, "seed": config.seed})
    try:
        trainer = (_ivon_trainer(config, settings) if ivon else transformers.Trainer)(**common)
    except (RuntimeError, ImportError, ValueError) as error:
        if config.report_to and any(name in str(error).lower() for name in config.report_to):
            raise ConfigError(f"report_to: {str(error).splitlines()[0]}") from None
        raise
    refuse_accelerator(trainer.accelerator, ivon=ivon)
    return _with_callbacks(trainer, chosen(settings, UNIT[loaded.task]), identity, loss_before, quiet=quiet)


def refuse_launcher(config: FinetuneConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raise a `ConfigError` for what a launcher has switched on and this cannot do, before anything is loaded."""

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("1", "true", "yes", "y", "on")

    if on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(_no_sharding("DeepSpeed"))
    if on("ACCELERATE_USE_FSDP"):
        raise ConfigError(_no_sharding("FSDP2" if environment.get("FSDP_VERSION", "1") == "2" else "FSDP1"))
    if config.optimizer == "ivon" and environment.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise ConfigError(_NO_FP16)


def refuse_accelerator(accelerator: Any, *, ivon: bool) -> None:
    """The same, asked of the accelerator itself, which knows of every other way in which it can be switched on."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "DEEPSPEED":
        raise ConfigError(_no_sharding("DeepSpeed"))
    if kind == "FSDP":
        raise ConfigError(_no_sharding("FSDP2" if getattr(accelerator, "is_fsdp2", False) else "FSDP1"))
    if ivon and accelerator.scaler is not None:
        raise ConfigError(_NO_FP16)


def refuse_other_heads(loaded: Loaded, name: str) -> None:
    """Raise a `ConfigError` for a classifier whose own loss is not the softmax cross-entropy that is trained here."""
    if other := other_head(loaded):
        raise ConfigError(
            f"'{name}' is a classifier with {other}; bmerge finetune trains one label out of two or more. Take such a "
            "base, or give num_labels and a base without a head."
        )


def refuse_quantised(model: Any, name: str) -> None:
    """Raise a `ConfigError` if quantised weights themselves would be trained; under an adapter they are frozen."""
    whole = bool(getattr(model, "is_quantized", False)) and not hasattr(model, "peft_config")
    for parameter_name, parameter in model.named_parameters():
        quantised = not parameter.is_floating_point() or parameter.dtype.itemsize == 1
        if quantised and (whole or parameter.requires_grad):
            raise ConfigError(
                f"'{name}' is quantised ('{parameter_name}' is {str(parameter.dtype).removeprefix('torch.')}), and a "
                "quantised weight has no gradient step. Train an adapter on it (lora: {r: 8}), or start from its "
                "unquantised checkpoint."
            )
    if whole:
        raise ConfigError(
            f"'{name}' is quantised, and quantised weights have no gradient step. Train an adapter on it "
            "(lora: {r: 8}), or start from its unquantised checkpoint."
        )


_NO_FP16 = (
    "fp16 with a gradient scaler is switched on (by the launcher, if not by the settings), and IVON takes its "
    "gradients before they are unscaled. Use bf16 (bf16: true, or --mixed_precision bf16), or no mixed precision."
)


def _no_sharding(what: str) -> str:
    if what == "DeepSpeed":
        why = "DeepSpeed keeps flat copies of the weights, so that IVON would perturb what no forward pass reads"
    elif what == "FSDP1":
        why = "FSDP1 keeps flat views of the weights, which have no names that a posterior could be stored under"
    else:
        why = (
            "under FSDP2 bmerge finetune cannot yet write its model and posterior from shards (the optimizer itself "
            "works on fully_shard, in a script of one's own)"
        )
    return f"{what} is switched on by the launcher: {why}. {_REPLICAS}."


def _ivon_trainer(config: FinetuneConfig, settings: Mapping[str, Any]) -> Any:
    import transformers

    watch = Watch(config)

    class IvonTrainer(IvonTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                health = unwrap(self.optimizer).health(settings["batch_size"])
                watch.look(health, warn=self.is_world_process_zero())
                logs = {**logs, **{name: health[name] for name in LOGGED[config.curvature]}}
            super().log(logs, *args, **kwargs)

    return IvonTrainer


def _with_callbacks(
    trainer: Any, first_line: str, identity: Mapping[str, Any], loss_before: float, *, quiet: bool
) -> Any:
    """A first line, a bar and a line a log on stderr at most: the Trainer's own callbacks print on stdout."""
    import transformers
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                print(first_line, file=sys.stderr)
            super().on_train_begin(args, state, control, **kwargs)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                line = f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4g}"
                for name in ("learning_rate", *LOGGED["price"]):
                    if name in logs:
                        line += f"  {name} {float(logs[name]):.3g}"
                self.training_bar.write(line, file=sys.stderr)
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    class Whole(transformers.TrainerCallback):  # type: ignore[misc]
        """Marks a checkpoint when every rank has written its part of it."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Every rank comes here when it has written its files, and goes on when all have.
            loss = loss_before + mean_over_ranks(trainer._total_loss_scalar + float(trainer._tr_loss))
            if state.is_world_process_zero:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                mark_whole(path, state.global_step, identity, loss)

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Whole())
    if not quiet:
        trainer.add_callback(Bar())
    return trainer


def _quiet_ess(model: Any, curvature: float) -> float:
    """The ess at which the first noise is `_NOISE` of the median weight matrix' root mean square."""
    sizes = [
        float(p.detach().float().square().mean().sqrt()) for p in model.parameters() if p.requires_grad and p.ndim > 1
    ]
    rms = sorted(s for s in sizes if s > 0)
    if not rms:
        return 0.0
    return float(1 / (curvature * (_NOISE * rms[len(rms) // 2]) ** 2))
