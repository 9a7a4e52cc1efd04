"""Decide everything about a merge before any tensor is read.

A plan is made from file headers and a few sampled blocks: names, shapes, counts, priors, anchors
and outputs. Every mismatch is found first, and `--dry-run` costs nothing. `merge.run_merge` carries
a plan out.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.checkpoint.stamps import Stamp, documents_in, refuse_changed, stamps_of
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora import is_adapter, open_model, refuse_other_base
from mergekit_bayes.lora.writers import refuse_factors
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.beside import plan_beside
from mergekit_bayes.plan.guard import choose_guard
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.lost_heads import refuse_lost_heads
from mergekit_bayes.plan.match import match_tensors
from mergekit_bayes.plan.merged_info import merged_info
from mergekit_bayes.plan.mixtures import refuse_matrices_of, with_components
from mergekit_bayes.plan.options import (
    Shrink,
    check_options,
    choose_method,
    parse_scales,
    parse_shrink,
)
from mergekit_bayes.plan.outputs import choose_target, split_shards
from mergekit_bayes.plan.own_base import ON_OTHER_BASE, on_own_base
from mergekit_bayes.plan.precision_checks import check_precisions
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.side_files import SideFileChoice, refuse_links
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.plan.summary import matrices_in_words, summarise
from mergekit_bayes.plan.trajectory import along_trajectory
from mergekit_bayes.plan.weigh import weigh
from mergekit_bayes.plan.whole_tensors import memory_in_words, with_settings
from mergekit_bayes.posterior import Posterior, PosteriorInfo

_DIGITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}  # significand


@dataclass(frozen=True)
class MergePlan(Closing):
    """A merge that can be carried out.

    Attributes:
        config: What was asked for.
        method: The merging rule.
        settings: The method's own settings, checked.
        inputs: The base, if any, and the tasks.
        guard: rho of the guard on removal, as it is used.
        shrink: The shrinkage of each likelihood precision; None for none.
        steps: The tensors of the output, in order.
        shards: Names of the tensors of each output file.
        left_out: Tensors that are not in the output, with the reason.
        decisions: What a rule (tied heads, `--on-missing`, `--vocab`) decided, by tensor.
        notes: Remarks for the report.
        target: The output: a folder, or a `.safetensors` file.
        info: The record of the merged precision, its identity still blank; None where no precision
            is written.
        config_changes: Keys of the written `config.json` that the merge sets, because the copied
            value would not be true of the output; None removes a key. A key that a nested
            `text_config` has is set there, too.
        drawing_identities: Content hash of each model without stored copies of tied tensors, by
            which random numbers are drawn; empty where the method draws none.
        side_files: Where the output's side files come from; None where it has none.
        documents: The configs, tokenizers and the like that were read or will be copied, as they
            were before.
        recipe: The recipe of another tool that the merge carries out, resolved; the output gets it
            in place of our own. None for a merge by our settings.
        made_files: The text of side files that are made for the output, by name, in place of copied
            ones; None for one that is not copied either.
        does: What the merge does, in one line, where the settings do not say it.
        stages: What the reports of earlier merges say of their models, by the ref of the output
            that is merged here.
    """

    config: MergeConfig
    method: Method
    settings: dict[str, float | str]
    inputs: Inputs
    guard: float
    shrink: Shrink | None
    steps: tuple[Step, ...]
    shards: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]
    decisions: dict[str, str]
    notes: tuple[str, ...]
    target: Path
    info: PosteriorInfo | None = field(repr=False)
    config_changes: dict[str, object] = field(default_factory=dict)
    drawing_identities: dict[Input, str] = field(default_factory=dict)
    side_files: SideFileChoice | None = None
    documents: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)
    recipe: str | None = None
    made_files: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    does: str | None = None
    stages: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> Input | None:
        """What the tasks were fine-tuned from; None for an average."""
        return self.inputs.base

    @property
    def tasks(self) -> tuple[Input, ...]:
        """The models that are merged, in the order of the command line."""
        return self.inputs.tasks

    @property
    def summary(self) -> str:
        """What the merge does, in one line."""
        if self.does is not None:
            return self.does
        has_rules = any(isinstance(scale, str) for scale in self.config.scale)
        return summarise(self.method, self.inputs, has_rules=has_rules)

    @property
    def to_file(self) -> bool:
        """Whether the output is one file rather than a folder."""
        return self.target.suffix == ".safetensors"

    def refuse_changed(self, *, full: bool = False) -> None:
        """Check that all inputs are what they were when the plan was made.

        Args:
            full: Hash all bytes of all tensors again.

        Raises:
            ChangedError: A file was written to or replaced.
            CheckpointError: A file is gone or cannot be reached.
        """
        refuse_changed({**self.inputs.files, **self.documents})
        if full:
            for model in self.inputs:
                model.posterior.refuse_other_bytes()

    def close(self) -> None:
        """Close the files of all models."""
        self.inputs.close()


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the models' headers and decide the merge.

    Args:
        config: The settings.

    Returns:
        The plan, which holds the models' files open until it is closed.

    Raises:
        ConfigError: Options that contradict each other.
        CheckpointError: A file that cannot be read, or that was changed while it was read, or an
            output that exists.
        MismatchError: Models that do not fit together.
        PrecisionError: A precision that is missing or belongs to other weights.
    """
    notes: list[str] = []
    config = along_trajectory(on_own_base(config), notes)
    scales, rules = parse_scales(config)
    method, settings = choose_method(config)
    check_options(config, method, scales, rules)
    with ExitStack() as stack:
        inputs = _open_inputs(config, method, scales, stack)
        as_named = config
        config, inputs, rules = with_components(config, method, inputs, rules, stack, notes)
        _check_identities(config, method, inputs)
        is_mixed = any(task.mixture is not None for task in inputs.tasks)
        refuse_links(inputs)
        documents = stamps_of(file for path in inputs.folders for file in documents_in(path))
        target = choose_target(config, inputs)
        notes += [note for model in inputs for note in model.posterior.mean.notes]
        tokens = None
        if config.vocab == "union":
            from mergekit_bayes.plan.united import unite  # few merges need what reads vocabularies

            inputs, tokens = unite(method, inputs, notes)
        guard, info = config.guard, None
        if method.needs_precision:
            check_precisions(config, method, inputs, notes)
            inputs = weigh(config, inputs, notes)
            if "guard" not in method.ignores:
                guard = choose_guard(config, inputs, rules, notes)
        refuse_lost_heads(inputs)
        matched = match_tensors(config, method, inputs, rules, notes)
        refuse_matrices_of(matched.steps)
        matched.steps[:] = with_settings(method, settings, matched.steps)
        beside = plan_beside(config, inputs, matched.steps, target, tokens, notes)
        if (matrices := matrices_in_words(matched.steps)) is not None:
            notes.append(matrices)
        if (whole := memory_in_words(method, matched.steps)) is not None:
            notes.append(whole)
        if config.dtype is None:  # else the narrowing was asked for
            note_narrowing(matched.steps, inputs, notes)
        if config.posterior and method.writes_posterior:
            # A task that left a tensor alone has scale zero there, which is the same merge as with
            # its own scale.
            uneven = bool(rules) or is_mixed or any(_is_cut(step) for step in matched.steps)
            info = merged_info(config, inputs, matched.ties, uneven=uneven)
        plan = MergePlan(
            config=as_named,
            method=method,
            settings=settings,
            inputs=inputs,
            guard=guard,
            shrink=parse_shrink(config.shrink),
            steps=tuple(matched.steps),
            shards=split_shards(config, matched.steps, inputs.donor.posterior, target),
            left_out=matched.left_out,
            decisions=matched.decisions,
            notes=tuple(notes),
            target=target,
            info=info,
            config_changes=beside.config_changes | matched.ties.config_changes,
            drawing_identities=(
                {model: matched.ties.drawing_identity(model) for model in inputs}
                if method.random
                else {}
            ),
            side_files=beside.side_files,
            documents=beside.copied | documents,
            made_files=beside.made,
        )
        plan.refuse_changed()
        stack.pop_all()  # the plan closes them
        return plan


