"""Fine-tune a model and keep its posterior: an ordinary checkpoint folder with a `posterior/` inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. What is stored by default is a
flush: the root-GGN diagonal at the final mean times the number of observations, plus the prior. IVON's own h has
the right order but, after a short run, up to a thousand times the right size; `posterior: ivon` stores it.
"""

import difflib
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.curvature import ggn_diagonal, precision_health
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models import (
    UNIT,
    Collate,
    Loaded,
    Task,
    batches,
    checkpoint_names,
    encode_rows,
    hushed,
    is_classifier,
    load_model,
    load_rows,
    observations,
    with_bar,
)
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import (
    Anchor,
    Identity,
    PosteriorInfo,
    Prior,
    checkpoint_files,
    identify,
    replacing,
    save_posterior,
    tokenizer_identity,
)
from mergekit_bayes.sources import is_hub_id
from mergekit_bayes.tensors import SafetensorsSource
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap

logger = logging.getLogger(__name__)

# sigma at the start, as a share of the typical weight, where `ess` is left out.
_NOISE = 0.05


class LoraSettings(Config):
    """Low-rank adaptation, as peft takes it."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None


class FinetuneConfig(Config):
    """Settings of `bmerge finetune`; the fields are the YAML keys.

    Attributes:
        model, output: A folder or Hub id, and the folder to write.
        data: Files, folders or Hub data sets of rows; `where` keeps rows with these values.
        task: `auto` reads it off the architecture; `num_labels` makes a new head for a classifier.
        pack: For language models: join rows by EOS and cut blocks, instead of one row an example.
        learning_rate: None is 0.1 for IVON (with `clip_radius` 1e-3 and no rescaling no weight moves further
            than 1e-4 a step, a usual AdamW rate), 1e-4 for AdamW.
        ess: Effective sample size. None is the data's size, but at least so large that the noise at the start is 5 %
            of the median weight matrix' RMS. Held-out loss of a small language model (one seed), beside AdamW at the
            rate `learning_rate * clip_radius`: at 1e-4 3.90 against 3.83 after 63 steps, 2.57 against 2.79 after
            252; at 1e-3 2.24 against 2.34, 1.93 against 1.96.
        beta2: None is 1 - 5 / steps.
        weight_decay: For IVON the prior precision over ess. AdamW's is decoupled and no Gaussian prior.
        posterior: `flush` (root-GGN at the final mean over `flush_batches` batches), `ivon`, or `none`.
        epochs, max_steps: `max_steps`, if given, decides.
        scheduler: As transformers names it.
        dtype: Of the parameters; IVON's own state is float32 whatever it is. `bf16` only computes in bfloat16.
        save_steps: None keeps no checkpoints; else the Trainer's are kept in `OUTPUT.checkpoints`.
    """

    model: str
    output: str
    data: str | tuple[str, ...]
    where: dict[str, Any] | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_rows: int | None = Field(None, ge=1)
    task: Task = "auto"
    num_labels: int | None = Field(None, ge=2)
    max_length: int = Field(512, ge=2)
    pack: bool = False
    optimizer: Literal["ivon", "adamw"] = "ivon"
    learning_rate: float | None = Field(None, ge=0)
    ess: float | None = Field(None, gt=0)
    hess_init: float = Field(0.01, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float | None = Field(None, ge=0, lt=1)
    weight_decay: float = Field(1e-6, ge=0)
    clip_radius: float = Field(1e-3, gt=0)
    rescale_lr: bool = False
    mc_samples: int = Field(1, ge=1)
    posterior: Literal["flush", "ivon", "none"] = "flush"
    flush_batches: int = Field(64, ge=1)
    lora: LoraSettings | None = None
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    warmup_steps: int = Field(0, ge=0)
    scheduler: str = "linear"
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    bf16: bool = False
    logging_steps: int = Field(50, ge=1)
    save_steps: int | None = Field(None, ge=1)
    report_to: tuple[str, ...] = ()
    force: bool = False


class FinetuneReport(Config):
    """What a fine-tune left: where, how long it trained, and the posterior's health."""

    path: Path
    steps: int
    loss: float
    observations: int
    unit: str
    estimator: str | None
    health: dict[str, float]


