"""Match the tensors of all models: which are merged, which are copied, which are left out."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mergekit_bayes.checkpoint.layers import linear_axes
from mergekit_bayes.checkpoint.names import is_buffer, is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError, shown
from mergekit_bayes.methods.base import Method
from mergekit_bayes.patterns import LONGEST_NAME, PatternError, compile_pattern
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.left_over import missing_in
from mergekit_bayes.plan.missing_layers import explain_missing_layers
from mergekit_bayes.plan.names import OTHER_BASE, find_left_out, map_names
from mergekit_bayes.plan.options import NOT_KNOWN_YET, ScaleRule
from mergekit_bayes.plan.precisions import (
    MatchedPrecisions,
    donor_precision,
    match_precisions,
    matrices_of,
    merged_shape,
    refuse_no_matrices,
)
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import MatchedTensors, Operand, Step, TensorRef
from mergekit_bayes.plan.tied_heads import Ties, rename_copies
from mergekit_bayes.plan.vocabulary import TokenConflicts, common_entries
from mergekit_bayes.posterior.quantised import refuse_emptied, refuse_quantised

Scales = dict[Input, float]  # of the tasks, in one tensor


def match_tensors(
    config: MergeConfig,
    method: Method,
    inputs: Inputs,
    rules: Sequence[ScaleRule],
    notes: list[str],
) -> MatchedTensors:
    """Decide what becomes of every tensor.

    Args:
        config: The settings.
        method: The merging rule.
        inputs: The models.
        rules: Scales that hold for some tensors only.
        notes: Remarks for the report are appended here.

    Raises:
        ConfigError: `--only` or a rule of `--scale` matches nothing, or leaves nothing.
        MismatchError: Models that do not fit together where no rule decides.
        PrecisionError: A precision that is missing or does not fit.
    """
    donor = inputs.donor.posterior
    for model in inputs:
        refuse_emptied(model.posterior)
        refuse_quantised(model.posterior)
    names = {
        model: rename_copies(donor, model.posterior, map_names(donor, model.posterior, notes))
        for model in inputs
    }
    _check_patterns(config, inputs, rules)
    only = (
        compile_pattern(config.only, anywhere=True, longest=NOT_KNOWN_YET) if config.only else None
    )

    def matters(model: Input, tensors: Collection[str]) -> bool:
        merged = [name for name in tensors if only is None or only.search(name)]
        return any(_scales_in(name, inputs, rules).get(model) for name in merged)

    ties = Ties(inputs, names, matters)
    matched = MatchedTensors(find_left_out(config, inputs, names, ties, only, notes), ties)
    matcher = _Matcher(config, method, inputs, rules, only, matched, names)
    written = (*donor.mean.specs, *ties.added)
    steps = {name: matcher.match(name) for name in written if name not in ties.copies}
    steps |= {name: matcher.copy(name, steps[source]) for name, source in ties.copies.items()}
    matched.steps.extend(step for name in written if (step := steps[name]) is not None)
    matcher.refuse_nothing_matched()
    refuse_no_matrices(method, matched.steps)
    ties.forget(matched.left_out)
    if ties.config_changes:
        notes.append(ties.describe_untied())
    return matched


def _check_patterns(config: MergeConfig, inputs: Inputs, rules: Sequence[ScaleRule]) -> None:
    """Refuse names of tensors on which a pattern could take long."""
    patterns = {f"--scale {shown(rule.text)}": rule.pattern.pattern for rule in rules}
    if config.only:
        patterns[f"--only {shown(config.only)}"] = config.only
    if not patterns:
        return
    models = {name: model for model in inputs for name in model.posterior.mean.specs}
    name = max(models, key=len, default="")
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"'{models[name].ref}' has a tensor with a name of {len(name):,} characters, "
            f"{shown(name)}, where --only and --scale MODEL:REGEX=X match names of up to "
            f"{LONGEST_NAME}. Rename it, or drop these options."
        )
    for setting, pattern in patterns.items():
        try:
            compile_pattern(pattern, anywhere=True, longest=len(name))
        except PatternError as error:
            raise ConfigError(
                f"{setting} is not used as a regular expression: with names such as {shown(name)} "
                f"{error}."
            ) from None


class _Selection(NamedTuple):
    """What of one tensor is merged: each model's tensor, the tasks' scales, and how many entries.

    `copied` is the reason if none are merged. `rest` gives the rows that the donor lacks.
    """

    means: dict[Input, TensorRef]
    scales: Scales
    merged: int
    copied: str | None
    rest: TensorRef | None = None


class _Matcher:
    """Matches one tensor of the donor after another."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        inputs: Inputs,
        rules: Sequence[ScaleRule],
        only: re.Pattern[str] | None,
        matched: MatchedTensors,
        names: Mapping[Input, Mapping[str, str]],
    ) -> None:
        self._config, self._method, self._inputs, self._rules = config, method, inputs, rules
        self._names = names
        self._only, self._token_conflicts = only, TokenConflicts(inputs)
        self._matched, self._ties = matched, matched.ties
        self._parameters = 0
        self._matching_rules: set[str] = set()
        # Where the method itself takes whole matrices, and no precision says which.
        by_name = method.matrix is not None and not method.needs_precision
        self._linear = linear_axes(inputs.donor.posterior.mean.specs) if by_name else {}

    def match(self, name: str) -> Step | None:
        """What becomes of one tensor of the output; None if it is left out."""
        stored, _ = self._ties.stored_name(name, self._inputs.donor)
        assert stored is not None
        donor = Operand(self._inputs.donor, TensorRef(self._inputs.donor, stored))
        spec = donor.mean.spec
        if is_buffer(name) or spec.dtype not in MERGEABLE:
            return Step(name, spec, *self._roles(donor), copied=f"not a parameter ({spec.dtype})")
        selection = self._select(name, spec, donor)
        if selection is None:
            return None
        self._parameters += 1
        written = TensorSpec(self._config.dtype or donor.mean.stored_dtype, spec.shape)
        if selection.copied is not None:
            return self._copied(name, written, donor, selection.copied)
        return self._merged(name, written, donor, selection)

    def copy(self, name: str, source: Step | None) -> Step | None:
        """The copy of a tensor under another name; None if the tensor is left out."""
        tied_to = self._ties.copies[name]
        if source is None:
            self._matched.left_out[name] = f"tied to '{tied_to}', which is left out"
            return None
        self._matched.record_decision(name, f"tied to '{tied_to}', and written as a copy of it")
        return replace(source, name=name, precision_shape=None, tied_to=tied_to)

    def refuse_nothing_matched(self) -> None:
        """Raise an error if the models have no parameter in common, or an option had no effect."""
        donor, last = self._inputs.donor, self._inputs.tasks[-1]
        if self._only is not None and all(s.copied is not None for s in self._matched.steps):
            raise ConfigError(
                f"--only '{self._config.only}' matches no tensor of '{donor.ref}' that is merged."
                f"{self._copy_hint(self._only)}"
            )
        specs = donor.posterior.mean.specs
        if not self._parameters and specs:
            raise MismatchError(
                f"'{donor.ref}' and '{last.ref}' have no parameter in common "
                f"('{next(iter(specs))}' there, "
                f"'{next(iter(last.posterior.mean.specs), 'none')}' here). Are they of one "
                "architecture?"
            )
        for rule in self._rules:
            if rule.text not in self._matching_rules:
                raise ConfigError(
                    f"--scale '{rule.text}' matches no tensor of '{donor.ref}'."
                    f"{self._copy_hint(rule.pattern)}"
                )

    def _copy_hint(self, pattern: re.Pattern[str]) -> str:
        """What to name in place of a copy that a pattern matches; empty if it matches none."""
        copies = self._ties.copies
        for name, source in copies.items():
            if pattern.search(name) and not pattern.search(source):
                return f" '{name}' is a copy of '{source}': name that one."
        return ""

    def _select(self, name: str, spec: TensorSpec, donor: Operand) -> _Selection | None:
        """Each model's tensor and how much of it is merged; None if the tensor is left out."""
        has_base, scales = self._inputs.base is not None, self._scales(name)
        means = {donor.input: donor.mean}
        if self._only is not None and not self._only.search(name):
            # The other models are not read here: their heads may have other shapes.
            return _Selection(means, scales, 0, "not matched by --only")
        if has_base and not any(scales.values()):
            return _Selection(means, scales, 0, "all scales are zero")
        all_means = self._means(name, scales, donor.mean)
        if all_means is None:
            return None
        scales = {t: x if all_means[t].input is t else 0.0 for t, x in scales.items()}
        merged, reason, rest = self._common(name, spec, all_means, scales)
        if reason is None and has_base and not any(scales.values()):
            reason = "all scales are zero"
        return _Selection(all_means, scales, merged, reason, rest)

    def _merged(self, name: str, spec: TensorSpec, donor: Operand, selection: _Selection) -> Step:
        means, scales, merged, _, rest = selection
        if rest is not None:
            spec = TensorSpec(spec.dtype, rest.spec.shape)
        if not self._method.needs_precision:
            operands = _operands(means, scales, None)
            roles = self._roles(*operands)
            axis = self._linear.get(name) if merged == spec.size else None
            return Step(name, spec, *roles, merged=merged, rest=_owner(rest, operands), axis=axis)
        precisions = match_precisions(self._inputs, name, means)
        if precisions is None:
            reason = "no model has a precision for it, and all agree"
            return Step(name, spec, *self._roles(donor), copied=reason)
        unchanged = precisions.unchanged
        scales = {task: 0.0 if task in unchanged else x for task, x in scales.items()}
        if unchanged and not any(scales.values()):
            return self._copied(name, spec, donor, "no task changed it")
        operands = _operands(means, scales, precisions)
        roles = self._roles(*operands)
        removes = any(scale < 0 for scale in scales.values())
        matrices = matrices_of(self._config, self._method, name, precisions.stored, removes=removes)
        if matrices is not None:
            if merged != spec.size:
                raise MismatchError(
                    f"'{name}' has other rows in one of the models, and its precisions are "
                    "matrices, which are merged as a whole. Leave it out with --only."
                )
            shape, axis = matrices
            return Step(name, spec, *roles, shape, merged, axis=axis)
        forms = [precision.form for precision in precisions.stored.values()]
        shape = merged_shape(self._config, spec, forms, merged)
        return Step(name, spec, *roles, shape, merged, rest=_owner(rest, operands))

    def _copied(self, name: str, spec: TensorSpec, donor: Operand, reason: str) -> Step:
        precision, shape = None, None
        if self._method.needs_precision:
            precision = donor_precision(name, donor.mean)
        if precision is not None:
            matrices = matrices_of(self._config, self._method, name, {donor.input: precision})
            forms = [precision.form]
            shape = matrices.shape if matrices else merged_shape(self._config, spec, forms, 0)
        roles = self._roles(donor._replace(precision=precision))
        return Step(name, spec, *roles, precision_shape=shape, copied=reason)

    def _roles(self, *operands: Operand) -> tuple[Operand | None, tuple[Operand, ...]]:
        """The operand of the base, None without one, and those of the tasks."""
        if self._inputs.base is None:
            return None, operands
        base, *tasks = operands
        return base, tuple(tasks)

    def _scales(self, name: str) -> Scales:
        """The scale of each task in one tensor."""
        scales = _scales_in(name, self._inputs, self._rules)
        self._matching_rules |= {r.text for r in self._rules if r.pattern.search(name)}
        if self._inputs.base is None and sum(scales.values()) <= 0:
            raise ConfigError(
                f"--scale leaves '{name}' without a share of any model. Give one of them more than "
                "zero there, or name a --base to keep."
            )
        return scales

    def _means(self, name: str, scales: Scales, donors: TensorRef) -> dict[Input, TensorRef] | None:
        """Each model's tensor; None if the tensor is left out.

        A task of scale zero need not have the tensor: the donor's stands in.
        """
        config, base = self._config, self._inputs.base
        means: dict[Input, TensorRef] = {}
        for model in self._inputs:
            if base is not None and scales.get(model) == 0:
                means[model] = donors
                continue
            stored, decision = self._ties.stored_name(name, model)
            if decision is not None:
                self._matched.record_decision(name, decision)
            if stored is not None:
                means[model] = TensorRef(model, stored)
            elif config.on_missing == "skip":
                self._matched.left_out[name] = f"'{model.ref}' has none"
                return None
            elif config.on_missing == "base":
                decision = f"'{model.ref}' has none and counts as unchanged"
                self._matched.record_decision(name, decision)
                means[model] = donors
            else:
                raise self._missing(name, model)
        return means

    def _missing(self, name: str, model: Input) -> MismatchError:
        """The error of a tensor that a model lacks and no rule decides."""
        donor, has_base = self._inputs.donor, self._inputs.base is not None
        if cause := self._ties.explain_missing(name, model):
            keep = f" --on-missing base keeps that of '{donor.ref}'." if has_base else ""
            return MismatchError(
                f"'{name}' is in '{donor.ref}' but not in '{model.ref}'. {cause}{keep}"
            )
        missing = missing_in(model, donor.posterior, self._ties, self._only)
        start = f"'{name}' ({len(missing)} such) is in '{donor.ref}' but not in '{model.ref}'."
        lost = explain_missing_layers(missing, model.posterior, self._names[model], donor.posterior)
        if lost is not None and not lost.may_be_absent:
            return MismatchError(f"{start} {lost.cause}")
        cause = lost.cause if lost is not None else OTHER_BASE
        keep = "--on-missing base takes it as unchanged, " if has_base else ""
        return MismatchError(f"{start} {cause} {keep}--on-missing skip leaves it out.")

    def _common(
        self, name: str, spec: TensorSpec, means: Mapping[Input, TensorRef], scales: Scales
    ) -> tuple[int, str | None, TensorRef | None]:
        """How many entries are merged, the reason if there are none, and who gives more rows."""
        donor = self._inputs.donor.ref
        growing = [task for task, scale in scales.items() if scale > 0]
        conflict = self._token_conflict(name, means, scales, growing)
        if conflict is not None and self._config.vocab != "base":
            raise MismatchError(conflict)
        common = common_entries(self._config, name, spec, list(means.values()), donor, growing)
        if common.decision is not None:
            self._matched.record_decision(name, common.decision)
        if conflict is not None:
            return common.merged, "tokenizers differ; --vocab base", None
        return common.merged, common.copied, common.rest

    def _token_conflict(
        self,
        name: str,
        means: Mapping[Input, TensorRef],
        scales: Scales,
        growing: Collection[Input],
    ) -> str | None:
        """The message if one row of a tensor is of different tokens in two models; else None."""
        if not is_vocabulary(name) or self._config.vocab == "union":
            return None
        rows = {
            model: mean.spec.shape[0] if mean.spec.shape else 0
            for model, mean in means.items()
            if model is self._inputs.donor or (mean.input is model and scales.get(model) != 0)
        }
        return self._token_conflicts.find(rows, growing)


def _owner(mean: TensorRef | None, operands: Sequence[Operand]) -> Operand | None:
    """The operand with a mean."""
    return None if mean is None else next(o for o in operands if o.mean == mean)


def _scales_in(name: str, inputs: Inputs, rules: Sequence[ScaleRule]) -> Scales:
    """The scale of each task in one tensor."""
    scales = {task: task.scale for task in inputs.tasks}
    for rule in rules:
        if rule.pattern.search(name):
            scales |= {inputs.tasks[position]: rule.scale for position in rule.tasks}
    return scales


def _operands(
    means: Mapping[Input, TensorRef], scales: Scales, precisions: MatchedPrecisions | None
) -> list[Operand]:
    """What each input contributes to a merged tensor, the donor first."""
    return [
        Operand(
            model,
            mean,
            scales.get(model, 0.0),
            precisions.stored[model] if precisions else None,
            precisions is None or model not in precisions.borrowed,
        )
        for model, mean in means.items()
    ]
