"""What an adaptation would do: its rows, weights of the terms, steps, passes, memory and files.

Model and rows are loaded as for the run itself, so that what would be refused is refused here.
Nothing is trained or written.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.data import Run, load_run, training_config
from mergekit_bayes.adapt.flush import flushed_parts, why_none
from mergekit_bayes.adapt.kept import refuse_kept, steps_of
from mergekit_bayes.adapt.memory import refuse_memory
from mergekit_bayes.adapt.reconstruction import MOST
from mergekit_bayes.adapt.refusals import refuse_settings
from mergekit_bayes.adapt.settings import AdaptConfig, Rows
from mergekit_bayes.adapt.teacher import chosen_teacher
from mergekit_bayes.adapt.weights import chosen_prior
from mergekit_bayes.checkpoint.side_files import ADAPT, ADAPT_REPORT, MEMORY
from mergekit_bayes.evaluate.scorers import open_scorers
from mergekit_bayes.finetune.checkpoints import checkpoints_of, has_folder
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.finetune.session import refuse_output
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.records import Frozen

_FLOAT32 = 4  # bytes


class PlannedPart(Frozen):
    """Rows of one kind.

    Attributes:
        name: `remove`, `contrast`, `add`, `memory` or `held_out`.
        sources: Where they come from.
        rows: Rows that were read, after `where` and `max_rows`.
        examples: Examples that are trained on: rows, or blocks of packed rows.
        observations: Observations in these: scored tokens of a language model.
        held_out: Examples that are not trained on.
    """

    name: str
    sources: tuple[str, ...]
    rows: int
    examples: int
    observations: int
    held_out: int


class Passes(Frozen):
    """Examples that pass through the model, if the run makes all steps.

    Attributes:
        trained: Forward and backward, of all kinds and processes together.
        teacher: Forward, through the start.
        checked: Forward, of the held-out examples in all checks.
        continuations: Continuations that all checks draw.
        flushed: Forward and backward, for the stored precision.
        reconstructed: Forward and backward, and forward through the start, for the
            gradient-reconstruction error.
    """

    trained: int
    teacher: int
    checked: int
    continuations: int
    flushed: int
    reconstructed: int


class Bytes(Frozen):
    """Numbers that stay in memory during training, in bytes; activations come on top.

    Attributes:
        weights: The model, with its adapter.
        teacher: The second copy of the start, or its stored predictions, in main memory; 0 where
            the adapter is switched off instead.
        gradients: One a trained weight.
        optimizer: Two a trained weight.
        undo: The weights before the last step, where there is a memory that can show a leap.
        best: Those of the best check so far, in main memory.
        prior: theta_0 and S_w of the weight-space part, at most.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    undo: int
    best: int
    prior: int


class AdaptPlan(Frozen):
    """What an adaptation would do.

    Attributes:
        model: The model as it was named.
        task: `causal-lm` or `classification`.
        parameters: Weights of the model, with its adapter.
        trained: Those that are trained.
        posterior: Estimator of the stored precision; None without one.
        parts: The rows.
        memory_self_generated: Texts that the model will write; they are not counted yet.
        unit: What an observation is: a token or an example.
        removed: N_r, observations that are removed.
        added: N_a, observations that are added.
        base: N_0, observations that the start stands for.
        base_is_recorded: Whether the posterior or the settings say so.
        kappa: Weight of one memory observation; None where it depends on texts that the model has
            yet to write.
        tau: Weight of the K-prior.
        learning_rate: At the start.
        removal: Loss of the removed rows; None without any.
        prior: Weight-space part of the K-prior.
        teacher: Where the start's predictions come from.
        optimizer: `adamw` or `ivon`.
        steps: Optimizer steps at most.
        checks: Checks of the goals at most, with that of the start.
        passes: Examples that pass through the model.
        bytes: Numbers that stay in memory.
        goals: What ends the run before its last step, in words.
        stored: What is written, by its path.
        without_precision: Why no precision will be stored; None if one will.
    """

    model: str
    task: str
    parameters: int
    trained: int
    posterior: str | None
    parts: tuple[PlannedPart, ...]
    memory_self_generated: int
    unit: str
    removed: int
    added: int
    base: float
    base_is_recorded: bool
    kappa: float | None
    tau: float
    learning_rate: float
    removal: str | None
    prior: Literal["stored", "none"] | float
    teacher: str
    optimizer: str
    steps: int
    checks: int
    passes: Passes
    bytes: Bytes
    goals: tuple[str, ...]
    stored: dict[str, str]
    without_precision: str | None


