"""From a trained model to a checkpoint folder with its posterior inside."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import FINETUNE
from mergekit_bayes.checkpoint.sources import pinned
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.finetune.checkpoints import copy_logs
from mergekit_bayes.finetune.data import Run
from mergekit_bayes.finetune.gathered import Gathered
from mergekit_bayes.finetune.health import problems
from mergekit_bayes.finetune.settings import FinetuneReport
from mergekit_bayes.libraries import call
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import (
    Anchor,
    PosteriorInfo,
    Predictive,
    Prior,
    identify,
    save_posterior,
)
from mergekit_bayes.posterior.info import LOSS
from mergekit_bayes.posterior.save import Later
from mergekit_bayes.trainer.choices import predictive

logger = logging.getLogger(__name__)

_ESTIMATOR = "ggn"  # of the curvature at the final weights


class FinalPrecision(NamedTuple):
    """The precision that a run leaves.

    Attributes:
        tensors: Precision by parameter name, 1/weight^2, float32; of sharded weights, by the name
            that is stored.
        estimator: Where its curvature comes from, `ggn` or `ivon`.
        ess: Number of observations by which it is scaled.
    """

    tensors: dict[str, torch.Tensor] | dict[str, Later]
    estimator: str
    ess: float


def save_finetuned(
    run: Run,
    optimizer: IVON | None,
    steps: int,
    loss: float,
    folder: Path,
    gathered: Gathered | None = None,
    evaluation: Mapping[str, float] | None = None,
) -> FinetuneReport:
    """Write the checkpoint folder and its posterior, and say what was written.

    Args:
        run: The run, whose model is trained now.
        optimizer: IVON at the end of training; None after AdamW.
        steps: Optimizer steps made.
        loss: Mean training loss of a step.
        folder: Where the Trainer wrote, whose logs are stored with the model.
        gathered: The model, where it is sharded.
        evaluation: What was measured of these weights on held-out data, by name.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    config, target = run.config, Path(run.config.output)
    precision, health = None, {}
    with replacing(target, force=config.force) as partial:
        _save_model(run, partial, gathered)
        copy_logs(folder, partial)
        if config.posterior != "none":
            precision = final_precision(run, optimizer, gathered)
            health = _health(run, optimizer, precision, gathered)
            _save_posterior(run, precision, health, evaluation or {}, partial)
    for problem in problems(config, health, final=True).values():
        logger.warning(problem)
    return FinetuneReport(
        path=target,
        steps=steps,
        loss=loss,
        observations=run.observations,
        unit=run.unit,
        estimator=None if precision is None else precision.estimator,
        health=health,
    )


def final_precision(
    run: Run, optimizer: IVON | None, gathered: Gathered | None = None
) -> FinalPrecision:
    """The precision at the end of training, by the estimate that the settings name.

    Args:
        run: The run.
        optimizer: IVON at the end of training; None after AdamW.
        gathered: The model, where it is sharded.
    """
    config = run.config
    if gathered is not None:
        return _gathered_precision(run, gathered)
    if config.posterior == "ivon":
        assert optimizer is not None
        assert run.choices.ivon is not None
        tensors = optimizer.precision(run.loaded.model.named_parameters())
        # The Hessian of `curvature: ggn` has the size of the final estimate. That of `price` may
        # be much too large, so a merge must not mix the two.
        estimator = _ESTIMATOR if config.curvature == "ggn" else "ivon"
        return FinalPrecision(tensors, estimator, float(run.choices.ivon.ess))
    total = float(run.observations)
    prior = 0.0 if optimizer is None else total * config.weight_decay
    tensors = {name: total * mean + prior for name, mean in final_curvature(run).items()}
    return FinalPrecision(tensors, _ESTIMATOR, total)


def _gathered_precision(run: Run, gathered: Gathered) -> FinalPrecision:
    config, is_flush = run.config, run.config.posterior == "flush"
    if is_flush:
        gathered.flush()
    is_adapter = hasattr(run.loaded.model, "peft_config")
    tensors = gathered.adapter("precision") if is_adapter else gathered.precision()
    if is_flush:
        return FinalPrecision(tensors, _ESTIMATOR, float(run.observations))
    assert run.choices.ivon is not None
    estimator = _ESTIMATOR if config.curvature == "ggn" else "ivon"
    return FinalPrecision(tensors, estimator, float(run.choices.ivon.ess))


