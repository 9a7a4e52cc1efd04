"""From an adapted model to a checkpoint folder, with its posterior and what it is the result of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from mergekit_bayes.adapt.data import Run
from mergekit_bayes.adapt.flush import ESTIMATOR, Flushed, flush, why_none
from mergekit_bayes.adapt.memory import Memory
from mergekit_bayes.adapt.settings import AdaptReport, Rows
from mergekit_bayes.adapt.stopping import Outcome
from mergekit_bayes.adapt.weights import chosen_prior
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import ADAPT, ADAPT_REPORT, MEMORY
from mergekit_bayes.checkpoint.sources import is_hub_id, pinned
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.finetune.identity import digest
from mergekit_bayes.libraries import call
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.posterior import (
    Anchor,
    Edit,
    EditedRows,
    EditMemory,
    PosteriorInfo,
    identify,
    save_posterior,
)
from mergekit_bayes.posterior.info import LOSS


def save_adapted(run: Run, outcome: Outcome, reconstruction_error: float | None) -> AdaptReport:
    """Write the checkpoint folder and its posterior, and say what was written.

    Args:
        run: The run, whose model is adapted now.
        outcome: How the run ended.
        reconstruction_error: Relative squared error of the K-prior's gradient, if it was told.

    Raises:
        CheckpointError: The folder cannot be written.
        PrecisionError: The start's precision holds entries that are no precision.
    """
    config, units = run.config, run.units
    reason = why_none(config, is_stored=bool(run.places))
    health: dict[str, float] = {}
    with replacing(Path(config.output), force=config.force) as partial:
        save_model(run, partial)
        if reason is None:
            flushed = flush(run)
            health = _health(flushed)
            _save_posterior(run, flushed, health, outcome.kept_step, partial)
        report = AdaptReport(
            path=Path(config.output),
            steps=outcome.steps,
            kept_step=outcome.kept_step,
            reached=outcome.reached,
            checks=outcome.checks,
            unit=units.unit,
            removed=units.removed,
            added=units.added,
            memory=units.memory,
            base=units.base,
            kappa=units.kappa,
            tau=units.tau,
            prior=chosen_prior(config, is_stored=bool(run.places)),
            learning_rate=units.learning_rate,
            refused_steps=outcome.refused_steps,
            reconstruction_error=reconstruction_error,
            estimator=ESTIMATOR if reason is None else None,
            without_precision=reason,
            health=health,
        )
        _write_report(report, partial)
        if run.memory is not None and run.memory.texts:
            _write_memory(run.memory.texts, config.text_column, partial)
    return report


def save_model(run: Run, folder: Path) -> None:
    """Write model, tokenizer and the settings of the run.

    Raises:
        CheckpointError: A file cannot be written.
    """
    config, model = run.config, run.loaded.model

    def save() -> None:
        model.save_pretrained(folder)
        run.loaded.tokenizer.save_pretrained(folder)
        if config.lora is not None and run.loaded.task == "classification":
            model.config.save_pretrained(folder)  # an adapter's own does not name the labels

    call(f"{folder}: writing failed", save, "Free some space or choose another output.")
    settings = config.model_dump(mode="json", exclude={"force", "resume", "keep_checkpoints"})
    settings["model"] = pinned(config.model, run.loaded.path)
    (folder / ADAPT).write_text(yaml.safe_dump(settings, sort_keys=False))


def edit_of(run: Run, steps: int, start_count: float | None) -> Edit:
    """The record of an adaptation.

    Args:
        run: The run.
        steps: Steps of the weights that were kept.
        start_count: The factor before what the start stores of its data; None if the result has
            none of it.
    """
    config, units = run.config, run.units
    named: dict[Literal["remove", "contrast", "add"], Rows | None]
    named = {"remove": config.remove, "contrast": config.contrast, "add": config.add}
    counts = {"remove": units.removed, "contrast": units.contrast, "add": units.added}
    rows = tuple(
        EditedRows(
            kind=kind,
            label=label_of(source),
            observations=counts[kind],
            sha256=digest(run.parts[kind]),
        )
        for kind, source in named.items()
        if source is not None
    )
    return Edit(
        rows=rows,
        removal=config.removal if config.remove is not None else None,
        memory=_memory_of(run.memory) if run.memory is not None else None,
        kappa=units.kappa,
        tau=units.tau,
        prior=chosen_prior(config, is_stored=bool(run.places)),
        pool=config.pool,
        steps=steps,
        base=units.base,
        base_is_recorded=units.base_is_recorded,
        start=run.base,
        start_precision=None if start_count is None else run.precision,
        start_count=start_count,
    )


def label_of(rows: Rows) -> str:
    """Where rows come from: Hub ids, and of local paths the last part."""
    return ", ".join(ref if is_hub_id(ref) else Path(ref).name for ref in rows.sources)


def _memory_of(memory: Memory) -> EditMemory:
    facts = memory.facts
    kind: Literal["rows", "self_generated", "both"] = "rows" if facts.rows else "self_generated"
    return EditMemory(
        kind="both" if facts.rows and facts.self_generated else kind,
        observations=facts.observations,
        sha256=facts.sha256,
    )


def _save_posterior(
    run: Run, flushed: Flushed, health: dict[str, float], steps: int, folder: Path
) -> None:
    """Write the posterior beside the model that `save_model` wrote."""
    model, info = run.loaded.model, run.info
    with SafetensorsSource(checkpoint_files(folder)) as source:
        mean = identify(source)
    edit = edit_of(run, steps, flushed.start_count)
    record = PosteriorInfo(
        estimator=ESTIMATOR,
        unit=run.units.unit,  # type: ignore[arg-type]
        observations=flushed.observations,
        ess=flushed.observations,
        sampled=flushed.sampled,
        prior=flushed.prior,
        anchor=_anchor(edit),
        mean=mean,
        base=run.base,
        tokenizer=tokenizer_identity(folder),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        training={"optimizer": run.config.optimizer}
        | run.units.record()
        | {LOSS: trained_loss(model).name},
        health=health,
        aliases=dict(getattr(model, "all_tied_weights_keys", None) or {}),
        edits=(*(() if info is None else info.edits), edit),
    )
    arrays = {
        name: tensor.detach().cpu().float().numpy()
        for name, tensor in checkpoint_names(model, flushed.precision).items()
    }
    save_posterior(folder, arrays, record)


def _anchor(edit: Edit) -> Anchor:
    """What held the weights at the start; only one number for all of them can be recorded."""
    if not edit.tau or (edit.prior == "none" and edit.memory is None):
        return Anchor()
    is_number = isinstance(edit.prior, float) and edit.memory is None
    return Anchor(kind="base", precision=edit.tau * float(edit.prior) if is_number else None)


def _health(flushed: Flushed) -> dict[str, float]:
    return {
        "flush_examples": float(flushed.sampled),
        "guarded_share": flushed.guarded_share,
    } | precision_health(flushed.precision)


def _write_report(report: AdaptReport, folder: Path) -> None:
    """Write what the run did, without the path, which may be pushed."""
    content = report.model_dump_json(indent=2, exclude={"path"})
    (folder / ADAPT_REPORT).write_text(content + "\n")


def _write_memory(texts: Sequence[str], column: str, folder: Path) -> None:
    """Write the texts of the model as rows, for `bmerge precision` and further adaptations."""
    with (folder / MEMORY).open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({column: text}) + "\n")