def run_finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneReport:
    """Fine-tune, store the model and its posterior, and return what happened.

    Raises:
        CheckpointError: The output exists, or the model cannot be loaded.
        ConfigError: Settings that contradict each other.
        MismatchError: Data without the named columns or with unknown labels.
    """
    target = Path(config.output)
    if target.exists() and not config.force:
        raise CheckpointError(f"'{target}' exists. Choose another output, or pass --force to replace it.")
    if config.posterior == "ivon" and config.optimizer != "ivon":
        raise ConfigError("posterior: ivon needs optimizer: ivon; AdamW leaves none. Use posterior: flush.")
    _check(config)
    with hushed(quiet):
        return _run(config, target, quiet=quiet)


def _run(config: FinetuneConfig, target: Path, *, quiet: bool) -> FinetuneReport:
    import transformers
    from accelerate.utils import broadcast_object_list

    transformers.set_seed(config.seed)
    loaded = _load(config)
    base = _base_identity(loaded.path)
    examples = _examples(config, loaded)
    if config.lora is not None:
        loaded = loaded._replace(model=_with_lora(loaded, config.lora, config.model))
    scratch = Path(tempfile.mkdtemp(prefix="bmerge-"))
    try:
        kept = scratch if config.save_steps is None else target.with_name(f"{target.name}.checkpoints")
        trainer, settings = _trainer(config, loaded, examples, kept, quiet=quiet)
        result = trainer.train()
        trainer.accelerator.wait_for_everyone()
        report = None
        if trainer.accelerator.is_main_process:
            report = _store(config, loaded, examples, trainer, settings, base, result, target)
        reports = broadcast_object_list([report])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found: FinetuneReport = reports[0]
    return found


def _check(config: FinetuneConfig) -> None:
    from transformers import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if config.scheduler not in known:
        close = difflib.get_close_matches(config.scheduler, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(known)}."
        raise ConfigError(f"scheduler: transformers knows no '{config.scheduler}'; {hint}")


def _load(config: FinetuneConfig) -> Loaded:
    """The model; a checkpoint without a classification head gets one for the labels that the data holds."""
    if config.task != "classification" or config.num_labels is not None or is_classifier(config.model):
        return load_model(config.model, config.task, num_labels=config.num_labels, dtype=config.dtype)
    rows = load_rows(config.data, where=config.where, max_rows=config.max_rows, columns=[config.label_column])
    values = sorted(set(rows[config.label_column]), key=lambda v: (str(type(v)), v))
    named = not all(isinstance(v, int) for v in values)
    loaded = load_model(
        config.model, config.task, num_labels=len(values) if named else max(1, *values) + 1, dtype=config.dtype
    )
    if named:
        loaded.model.config.id2label = {i: str(v) for i, v in enumerate(values)}
        loaded.model.config.label2id = {str(v): i for i, v in enumerate(values)}
    return loaded


def _examples(config: FinetuneConfig, loaded: Loaded) -> list[dict[str, Any]]:
    label = config.label_column if loaded.task == "classification" else None
    columns = [config.text_column, *([label] if label else [])]
    rows = load_rows(config.data, where=config.where, max_rows=config.max_rows, columns=columns)
    return encode_rows(
        rows, loaded, text=config.text_column, label=label, max_length=config.max_length, pack=config.pack
    )


def _with_lora(loaded: Loaded, lora: LoraSettings, name: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    modules = lora.target_modules
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
        task_type=TaskType.SEQ_CLS if loaded.task == "classification" else TaskType.CAUSAL_LM,
        fan_in_fan_out=loaded.model.config.model_type == "gpt2",  # its layers store weights transposed
    )
    try:
        model = get_peft_model(loaded.model, settings)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    # What the adapter will be loaded on: the Hub id as given, or a folder from wherever one stands.
    model.peft_config["default"].base_model_name_or_path = name if is_hub_id(name) else str(loaded.path.resolve())
    return model


