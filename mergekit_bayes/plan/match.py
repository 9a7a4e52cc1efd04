"""Match the tensors of all models: which are merged, which are copied, which are left out."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_buffer, is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.names import OTHER_BASE, find_left_out, map_names
from mergekit_bayes.plan.options import ScaleRule
from mergekit_bayes.plan.precisions import (
    MatchedPrecisions,
    donor_precision,
    match_precisions,
    merged_shape,
)
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import MatchedTensors, Operand, Step, TensorRef
from mergekit_bayes.plan.tied_heads import stored_name
from mergekit_bayes.plan.vocabulary import common_entries, find_token_conflict
from mergekit_bayes.posterior.quantised import refuse_quantised

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
        refuse_quantised(model.posterior)
    token_conflict = find_token_conflict(inputs)
    names = {model: map_names(donor, model.posterior, notes) for model in inputs}
    only = re.compile(config.only) if config.only else None
    matched = MatchedTensors(find_left_out(config, inputs, names, only, notes))
    matcher = _Matcher(config, method, inputs, rules, names, only, token_conflict, matched)
    for name, spec in donor.mean.specs.items():
        step = matcher.match(name, spec)
        if step is not None:
            matched.steps.append(step)
    matcher.refuse_nothing_matched()
    return matched


class _Selection(NamedTuple):
    """What of one tensor is merged: each model's tensor, the tasks' scales, and how many entries.

    `copied` is the reason if none are merged.
    """

    means: dict[Input, TensorRef]
    scales: Scales
    merged: int
    copied: str | None


class _Matcher:
    """Matches one tensor of the donor after another."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        inputs: Inputs,
        rules: Sequence[ScaleRule],
        names: Mapping[Input, Mapping[str, str]],
        only: re.Pattern[str] | None,
        token_conflict: str | None,
        matched: MatchedTensors,
    ) -> None:
        self._config, self._method, self._inputs, self._rules = config, method, inputs, rules
        self._names, self._only, self._token_conflict = names, only, token_conflict
        self._matched = matched
        self._parameters = 0
        self._matching_rules: set[str] = set()

    def match(self, name: str, spec: TensorSpec) -> Step | None:
        """What becomes of one tensor; None if it is left out."""
        donor = Operand(self._inputs.donor, TensorRef(self._inputs.donor, name))
        if is_buffer(name) or spec.dtype not in MERGEABLE:
            return Step(name, spec, *self._roles(donor), copied=f"not a parameter ({spec.dtype})")
        selection = self._select(name, spec, donor)
        if selection is None:
            return None
        self._parameters += 1
        written = TensorSpec(self._config.dtype or spec.dtype, spec.shape)
        if selection.copied is not None:
            return self._copied(name, written, donor, selection.copied)
        return self._merged(name, written, donor, selection)

    def refuse_nothing_matched(self) -> None:
        """Raise an error if the models have no parameter in common, or an option had no effect."""
        donor, last = self._inputs.donor, self._inputs.tasks[-1]
        if self._only is not None and all(s.copied is not None for s in self._matched.steps):
            raise ConfigError(
                f"--only '{self._config.only}' matches no tensor of '{donor.ref}' that is merged."
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
                raise ConfigError(f"--scale '{rule.text}' matches no tensor of '{donor.ref}'.")

    def _select(self, name: str, spec: TensorSpec, donor: Operand) -> _Selection | None:
        """Each model's tensor and how much of it is merged; None if the tensor is left out."""
        has_base, scales = self._inputs.base is not None, self._scales(name)
        means = {donor.input: donor.mean}
        if self._only is not None and not self._only.search(name):
            # The other models are not read here: their heads may have other shapes.
            return _Selection(means, scales, 0, "not matched by --only")
        if has_base and not any(scales.values()):
            return _Selection(means, scales, 0, "all scales are zero")
        all_means = self._means(name, scales)
        if all_means is None:
            return None
        scales = {t: x if all_means[t].input is t else 0.0 for t, x in scales.items()}
        merged, reason = self._common(name, spec, all_means)
        if reason is None and has_base and not any(scales.values()):
            reason = "all scales are zero"
        return _Selection(all_means, scales, merged, reason)

    def _merged(self, name: str, spec: TensorSpec, donor: Operand, selection: _Selection) -> Step:
        means, scales, merged, _ = selection
        if not self._method.needs_precision:
            operands = _operands(means, scales, None)
            return Step(name, spec, *self._roles(*operands), merged=merged)
        precisions = match_precisions(self._inputs, name, means)
        if precisions is None:
            reason = "no model has a precision for it, and all agree"
            return Step(name, spec, *self._roles(donor), copied=reason)
        unchanged = precisions.unchanged
        scales = {task: 0.0 if task in unchanged else x for task, x in scales.items()}
        if unchanged and not any(scales.values()):
            return self._copied(name, spec, donor, "no task changed it")
        operands = _operands(means, scales, precisions)
        forms = [precision.form for precision in precisions.stored.values()]
        shape = merged_shape(self._config, spec, forms, merged)
        return Step(name, spec, *self._roles(*operands), shape, merged)

    def _copied(self, name: str, spec: TensorSpec, donor: Operand, reason: str) -> Step:
        precision, shape = None, None
        if self._method.needs_precision:
            precision = donor_precision(name, donor.mean)
        if precision is not None:
            shape = merged_shape(self._config, spec, [precision.form], 0)
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
        tasks = self._inputs.tasks
        scales = {task: task.scale for task in tasks}
        for rule in self._rules:
            if rule.pattern.search(name):
                scales |= {tasks[position]: rule.scale for position in rule.tasks}
                self._matching_rules.add(rule.text)
        if self._inputs.base is None and sum(scales.values()) <= 0:
            raise ConfigError(
                f"--scale leaves '{name}' without a share of any model. Give one of them more than "
                "zero there, or name a --base to keep."
            )
        return scales

    def _means(self, name: str, scales: Scales) -> dict[Input, TensorRef] | None:
        """Each model's tensor; None if the tensor is left out.

        A task of scale zero need not have the tensor: the base's stands in.
        """
        config, base, donor = self._config, self._inputs.base, self._inputs.donor
        means: dict[Input, TensorRef] = {}
        for model in self._inputs:
            if base is not None and scales.get(model) == 0:
                means[model] = TensorRef(base, name)
                continue
            stored, decision = stored_name(name, model.posterior, self._names[model])
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
                means[model] = TensorRef(donor, name)
            else:
                keep = "--on-missing base takes it as unchanged, " if base is not None else ""
                raise MismatchError(
                    f"'{name}' is in '{donor.ref}' but not in '{model.ref}'. {OTHER_BASE} "
                    f"{keep}--on-missing skip leaves it out."
                )
        return means

    def _common(
        self, name: str, spec: TensorSpec, means: Mapping[Input, TensorRef]
    ) -> tuple[int, str | None]:
        """How many entries are merged, and the reason if there are none."""
        donor = self._inputs.donor.ref
        common = common_entries(self._config, name, spec, list(means.values()), donor)
        if common.decision is not None:
            self._matched.record_decision(name, common.decision)
        if self._token_conflict is not None and is_vocabulary(name):
            if self._config.vocab != "base":
                raise MismatchError(self._token_conflict)
            return common.merged, "tokenizers differ; --vocab base"
        return common.merged, common.copied


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