def plan_adapt(config: AdaptConfig, *, quiet: bool = False) -> AdaptPlan:
    """Load what an adaptation would load, and say what it would do.

    The model writes no texts, and a choice by leverage is counted as a random one.

    Args:
        config: Settings of the run.
        quiet: Show no progress bars.

    Raises:
        CheckpointError: The output exists, or would replace the model or the rows, or the model,
            rows, prompts or scorer cannot be loaded.
        ConfigError: Settings that contradict each other, or a model that cannot be adapted.
        MismatchError: Rows without the named columns or with unknown labels.
    """
    training = training_config(config)
    refuse_before(training)
    refuse_settings(config)
    refuse_output(training)
    refuse_kept(config)
    loadable = config.model_copy(
        update={
            "memory_self_generated": None,
            "memory_filter": None,
            "memory_select": "random",
        }
    )
    with quiet_libraries(bars=not quiet):
        named = dict.fromkeys((config.scorer, config.memory_filter))  # which may be the same
        scorers = [spec for spec in named if spec is not None]
        open_scorers(scorers, trust_remote_code=config.trust_remote_code, single=True)
        run = load_run(loadable)
        parts = tuple(_parts(config, run))
    refuse_memory(config, run.loaded)
    units, model = run.units, run.loaded.model
    checks = _checks(config)
    written = config.memory_self_generated or 0
    kappa = config.kappa if written else units.kappa
    return AdaptPlan(
        model=config.model,
        task=run.loaded.task,
        parameters=_entries(model.parameters()),
        trained=_entries(_trained(model)),
        posterior=None if run.info is None else run.info.estimator,
        parts=parts,
        memory_self_generated=written,
        unit=units.unit,
        removed=units.removed,
        added=units.added,
        base=units.base,
        base_is_recorded=units.base_is_recorded,
        kappa=kappa,
        tau=units.tau,
        learning_rate=units.learning_rate,
        removal=config.removal if config.remove is not None else None,
        prior=chosen_prior(config, is_stored=bool(run.places)),
        teacher=chosen_teacher(config),
        optimizer=config.optimizer,
        steps=units.steps,
        checks=checks,
        passes=_passes(config, run, checks),
        bytes=_bytes(config, run),
        goals=_goals(config),
        stored=_stored(config, run),
        without_precision=why_none(config, is_stored=bool(run.places)),
    )


def _parts(config: AdaptConfig, run: Run) -> Iterator[PlannedPart]:
    named: dict[str, Rows | None] = {
        "remove": config.remove,
        "contrast": config.contrast,
        "add": config.add,
        "memory": config.memory,
        "held_out": config.held_out,
    }
    task, held = run.loaded.task, run.held
    kept = {"remove": [] if config.held_out else held.removed, "memory": held.memory}
    for name, rows in named.items():
        if rows is None:
            continue
        examples = run.parts.get(name, [])
        yield PlannedPart(
            name=name,
            sources=rows.sources,
            rows=_rows(config, rows),
            examples=len(examples),
            observations=observations(examples, task),
            held_out=len(held.removed if name == "held_out" else kept.get(name, [])),
        )


def _rows(config: AdaptConfig, rows: Rows) -> int:
    return len(
        load_rows(rows.data, where=rows.where, max_rows=config.max_rows, text=config.text_column)
    )