def _trainer(
    config: FinetuneConfig, loaded: Loaded, examples: list[dict[str, Any]], scratch: Path, *, quiet: bool
) -> tuple[Any, dict[str, Any]]:
    import transformers

    ivon = config.optimizer == "ivon"
    rate = config.learning_rate if config.learning_rate is not None else (0.1 if ivon else 1e-4)
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=rate,
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
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
    micro_batches = math.ceil(len(examples) / (config.batch_size * arguments.world_size))
    per_epoch = math.ceil(micro_batches / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    total = observations(examples, loaded.task)
    settings: dict[str, Any] = {
        "optimizer": config.optimizer,
        "lr": rate,
        "weight_decay": config.weight_decay,
        "scheduler": config.scheduler,
        "steps": steps,
        "batch_size": total / len(examples) * per_step,
        "loss_reduction": f"mean over {UNIT[loaded.task]}s of a step",
    }
    common = {
        "model": loaded.model,
        "args": arguments,
        "train_dataset": examples,
        "data_collator": Collate(int(loaded.tokenizer.pad_token_id or 0)),
    }
    if loaded.task == "classification":
        common["compute_loss_func"] = classification_loss
    if not ivon:
        return _progress_only(transformers.Trainer(**common), quiet=quiet), settings
    settings |= {
        "ess": config.ess or max(float(total), _quiet_ess(loaded.model, config.hess_init)),
        "hess_init": config.hess_init,
        "beta1": config.beta1,
        "beta2": config.beta2 if config.beta2 is not None else min(0.99999, max(0.9, 1 - 5 / steps)),
        "clip_radius": config.clip_radius,
        "rescale_lr": config.rescale_lr,
        "mc_samples": config.mc_samples,
    }
    names = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "rescale_lr", "mc_samples")
    trainer = _ivon_trainer()(
        **common, optimizer_cls_and_kwargs=(IVON, {**{n: settings[n] for n in names}, "seed": config.seed})
    )
    return _progress_only(trainer, quiet=quiet), settings


def classification_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy, mean over the examples of the whole step.

    The loss inside transformers' classifiers is the mean of one micro-batch, and since they take the step's count
    without using it, the Trainer adds those means up: with k micro-batches the gradient is k times too large.
    """
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _progress_only(trainer: Any, *, quiet: bool) -> Any:
    """A bar on stderr at most: the Trainer's own callbacks print their logs on stdout."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not quiet:
        trainer.add_callback(Bar())
    return trainer