def final_curvature(run: Run) -> dict[str, torch.Tensor]:
    """Root-GGN diagonal per observation at the final weights (`posterior: flush`).

    Taken over `flush_batches` random batches of the training data.

    Returns:
        float32 tensors by parameter name, 1/weight^2.
    """
    config = run.config
    examples = random_examples(run.examples, config.flush_batches * config.batch_size, config.seed)
    curvature = estimate_curvature(
        _ESTIMATOR, run.loaded, examples, batch_size=config.batch_size, seed=config.seed
    )
    return {name: square / curvature.observations for name, square in curvature.total.items()}


def _save_model(run: Run, folder: Path, gathered: Gathered | None) -> None:
    """Write model, tokenizer and the settings of the run."""
    config, model = run.config, run.loaded.model

    def save() -> None:
        model.save_pretrained(folder) if gathered is None else gathered.save_model(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's card, all of it placeholders
        run.loaded.tokenizer.save_pretrained(folder)
        if config.lora is not None and run.loaded.task == "classification":
            model.config.save_pretrained(folder)  # an adapter's own does not name the labels

    way_out = "Free some space or choose another output."
    call(f"{config.output}: writing failed", save, way_out)  # safetensors' error is no OSError
    settings = config.model_dump(mode="json", exclude={"force", "resume", "keep_checkpoints"})
    settings["model"] = pinned(config.model, run.loaded.path)
    (folder / FINETUNE).write_text(yaml.safe_dump(settings, sort_keys=False))


def _save_posterior(
    run: Run,
    precision: FinalPrecision,
    health: dict[str, float],
    evaluation: Mapping[str, float],
    folder: Path,
) -> None:
    """Write the posterior beside the model that `_save_model` wrote."""
    model = run.loaded.model
    measured = {f"eval_{name}": value for name, value in evaluation.items()}
    prior, anchor = _prior_and_anchor(run, precision.ess)
    with SafetensorsSource(checkpoint_files(folder)) as source:
        mean = identify(source)
    info = PosteriorInfo(
        estimator=precision.estimator,
        ess=precision.ess,
        sampled=health.get("flush_examples"),
        prior=prior,
        anchor=anchor,
        predictive=_predictive(run, precision.ess),
        health=health,
        unit=run.unit,
        observations=run.observations,
        mean=mean,
        base=run.base,
        tokenizer=tokenizer_identity(folder),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        training=run.choices.record() | {LOSS: trained_loss(model).name} | measured,
        aliases=dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )
    save_posterior(folder, _stored(model, precision.tensors), info)


def _stored(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor] | dict[str, Later]
) -> Mapping[str, Array | Later]:
    """A precision under the names that are stored."""
    made = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    if not made:
        return {name: t for name, t in tensors.items() if isinstance(t, Later)}
    return {
        name: tensor.detach().cpu().float().numpy()
        for name, tensor in checkpoint_names(model, made).items()
    }


def _health(
    run: Run, optimizer: IVON | None, precision: FinalPrecision, gathered: Gathered | None
) -> dict[str, float]:
    config = run.config
    if gathered is not None:
        health = gathered.health()
    else:
        tensors = {n: t for n, t in precision.tensors.items() if isinstance(t, torch.Tensor)}
        health = {} if optimizer is None else optimizer.health(run.choices.batch_size)
        health |= precision_health(tensors)
    if config.posterior == "flush":
        health["flush_examples"] = float(config.flush_batches * config.batch_size)
    return health


def _predictive(run: Run, count: float) -> Predictive | None:
    """How weights are drawn for predictions; None after AdamW, whose weights were never drawn."""
    ivon, decay = run.choices.ivon, run.config.weight_decay
    if ivon is None:
        return None
    return predictive(count, ess=ivon.ess, damping=ivon.damping, weight_decay=decay)


def _prior_and_anchor(run: Run, ess: float) -> tuple[Prior, Anchor]:
    """What the precision contains besides its data, and what training pulled towards.

    The decoupled weight decay of AdamW pulls towards zero but is no Gaussian prior.
    """
    decay = run.config.weight_decay
    if not decay:
        return Prior(), Anchor()
    if run.choices.ivon is None:
        return Prior(), Anchor(kind="zero", precision=None)
    return (
        Prior(kind="isotropic", precision=ess * decay),
        Anchor(kind="zero", precision=ess * decay),
    )