def _trained(model: Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _entries(parameters: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _checks(config: AdaptConfig) -> int:
    """Checks if all steps are made: one of the start, one every so many steps, one at the end."""
    if not config.has_checks:
        return 0
    return 1 + math.ceil(config.max_steps / config.check_every)


def _passes(config: AdaptConfig, run: Run, checks: int) -> Passes:
    of_a_kind = (
        config.max_steps
        * config.batch_size
        * config.gradient_accumulation
        * (config.num_processes or 1)
    )
    flushed = 0
    if why_none(config, is_stored=bool(run.places)) is None:
        kinds = flushed_parts(run.places, config.parts)
        flushed = len(kinds) * config.flush_batches * config.batch_size
    memory, held = run.parts.get("memory", []), run.held.memory
    predicted = of_a_kind * len(config.asked)
    if config.teacher == "stored":  # each once, before the first step
        predicted = sum(len(run.parts.get(name, [])) for name in config.asked) + len(held)
    return Passes(
        trained=of_a_kind * len(config.parts),
        teacher=predicted,
        checked=checks * (len(run.held.removed) + len(run.held.memory)),
        continuations=checks * len(run.prompts) * config.continuations,
        flushed=flushed,
        reconstructed=min(MOST, len(memory)) + len(held) if len(held) > 1 else 0,
    )


def _bytes(config: AdaptConfig, run: Run) -> Bytes:
    model = run.loaded.model
    weights = sum(p.nbytes for p in model.parameters())
    trained = _trained(model)
    gradients = sum(p.nbytes for p in trained)
    # AdamW's two moments are of the weights' dtype, IVON's two are float32.
    moments = _FLOAT32 * _entries(trained) if config.optimizer == "ivon" else gradients
    prior = 0
    if (
        chosen_prior(config, is_stored=bool(run.places)) != "none"
    ):  # an adapter's change is measured from 0
        precise = _entries([place.parameter for place in run.places])
        prior = _FLOAT32 * precise + (gradients if config.lora is None else 0)
    return Bytes(
        weights=weights,
        teacher=_teacher_bytes(config, run, weights),
        gradients=gradients,
        optimizer=2 * moments,
        undo=gradients if config.has_memory else 0,
        best=gradients if config.has_goals else 0,
        prior=prior,
    )


def _teacher_bytes(config: AdaptConfig, run: Run, weights: int) -> int:
    if (kind := chosen_teacher(config)) != "stored":
        return weights if kind == "copy" else 0
    held = observations(run.held.memory, run.loaded.task)
    removed = run.units.removed if "remove" in config.asked else 0
    return (2 * _FLOAT32 * config.top_k + _FLOAT32) * (run.units.memory + held) + _FLOAT32 * removed


def _goals(config: AdaptConfig) -> tuple[str, ...]:
    until, goals = config.until, []
    if until.toxic_share is not None:
        goals.append(f"toxic share of at most {until.toxic_share:g} by {config.scorer}")
    if until.held_out_rise is not None:
        goals.append(f"held-out loss risen by {until.held_out_rise:g} nats an observation")
    if until.memory_kl is not None:
        goals.append(f"KL on the held-out memory above {until.memory_kl:g} nats an observation")
    return tuple(goals)


def _stored(config: AdaptConfig, run: Run) -> dict[str, str]:
    target = Path(config.output)
    model = "the adapter" if hasattr(run.loaded.model, "peft_config") else "the model"
    stored = {
        str(target): f"{model} and its tokenizer",
        str(target / ADAPT): "the settings of the run",
        str(target / ADAPT_REPORT): "what the run did",
    }
    if why_none(config, is_stored=bool(run.places)) is None:
        trained = _entries(_trained(run.loaded.model))
        start = "the start's" if run.places else "the memory's curvature"
        stored[str(target / "posterior")] = (
            f"precision of {trained:,} weights, float32: {start} plus the curvature of added rows "
            "less that of removed ones"
        )
    if config.memory_self_generated is not None:
        stored[str(target / MEMORY)] = "the texts that the model wrote"
    if config.keep_steps:
        steps = ", ".join(map(str, config.keep_steps))
        stored[str(steps_of(target))] = f"{model} after step {steps}"
    if has_folder(training_config(config)):
        kept = "kept" if config.keep_checkpoints else "removed at the end"
        stored[str(checkpoints_of(target))] = f"checkpoints and logs, {kept}"
    return stored
