"""From a trained model to a checkpoint folder with its posterior inside."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import pinned
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.finetune.health import problems
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport
from mergekit_bayes.models.encode import Collate, batches, observations
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.quiet import with_bar
from mergekit_bayes.posterior import (
    Anchor,
    Identity,
    PosteriorInfo,
    Prior,
    identify,
    save_posterior,
)
from mergekit_bayes.trainer import unwrap

logger = logging.getLogger(__name__)


def save_finetuned(
    config: FinetuneConfig,
    loaded: Loaded,
    examples: list[dict[str, Any]],
    trainer: Any,
    settings: Mapping[str, Any],
    base: Identity | None,
    result: Any,
    target: Path,
) -> FinetuneReport:
    model = trainer.accelerator.unwrap_model(trainer.model)
    total, unit = observations(examples, loaded.task), UNIT[loaded.task]
    estimator, health = None, {}
    with replacing(target, force=config.force) as partial:
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        if config.lora is not None and loaded.task == "classification":
            model.config.save_pretrained(
                partial
            )  # an adapter's own config does not name the labels
        resolved = config.model_dump(mode="json", exclude={"force", "resume"})
        resolved["model"] = pinned(config.model, loaded.path)
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
            arrays = {
                n: t.detach().cpu().float().numpy()
                for n, t in checkpoint_names(model, precision).items()
            }
            save_posterior(partial, arrays, info)
    for problem in problems(config, health, final=True).values():
        logger.warning(problem)
    return FinetuneReport(
        path=target,
        steps=int(result.global_step),
        loss=float(result.training_loss),
        observations=total,
        unit=unit,
        estimator=estimator,
        health=health,
    )


def _posterior(
    config: FinetuneConfig,
    model: Any,
    examples: Sequence[dict[str, Any]],
    loaded: Loaded,
    trainer: Any,
    settings: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The precision by name in memory, and what `PosteriorInfo` should say of it."""
    total = float(observations(examples, loaded.task))
    ivon = config.optimizer == "ivon"
    health = unwrap(trainer.optimizer).health(settings["batch_size"]) if ivon else {}
    decay = config.weight_decay
    if config.posterior == "ivon":
        precision = unwrap(trainer.optimizer).precision(model.named_parameters())
        # h of `curvature: ggn` has the size of a flush, that of `price` may be a thousand times
        # larger.
        ess, estimator = float(settings["ess"]), "ggn" if config.curvature == "ggn" else "ivon"
    else:
        found, sampled = flush(
            model, examples, loaded, config.flush_batches, config.batch_size, config.seed
        )
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
    """Root-GGN diagonal per observation over `count` random batches of the training data, at the
    present weights.

    Returns the diagonal by parameter name and the number of examples looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count * size:
        order += torch.randperm(len(examples), generator=generator).tolist()
        if len(examples) >= count * size:
            break
    chosen = [examples[i] for i in order[: count * size]]
    collate = Collate(loaded.pad)
    device = next(model.parameters()).device
    cut = with_bar(
        batches(chosen, size, collate, device=device), "curvature", math.ceil(len(chosen) / size)
    )
    found = ggn_diagonal(model, cut, seed=seed)
    return {n: t / found.observations for n, t in found.total.items()}, len(chosen)
