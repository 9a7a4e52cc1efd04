"""How much each precision counts: stored precisions become comparable likelihood precisions."""

import math
from collections.abc import Sequence
from dataclasses import replace

from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.plan.counts import (
    adapter_count,
    common_count,
    count_factor,
    recorded_count,
    requested_count,
)
from mergekit_bayes.plan.inputs import Input, Inputs, TaskAnchor, Weighing
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Identity, MergeTrace, Posterior, PosteriorInfo, Prior

# A count that is further from the recorded one, by this factor, deserves a remark.
_FAR = 100.0


def weigh(config: MergeConfig, inputs: Inputs, notes: list[str]) -> Inputs:
    """The same inputs, each with the weighing of its precision.

    The precision of an adapter counts before the product is made of it; such an input has another
    `posterior` afterwards, which reads the same files.

    Args:
        config: The settings.
        inputs: The models, with a precision each.
        notes: Remarks for the report are appended here.

    Raises:
        ConfigError: A count that cannot be set.
        MismatchError: A merge in another frame than this one.
        PrecisionError: `--anchor` asks for a record that a model does not have.
    """
    common = common_count(config, inputs)
    base = None
    if inputs.base is not None:
        weighing = _Weigher(config, common, None, notes).weighing(inputs.base)
        base = replace(_counted(config, inputs.base, common), weighing=weighing)
    weigher = _Weigher(config, common, base, notes)
    tasks = tuple(
        replace(_counted(config, task, common), weighing=weigher.weighing(task))
        for task in inputs.tasks
    )
    if base is not None:  # in an average all shares are of one
        _note_shared_starts(tasks, notes)
    return Inputs(base, tasks)


def precision_identity(model: Posterior) -> Identity:
    """The identity of a model's precision, as a record of a merge keeps it."""
    return Identity(blocks=model.precision_identity)


def _note_shared_starts(tasks: Sequence[Input], notes: list[str]) -> None:
    """Say if a start's precision is added more than once, inside of models adapted from it.

    The shares of a mixture's components sum to one, so that all of them together add it once.
    """
    added = [(task, task.posterior.info) for task in tasks if task.scale > 0]
    starts: dict[str, dict[Input | int, str]] = {}  # by its precision, who adds it
    for task, info in added:
        if task.weighing.contains_base is not None:
            continue  # its own start is the base here, and was taken out
        for edit in info.edits if info is not None else ():
            if edit.start_precision is not None:
                refs = starts.setdefault(edit.start_precision.blocks, {})
                refs.setdefault(_counted_as(task), task.ref)
    if not starts:
        return
    for task, info in added:
        if info is not None and (own := precision_identity(task.posterior).blocks) in starts:
            starts[own].setdefault(_counted_as(task), task.ref)
    for refs in starts.values():
        if len(refs) > 1:
            notes.append(
                f"{', '.join(map(repr, refs.values()))}: each holds the precision of one start, "
                "which is added once for each. With that start as the --base it counts once"
            )


def _counted_as(task: Input) -> Input | int:
    """What a task counts as one with: all components of its mixture, or nothing but itself."""
    return task if task.mixture is None else task.mixture


def _counted(config: MergeConfig, model: Input, common: float | None) -> Input:
    """The same input; of an adapter with its precision as if the count to be used had been seen."""
    posterior = model.posterior
    count = adapter_count(config, posterior, common)
    if count is None or posterior.precision is None:
        return model
    return replace(
        model, posterior=replace(posterior, precision=posterior.precision.counted(count))
    )


