"""Fine-tune a model and keep its posterior: an ordinary checkpoint folder with a `posterior/` inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. What is stored by default is a
flush: the root-GGN diagonal at the final mean times the number of observations, plus the prior. `posterior: ivon`
stores the optimizer's own h, which lags behind where the curvature falls and, under `curvature: price`, has the right
order but after a short run up to a thousand times the right size.
"""

import difflib
import logging
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune.checkpoints import (
    Checkpoint,
    checkpoints_of,
    identity_of,
    open_checkpoints,
    refuse_other_settings,
)
from mergekit_bayes.finetune.ranks import is_main, main_first, mean_over_ranks, on_main
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport, LoraSettings
from mergekit_bayes.finetune.store import base_identity, save_finetuned
from mergekit_bayes.finetune.training import (
    make_trainer,
    refuse_launcher,
    refuse_other_heads,
    refuse_quantised,
    run_settings,
    training_arguments,
)
from mergekit_bayes.models import Loaded, context_length, encode_rows, hushed, is_classifier, load_model, load_rows
from mergekit_bayes.sources import commit_in, is_hub_id

__all__ = ["FinetuneConfig", "FinetuneReport", "LoraSettings", "run_finetune"]

logger = logging.getLogger(__name__)


def run_finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneReport:
    """Fine-tune, store the model and its posterior, and return what happened.

    Under a launcher every rank calls this and gets the same report, or the same error; rank 0 writes.

    Raises:
        CheckpointError: The output or its checkpoints exist, or the model cannot be loaded.
        ConfigError: Settings that contradict each other, or those of the checkpoint that is resumed.
        MismatchError: Data without the named columns or with unknown labels.
    """
    _check(config)
    refuse_launcher(config)
    quiet = quiet or not is_main()
    with hushed(quiet):
        return _run(config, Path(config.output), quiet=quiet)


def _run(config: FinetuneConfig, target: Path, *, quiet: bool) -> FinetuneReport:
    import transformers

    transformers.set_seed(config.seed)
    scratch = Path(tempfile.mkdtemp(prefix="bmerge-"))
    try:
        arguments = training_arguments(
            config, scratch if config.save_steps is None else checkpoints_of(target), quiet=quiet
        )
        checkpoint = on_main(lambda: _open_output(config, target))
        loaded, examples = main_first(lambda: _load_all(config))
        base = main_first(lambda: base_identity(loaded.path))
        if config.lora is not None:
            loaded = loaded._replace(model=_with_lora(loaded, config.lora, config.model))
        refuse_quantised(loaded.model, config.model)
        settings = run_settings(config, arguments, loaded, examples)
        identity = identity_of(config, settings, base, examples, arguments.world_size)
        before = 0.0
        if checkpoint is not None:
            refuse_other_settings(checkpoint, identity)
            before = checkpoint.loss
            logger.info("resuming from %s", checkpoint.path)
        trainer = make_trainer(config, arguments, loaded, examples, settings, identity, quiet=quiet, loss_before=before)
        result = _train(trainer, checkpoint, settings["steps"], config)
        trainer.accelerator.wait_for_everyone()
        return on_main(lambda: save_finetuned(config, loaded, examples, trainer, settings, base, result, target))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(config: FinetuneConfig) -> None:
    from transformers import SchedulerType

    if config.posterior == "ivon" and config.optimizer != "ivon":
        raise ConfigError("posterior: ivon needs optimizer: ivon; AdamW leaves none. Use posterior: flush.")
    if config.antithetic and config.mc_samples > 1 and config.mc_samples % 2:
        raise ConfigError(f"mc_samples: {config.mc_samples} samples do not make antithetic pairs; give an even number.")
    if config.optimizer == "ivon" and config.curvature == "ggn" and not config.weight_decay:
        raise ConfigError(
            "curvature: ggn needs weight_decay > 0, or entries without curvature have no precision. Give one (1e-6), "
            "or curvature: price."
        )
    if config.resume and config.save_steps is None:
        raise ConfigError("resume: checkpoints are kept only with save_steps; give the save_steps of the first run.")
    known = [kind.value for kind in SchedulerType]
    if config.scheduler not in known:
        close = difflib.get_close_matches(config.scheduler, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(known)}."
        raise ConfigError(f"scheduler: transformers knows no '{config.scheduler}'; {hint}")


def _open_output(config: FinetuneConfig, target: Path) -> Checkpoint | None:
    if target.exists() and not config.force:
        raise CheckpointError(f"'{target}' exists. Choose another output, or pass --force to replace it.")
    if config.save_steps is None:
        return None
    return open_checkpoints(checkpoints_of(target), resume=config.resume, force=config.force)


def _train(trainer: Any, checkpoint: Checkpoint | None, steps: int, config: FinetuneConfig) -> Any:
    """Train from the start or the checkpoint; what comes back has `global_step` and the whole run's `training_loss`."""
    if checkpoint is not None and checkpoint.step >= steps:
        # Killed after the last step: the Trainer would make one more in the middle of an epoch.
        trainer._load_from_checkpoint(str(checkpoint.path))
        if config.optimizer == "ivon":
            trainer.create_optimizer()
            state = torch.load(checkpoint.path / "optimizer.pt", map_location="cpu", weights_only=True)
            trainer.optimizer.load_state_dict(state)
        return SimpleNamespace(global_step=checkpoint.step, training_loss=checkpoint.loss / checkpoint.step)
    step, loss, path = (0, 0.0, None) if checkpoint is None else (checkpoint.step, checkpoint.loss, checkpoint.path)
    done = trainer.train(resume_from_checkpoint=None if path is None else str(path))
    loss += mean_over_ranks(done.training_loss) * (done.global_step - step)
    return SimpleNamespace(global_step=done.global_step, training_loss=loss / max(1, done.global_step))


def _load_all(config: FinetuneConfig) -> tuple[Loaded, list[dict[str, Any]]]:
    loaded = _load(config)
    refuse_other_heads(loaded, config.model)
    return loaded, _examples(config, loaded)


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
    if "max_length" in config.model_fields_set and config.max_length > (most := context_length(loaded)) and is_main():
        logger.warning(
            "max_length: the model sees %d tokens, so rows are cut there and not at %d", most, config.max_length
        )
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
    settings, (repo, _, revision) = model.peft_config["default"], name.partition("@")
    settings.base_model_name_or_path = repo if is_hub_id(name) else str(loaded.path.resolve())
    settings.revision = commit_in(name, loaded.path) or (revision if is_hub_id(name) else None) or None
    return model