def _ivon_trainer() -> Any:
    import transformers

    class IvonTrainer(IvonTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    return IvonTrainer


def _quiet_ess(model: Any, hess_init: float) -> float:
    """The ess at which the first noise is `_NOISE` of the median weight matrix' root mean square."""
    sizes = [
        float(p.detach().float().square().mean().sqrt()) for p in model.parameters() if p.requires_grad and p.ndim > 1
    ]
    rms = sorted(s for s in sizes if s > 0)
    if not rms:
        return 0.0
    return float(1 / (hess_init * (_NOISE * rms[len(rms) // 2]) ** 2))


def _store(
    config: FinetuneConfig, loaded: Loaded, examples: list[dict[str, Any]], trainer: Any, settings: Mapping[str, Any],
    base: Identity | None, result: Any, target: Path,
) -> FinetuneReport:  # fmt: skip
    model = trainer.accelerator.unwrap_model(trainer.model)
    total, unit = observations(examples, loaded.task), UNIT[loaded.task]
    estimator, health = None, {}
    with replacing(target, force=config.force) as partial:
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        if config.lora is not None and loaded.task == "classification":
            model.config.save_pretrained(partial)  # an adapter's own config does not name the labels
        resolved = config.model_dump(mode="json", exclude={"force"})
        (partial / "finetune.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        if config.posterior != "none":
            precision, about = _posterior(config, model, examples, loaded, trainer, settings)
            estimator, health = about["estimator"], about["health"]
            source = SafetensorsSource(checkpoint_files(partial))
            info = PosteriorInfo(
                **about,
                unit=unit,
                observations=total,
                mean=identify(source),
                base=base,
                tokenizer=tokenizer_identity(partial),
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
                training=dict(settings),
                aliases=dict(getattr(model, "all_tied_weights_keys", None) or {}),
            )
            source.close()
            arrays = {n: t.detach().cpu().float().numpy() for n, t in checkpoint_names(model, precision).items()}
            save_posterior(partial, arrays, info)
    for problem in _problems(config, health):
        logger.warning(problem)
    return FinetuneReport(
        path=target, steps=int(result.global_step), loss=float(result.training_loss), observations=total, unit=unit,
        estimator=estimator, health=health,
    )  # fmt: skip


def _posterior(
    config: FinetuneConfig, model: Any, examples: Sequence[dict[str, Any]], loaded: Loaded, trainer: Any,
    settings: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """The precision by name in memory, and what `PosteriorInfo` should say of it."""
    total = float(observations(examples, loaded.task))
    ivon = config.optimizer == "ivon"
    health = unwrap(trainer.optimizer).health(settings["batch_size"]) if ivon else {}
    decay = config.weight_decay
    if config.posterior == "ivon":
        precision = unwrap(trainer.optimizer).precision(model.named_parameters())
        ess, estimator = float(settings["ess"]), "ivon"
    else:
        found, sampled = flush(model, examples, loaded, config.flush_batches, config.batch_size, config.seed)
        ess, estimator = total, "ggn"
        prior = total * decay if ivon else 0.0
        precision = {n: total * f + prior for n, f in found.items()}
        health = health | {"flush_examples": float(sampled)}
    if ivon:
        prior_info = Prior(kind="isotropic", precision=ess * decay) if decay else Prior()
        anchor = Anchor(kind="zero", precision=ess * decay) if decay else Anchor()
    else:
        prior_info = Prior()
        anchor = Anchor(kind="zero", precision=None) if decay else Anchor()
    about = {
        "estimator": estimator,
        "ess": ess,
        "sampled": health.get("flush_examples"),
        "prior": prior_info,
        "anchor": anchor,
        "health": health | precision_health(precision),
    }
    return precision, about


def flush(
    model: Any, examples: Sequence[dict[str, Any]], loaded: Loaded, count: int, size: int, seed: int
) -> tuple[dict[str, torch.Tensor], int]:
    """Root-GGN diagonal per observation over `count` random batches of the training data, at the present weights.

    Returns the diagonal by parameter name and the number of examples looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count * size:
        order += torch.randperm(len(examples), generator=generator).tolist()
        if len(examples) >= count * size:
            break
    chosen = [examples[i] for i in order[: count * size]]
    collate = Collate(int(loaded.tokenizer.pad_token_id or 0))
    device = next(model.parameters()).device
    cut = with_bar(batches(chosen, size, collate, device=device), "curvature", math.ceil(len(chosen) / size))
    found = ggn_diagonal(model, cut, seed=seed)
    return {n: t / found.observations for n, t in found.total.items()}, len(chosen)


def _base_identity(path: Path) -> Identity | None:
    try:
        source = SafetensorsSource(checkpoint_files(path))
    except CheckpointError:
        return None  # a base in pickles has no identity that a merge could check
    try:
        return identify(source)
    finally:
        source.close()


def _problems(config: FinetuneConfig, health: Mapping[str, float]) -> list[str]:
    found = []
    if config.posterior == "ivon":
        if health["init_fraction"] > 0.5:
            found.append(
                f"{health['init_fraction']:.0%} of hess_init is still in the Hessian: lower beta2 or train longer"
            )
        if health["kappa"] > 1:
            found.append(
                f"kappa is {health['kappa']:.3g}: the Hessian is mostly noise; lower ess, raise beta2 or the batch"
            )
    if health.get("sigma_over_rms", 0.0) > 0.1:
        found.append(f"the noise reached {health['sigma_over_rms']:.2f} of a tensor's weights: raise ess or hess_init")
    return found