class _Weigher:
    """Weighs one model after another, all beside the same base.

    Args:
        config: The settings.
        common: The count of `--counts equal`.
        base: The base, weighed; None without one, and for the base itself.
        notes: Remarks for the report are appended here.
    """

    def __init__(
        self, config: MergeConfig, common: float | None, base: Input | None, notes: list[str]
    ) -> None:
        self._config, self._common, self._base, self._notes = config, common, base, notes

    def weighing(self, model: Input) -> Weighing:
        """How one model's stored precision counts."""
        posterior = model.posterior
        factor = count_factor(self._config, posterior)
        if posterior.info is None:
            return self._without_info(posterior, factor)
        if posterior.info.merge is None:
            contained = self._edited_base(posterior.info)
            if contained is not None:
                return self._edited(posterior, posterior.info, *contained)
            return self._trained(posterior, posterior.info, factor)
        return self._merged(posterior, posterior.info, posterior.info.merge, factor)

    def _without_info(self, model: Posterior, factor: float | None) -> Weighing:
        """An adapter on its base, or a precision that says nothing about itself."""
        config = self._config
        count = adapter_count(config, model, self._common)
        if count is not None:
            inner = count / (recorded_count(model) or 1.0)
            return Weighing(count=count, anchor=self._anchor(model, 1.0), inner=inner)
        if factor is None:
            raise ConfigError(
                f"--observations {model.ref}={requested_count(config, model)}: its precision "
                f"records no count to set. Multiply it instead: {model.ref}=3x."
            )
        return Weighing(gain=factor, anchor=self._anchor(model, factor))

    def _trained(self, model: Posterior, info: PosteriorInfo, factor: float | None) -> Weighing:
        """A posterior that is no merge."""
        unit = info.ess or 1.0  # the count by which S is scaled
        recorded = recorded_count(model) or unit
        if factor is None:
            count = float(requested_count(self._config, model))
            self._note_count(model, count, recorded)
        else:
            count = factor * self._default_count(recorded)
        prior = info.prior.precision if info.prior.kind == "isotropic" else 0.0
        return Weighing(
            gain=count / unit,
            contained=prior,
            prior=prior * recorded / unit,
            count=count,
            anchor=self._anchor(model, count / unit),
        )

    def _edited_base(self, info: PosteriorInfo) -> tuple[float, float] | None:
        """How much of the base's precision is inside that of an adapted model.

        Returns:
            The factor before the data's part of what the base stores, and the observations that
            this stands for there; None where this merge's base is none of the starts on record.
        """
        if self._base is None:
            return None
        base = self._base.posterior
        factor = 1.0
        for edit in reversed(info.edits):
            if edit.start_count is None:
                return None
            stands_for, factor = factor * edit.base, factor * edit.start_count
            if edit.start is None or edit.start.blocks != base.identity:
                continue
            if edit.start_precision == precision_identity(base):
                return factor, stands_for
        return None

    def _edited(
        self, model: Posterior, info: PosteriorInfo, contained: float, base_count: float
    ) -> Weighing:
        """An adapted model on its own start, whose precision is inside it and counts once.

        What is left is `H_add - H_remove`, which may be negative.
        """
        assert self._base is not None
        requested = requested_count(self._config, model)
        if requested != "1x":
            raise ConfigError(
                f"--observations {model.ref}={requested}: its precision holds that of "
                f"'{self._base.ref}', which it was adapted from, and counts as that does. Set "
                f"--observations {self._base.ref} instead."
            )
        if self._config.shrink is not None or self._config.pool is not None:
            raise MismatchError(
                f"'{model.ref}' was adapted from '{self._base.ref}', whose precision it holds as "
                "stored, and this merge has "
                f"{_reshaping(self._config.shrink, self._config.pool)}. Leave that out."
            )
        gain = self._base.weighing.gain / contained
        added = (info.observations or base_count) - base_count
        return Weighing(
            gain,
            info.prior.precision,
            contains_base=contained,
            reshape=False,
            count=gain * added,
            anchor=self._anchor(model, gain),
        )

    def _merged(
        self, model: Posterior, info: PosteriorInfo, trace: MergeTrace, factor: float | None
    ) -> Weighing:
        """A merge, which counts as often as the sum of its scales; a removal counts negatively."""
        unit = trace.common_count or 1.0
        recorded = recorded_count(model) or unit
        total_scale = info.observations / recorded if info.observations is not None else 1.0
        default = self._default_count(recorded)
        if factor is not None:
            count = factor * default
        elif total_scale > 0:
            count = float(requested_count(self._config, model)) / total_scale
            self._note_count(model, count * total_scale, recorded * total_scale)
        else:
            raise ConfigError(
                f"--observations {model.ref}={requested_count(self._config, model)}: it is a "
                f"removal and stands for {info.observations:g} observations, which no number can "
                f"set. Multiply it instead: {model.ref}=3x."
            )
        gain = count / unit
        if self._base is not None and info.prior.kind == "base":
            _check_frame(model, info.prior, self._base, default / unit)
        self._check_reshaping(model, trace)
        self._note_merge(model, info.prior, gain)
        return _merge_weighing(model, info.prior, self._base, gain, count * total_scale)

    def _note_count(self, model: Posterior, count: float, recorded: float) -> None:
        """Say if a count was given that may have been meant as a multiple."""
        if not 1 / _FAR <= count / recorded <= _FAR:
            requested = requested_count(self._config, model)
            self._notes.append(
                f"--observations {model.ref}={requested} counts it for {count:,g} observations, of "
                f"the {recorded:,g} that it records; {requested}x multiplies"
            )

    def _default_count(self, recorded: float) -> float:
        if self._config.counts == "recorded" or self._common is None:
            return recorded
        return self._common

    def _check_reshaping(self, model: Posterior, trace: MergeTrace) -> None:
        config = self._config
        if (trace.shrink, trace.pool) != (config.shrink, config.pool):
            raise MismatchError(
                f"'{model.ref}' was merged with {_reshaping(trace.shrink, trace.pool)}, this merge "
                f"has {_reshaping(config.shrink, config.pool)}. Use the same, so that all count "
                "alike."
            )

    def _note_merge(self, model: Posterior, prior: Prior, gain: float) -> None:
        if self._config.anchor != "h0":
            self._notes.append(f"'{model.ref}' is a merge and carries its terms' anchors already")
        if gain != 1 and prior.precision > 0 and prior.kind == "isotropic":
            self._notes.append(
                f"'{model.ref}' counts otherwise than when it was merged; its prior does not"
            )

    def _anchor(self, model: Posterior, gain: float) -> TaskAnchor:
        """What a model's training is taken to have been anchored to."""
        choice = self._config.anchor
        if choice == "h0" or model.ref == self._config.base:
            return TaskAnchor()
        if choice == "none":
            return TaskAnchor(0.0)
        if choice not in ("recorded", "zero-decay"):
            return TaskAnchor(float(choice))
        recorded = model.info.anchor if model.info is not None else None
        if (
            recorded is None
            or recorded.precision is None
            or (choice == "zero-decay" and recorded.kind != "zero")
        ):
            centre = " to zero" if choice == "zero-decay" else ""
            raise PrecisionError(
                f"--anchor {choice}: '{model.ref}' does not record a quadratic pull{centre}. Use "
                "--anchor h0, none or a number."
            )
        if recorded.kind == "zero":
            return TaskAnchor(0.0, decay=gain * recorded.precision)
        return TaskAnchor(gain * recorded.precision)