def _open_inputs(
    config: MergeConfig, method: Method, scales: Sequence[float], stack: ExitStack
) -> Inputs:
    """Open all models."""
    base = None
    if config.base is not None:
        base = Input(stack.enter_context(_open(config, config.base, method)), 0.0)
    tasks = [
        Input(stack.enter_context(_open(config, ref, method)), scale)
        for ref, scale in zip(config.models, scales, strict=True)
    ]
    inputs = Inputs(base, tuple(tasks))
    for model in inputs:
        refuse_incomplete(model.posterior)
        if config.on_base == "error":
            refuse_other_base(model.posterior, ON_OTHER_BASE)
    return inputs


def refuse_incomplete(model: Posterior) -> None:
    """Refuse an adapter, or a model with the factors of one, among whole models.

    Raises:
        MismatchError: It is one.
    """
    if is_adapter(model.path):
        raise MismatchError(
            f"'{model.ref}' is an adapter among whole models. Put its base before it: "
            f"BASE+{model.ref}. (Adapters alone merge into an adapter.)"
        )
    refuse_factors(model)


def _check_identities(config: MergeConfig, method: Method, inputs: Inputs) -> None:
    """Check that all models are those that a recipe records."""
    for model in inputs:
        posterior = model.posterior
        counts = method.needs_precision and posterior.has_precision
        posterior.check_identity(
            config.identities.get(model.ref),
            config.precision_identities.get(model.ref) if counts else None,
        )
        posterior.check_identity(
            config.full_identities.get(model.ref),
            config.full_precision_identities.get(model.ref) if counts else None,
            full=True,
        )


def _open(config: MergeConfig, ref: str, method: Method) -> Posterior:
    return open_model(
        ref,
        precision=config.precision.get(ref),
        isotropic=config.isotropic.get(ref),
        with_precision=method.needs_precision,
    )


def _is_cut(step: Step) -> bool:
    """Whether only some entries of a tensor are merged."""
    return step.copied is None and step.merged < step.spec.size


def note_narrowing(steps: Sequence[Step], inputs: Inputs, notes: list[str]) -> None:
    """Say where a model holds more digits than the output.

    Args:
        steps: The tensors of the output.
        inputs: The models.
        notes: Remarks for the report are appended here.
    """
    for model in inputs:
        if model is inputs.donor or model.posterior.mean.is_computed:
            continue
        dtypes = [
            step.spec.dtype
            for step in steps
            for operand in step.operands
            if operand.mean.input is model
            and step.tied_to is None
            and _DIGITS[operand.mean.spec.dtype] > _DIGITS[step.spec.dtype]
        ]
        if dtypes:
            notes.append(
                f"'{model.ref}' has {len(dtypes)} tensors in a finer dtype than they are written "
                f"in ({dtypes[0]}, as '{inputs.donor.ref}' has them); --dtype chooses "
                "another"
            )
