"""Mixtures among the models of a merge: each becomes its components, which share its scale.

A task with the posterior `sum_k pi_k N(m_k, S_k^-1)` and the scale a enters gradient matching as
its components, with the scales `a r_k` in each tensor. `sum_k r_k = 1`, so that all together count
as one task. The plan has `r_k = pi_k`; the merge finds the others (`stream/mixtures`). Every other
rule, and the base, take the plain model of a mixture.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from mergekit_bayes.checkpoint.side_files import MIXTURE
from mergekit_bayes.errors import ConfigError, MismatchError, shown
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.gradient_matching import GRADIENT_MATCHING
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.options import ScaleRule
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior.mixture import Mixture, open_components, read_mixture


def with_components(
    config: MergeConfig,
    method: Method,
    inputs: Inputs,
    rules: tuple[ScaleRule, ...],
    stack: ExitStack,
    notes: list[str],
) -> tuple[MergeConfig, Inputs, tuple[ScaleRule, ...]]:
    """Open the components of mixtures, and take each mixture's settings for all of them.

    Args:
        config: The settings.
        method: The merging rule.
        inputs: The models as named.
        rules: Scales that hold for some tensors only, of the models as named.
        stack: Keeps the components open.
        notes: Remarks for the report are appended here.

    Returns:
        The settings, models and rules of a merge of components; the same where there is no mixture
        of more than one.

    Raises:
        ConfigError: A precision is named for a mixture, or one is to be removed.
        CheckpointError: A record cannot be read, or a component is missing.
        MismatchError: A component has other weights than its record says.
    """
    tasks: list[Input] = []
    places: list[range] = []  # of each model, among the tasks
    observations = dict(config.observations)
    if inputs.base is not None:
        _mixture_of(inputs.base, None, notes)
    for number, model in enumerate(inputs.tasks):
        components = [model]
        if (mixture := _mixture_of(model, method, notes)) is not None:
            _check(config, model, [rule for rule in rules if number in rule.tasks])
            components = [
                Input(
                    posterior,
                    model.scale * weight,
                    mixture=number,
                    weight=weight,
                    mixed_in=model.posterior,
                    run=run,
                )
                for posterior, weight, run in open_components(mixture, model.posterior, stack)
            ]
            notes.append(
                f"'{model.ref}' is a mixture of {len(components)} runs, which have its scale "
                "together: the share of each is found in each tensor, and the scales listed are "
                "those by weight that this begins with"
            )
        places.append(range(len(tasks), len(tasks) + len(components)))
        tasks += components
        if model.ref in observations:
            names = (name for c in components for name in (c.ref, c.posterior.ref))
            observations |= dict.fromkeys(names, observations[model.ref])
    if len(tasks) == len(inputs.tasks):
        return config, inputs, rules
    rules = tuple(
        rule._replace(tasks=(place,), scale=rule.scale * tasks[place].weight)
        for rule in rules
        for number in rule.tasks
        for place in places[number]
    )
    config = config.model_copy(update={"observations": observations})
    return config, Inputs(inputs.base, tuple(tasks)), rules


def refuse_matrices_of(steps: Sequence[Step]) -> None:
    """Check that no mixture is merged by precision matrices.

    Raises:
        MismatchError: One is; its determinant and its distances are those of entries only.
    """
    for step in steps:
        mixed = [task.input for task in step.tasks if task.input.mixture is not None]
        if mixed and step.axis is not None:
            raise MismatchError(
                f"'{step.name}' has a precision of matrices, and '{mixed[0].ref}' is a component "
                "of a mixture, whose precisions are numbers. Merge its run instead, or mix runs "
                "with other precisions."
            )


def refuse_mixtures(inputs: Inputs, command: str) -> None:
    """Refuse mixtures where many sets of scales are formed.

    Args:
        inputs: The models of a merge.
        command: What is asked for, for the message.

    Raises:
        ConfigError: One is a component of a mixture.
    """
    mixed = next((task for task in inputs.tasks if task.mixture is not None), None)
    if mixed is not None:
        raise ConfigError(
            f"{command}: '{mixed.ref}' is a run of a mixture, whose shares are found anew for "
            "every scale. Merge at one scale after another, or name the runs."
        )


def _mixture_of(model: Input, method: Method | None, notes: list[str]) -> Mixture | None:
    """The mixture whose components a method merges; None for a model that counts as itself.

    Args:
        model: The model as named.
        method: The merging rule; None for the base, of which only one posterior has a meaning.
        notes: Where it is said that a mixture counts as its plain model.
    """
    mixture = None if model.posterior.parts else read_mixture(model.posterior.path)
    if mixture is None or len(mixture.components) == 1:
        return None
    if method is GRADIENT_MATCHING:
        return mixture
    notes.append(
        f"'{model.ref}' is a mixture, and only its plain model counts here, the run "
        f"{shown(mixture.components[mixture.plain].label)}; gradient matching (--base BASE "
        "--weights precision) takes all of its runs as one task"
    )
    return None


def _check(config: MergeConfig, model: Input, rules: Sequence[ScaleRule]) -> None:
    for setting in ("precision", "isotropic"):
        if model.ref in getattr(config, setting):
            raise ConfigError(
                f"--{setting} {model.ref}=...: it is a mixture, and each of its components has a "
                f"precision of its own. Drop it, or remove {model.posterior.path / MIXTURE}."
            )
    if min([model.scale, *(rule.scale for rule in rules)]) < 0:
        raise ConfigError(
            f"'{model.ref}' is a mixture, and what is removed from a base is one posterior: the "
            "iteration over components has no maximum there. Remove one of its runs instead."
        )