def _merge_weighing(
    model: Posterior, prior: Prior, base: Input | None, gain: float, count: float
) -> Weighing:
    """How the precision of a merge counts, by the prior that it contains."""
    if prior.kind == "isotropic":
        return Weighing(gain, prior.precision, prior.precision, reshape=False, count=count)
    if prior.kind == "none" or base is None:
        # Without a base beside it, the base inside the merge cannot be told apart; if the merge is
        # the base itself, what is inside does not matter. S counts as a whole.
        return Weighing(gain, reshape=False, count=count)
    if prior.kind == "unknown":
        raise MismatchError(
            f"'{model.ref}' is an average of merges in different frames; what its data added to "
            f"'{base.ref}' cannot be told. Merge its terms instead."
        )
    return Weighing(
        gain, prior.precision, contains_base=prior.base_count, reshape=False, count=count
    )


def _check_frame(model: Posterior, prior: Prior, base: Input, gain: float) -> None:
    """Check that the base inside a merge is this merge's base and counts as it does here.

    Otherwise a chain of merges would not equal the merge of all terms at once.
    """
    identities = (Identity(blocks=base.posterior.identity), precision_identity(base.posterior))
    if (prior.base, prior.base_precision) != identities:
        raise MismatchError(
            f"'{model.ref}' is a merge in the frame of another base or base precision than "
            f"'{base.ref}'. Chains stay exact only in one frame: use the base that it was merged "
            "with."
        )
    contained = (prior.base_count or 1.0) * gain
    counts_alike = math.isclose(contained, base.weighing.gain, rel_tol=1e-6)
    if not counts_alike or (prior.precision > 0 and not math.isclose(gain, 1)):
        factor = (prior.base_count or 1.0) / base.weighing.gain
        raise MismatchError(
            f"'{model.ref}' was merged with '{base.ref}' counted {factor:g} times as often as "
            "here. Chains stay exact only in one frame: use the --observations and --counts of "
            f"that merge, such as --observations {base.ref}={factor:g}x."
        )


def _reshaping(shrink: str | None, pool: str | None) -> str:
    """The two flags as they are given."""
    flags = (("shrink", shrink), ("pool", pool))
    return " and ".join(f"--{flag} {v}" if v is not None else f"no --{flag}" for flag, v in flags)
