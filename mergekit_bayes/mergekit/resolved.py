"""The weights and settings that a recipe gives each tensor of a plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit.layers import OutputTensor
from mergekit_bayes.mergekit.objects import Recipe, Scalar, Setting
from mergekit_bayes.mergekit.roles import SEED, WEIGHT, Part, is_of_models, is_weighed, kind_of
from mergekit_bayes.mergekit.values import Kind, given_settings, setting_at
from mergekit_bayes.methods import tensors
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.steps import Operand, Step
from mergekit_bayes.plan.whole_tensors import with_own_settings

_REQUIRED = ("t",)  # besides the weights: mergekit has no default of it


class Resolver:
    """Gives the steps of a plan the weights and settings of a recipe.

    Args:
        recipe: The recipe.
        method: Its method.
        parts: Its parts.
        laid: Where each tensor of the output comes from.
        seed: Of a random method; None for that of the recipe.

    Attributes:
        constant: The settings that are the same in all tensors that were resolved.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        parts: Sequence[Part],
        laid: Mapping[str, OutputTensor],
        seed: int | None,
    ) -> None:
        self._recipe, self._method, self._parts, self._laid = recipe, method, parts, laid
        self._seed = seed
        self.constant: dict[str, float | str] = {}
        self._varying: set[str] = set()
        self._found_in: dict[str, list[float]] = {}  # least and largest of what the recipe sets

    def resolved(self, step: Step) -> Step:
        """A step with the weights and settings of its tensor.

        Where no filter of a setting without a default matches, the tensor stays the base's.

        Raises:
            ConfigError: A value is out of bounds, or none is given and there is no base to keep.
        """
        if step.copied is not None:
            return step
        one = self._laid.get(step.source)
        part = self._parts[one.slice if one is not None else -1]
        position = one.position if one is not None else 0.0
        weights = self._weights(step, part, position)
        settings = self._settings(step, part, position)
        reason = None
        if settings is None:
            reason = "no filter matches it"
        elif step.base is not None and not any(weights):
            reason = "all weights are zero"
        if reason is not None:
            return replace(step, tasks=(), merged=0, copied=reason)
        tasks = tuple(
            operand._replace(scale=weight)
            for operand, weight in zip(step.tasks, weights, strict=True)
        )
        renewed = dict(zip(map(id, step.tasks), tasks, strict=True))
        rest = None if step.rest is None else renewed[id(step.rest)]
        assert settings is not None
        return with_own_settings(self._method, settings, replace(step, tasks=tasks, rest=rest))

    def _weights(self, step: Step, part: Part, position: float) -> list[float]:
        if not is_weighed(self._method):
            return [1.0] * len(step.tasks)
        weights = []
        for operand, source in zip(step.tasks, part.tasks, strict=True):
            levels, name = (source.parameters, *part.levels), _own_name(step, operand)
            value = self._found(WEIGHT, levels, name, position, "number")
            if value is None and step.base is None:
                raise self._error(
                    source.place or part.place,
                    f"no filter of 'weight' matches '{name}', and there is no base to keep. Add a "
                    "last `- value: X` without a filter.",
                )
            weights.append(0.0 if value is None else float(value))
        return weights

    def _settings(
        self, step: Step, part: Part, position: float
    ) -> dict[str, tensors.Setting] | None:
        """The settings of a tensor; None where one without a default has no value there."""
        found: dict[str, tensors.Setting] = {}
        for parameter in self._method.parameters:
            name = parameter.name
            if name == SEED:
                given = self._value(parameter, (self._recipe.parameters,), step.name, position)
                found[name] = self._seed if self._seed is not None else given or 0
            elif is_of_models(name):
                values = [
                    self._value(
                        parameter,
                        (source.parameters, *part.levels),
                        _own_name(step, operand),
                        position,
                    )
                    for operand, source in zip(step.tasks, part.tasks, strict=True)
                ]
                numbers = tuple(float(value) for value in values if value is not None)
                found[name] = numbers[0] if len(set(numbers)) == 1 else numbers
            else:
                value = self._value(parameter, part.levels, step.name, position)
                if value is None:
                    return None
                found[name] = value
        self._note(found)
        return found

    def _value(
        self,
        parameter: Parameter,
        levels: Sequence[Mapping[str, Setting]],
        name: str,
        position: float,
    ) -> float | str | None:
        kind = kind_of(parameter)
        value = self._found(parameter.name, levels, name, position, kind)
        if value is None:
            return None if parameter.name in _REQUIRED else parameter.default
        if kind == "truth":
            return int(bool(value))
        if kind == "text":
            return self._choice(parameter, str(value))
        number = float(value)
        if not parameter.low <= number <= parameter.high:
            raise self._error(
                self._path(parameter.name, levels),
                f"expected a number from {parameter.low:g} to {parameter.high:g} in '{name}', "
                f"found {number:g}.",
            )
        return int(number) if isinstance(parameter.default, int) else number

    def _found(
        self,
        setting: str,
        levels: Sequence[Mapping[str, Setting]],
        name: str,
        position: float,
        kind: Kind,
    ) -> Scalar | None:
        try:
            return setting_at(setting, levels, name, position, kind)
        except ConfigError as error:
            raise self._error(self._path(setting, levels), str(error)) from None

    def _path(self, setting: str, levels: Sequence[Mapping[str, Setting]]) -> str:
        """Where the recipe says what a setting is, by the nearest level that has it."""
        value = next((level[setting] for level in levels if setting in level), None)
        given = (g for g in given_settings(self._recipe) if g.name == setting)
        return next((g.path for g in given if g.value is value), f"parameters.{setting}")

    def _choice(self, parameter: Parameter, value: str) -> str:
        if value not in parameter.choices:
            expected = " or ".join(parameter.choices)
            raise self._error(parameter.name, f"expected {expected}, found '{value}'.")
        return value

    def _note(self, settings: Mapping[str, tensors.Setting]) -> None:
        """Keep what is the same in all tensors."""
        for name, value in settings.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if numbers and not isinstance(value, str):
                seen = [*self._found_in.get(name, []), *map(float, numbers)]
                self._found_in[name] = [min(seen), max(seen)]
            if isinstance(value, tuple) or self.constant.get(name, value) != value:
                self._varying.add(name)
                self.constant.pop(name, None)
            elif name not in self._varying:
                self.constant[name] = value

    def in_words(self) -> str | None:
        """What the settings are that the recipe gives; None where it gives none."""
        given = dict.fromkeys(setting.name for setting in given_settings(self._recipe))
        words = []
        for name in given:
            if name != WEIGHT and name in self._found_in:
                least, largest = self._found_in[name]
                much = f"{least:g}" if least == largest else f"{least:g} to {largest:g}"
                words.append(f"{name} {much}")
        return f"settings of the recipe: {', '.join(words)}" if words else None

    def _error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self._recipe.label}: {key}: {text}")


def refuse_missing(recipe: Recipe, method: Method, parts: Sequence[Part]) -> None:
    """Refuse a recipe that lacks a setting without a default, before any model is opened.

    Raises:
        ConfigError: It does; the message names the key.
    """
    given = {setting.name for setting in given_settings(recipe)}
    for parameter in method.parameters:
        if parameter.name in _REQUIRED and parameter.name not in given:
            raise ConfigError(
                f"{recipe.label}: parameters.{parameter.name}: '{method.name}' needs it, and it "
                "was not given."
            )
    for part in parts if is_weighed(method) else ():
        for source in part.tasks:
            if not any(WEIGHT in level for level in (source.parameters, *part.levels)):
                place = f"{source.place}." if source.place else ""
                raise ConfigError(
                    f"{recipe.label}: {place}parameters.weight: '{method.name}' needs one for "
                    f"'{source.model}', and none was given."
                )


def _own_name(step: Step, operand: Operand) -> str:
    """The name of a tensor in a model, which the filters of the model's settings look at."""
    return operand.mean.name if operand.mean.input is operand.input else step.name


def with_weights(
    inputs: Inputs, steps: Sequence[Step], notes: list[str]
) -> tuple[Inputs, list[Step]]:
    """Let each task's scale be its weight, the mean over tensors where it differs.

    Args:
        inputs: The models, all of scale 1.
        steps: The tensors of the output, resolved.
        notes: Whose weights differ between tensors is appended here.

    Returns:
        The models and the steps with new inputs.
    """
    weights: dict[Input, list[float]] = {task: [] for task in inputs.tasks}
    for step in steps:
        for operand in step.tasks:
            if step.copied is None:
                weights[operand.input].append(operand.scale)
    renewed: dict[Input, Input] = {}
    for task, found in weights.items():
        mean = math.fsum(found) / len(found) if found else task.scale
        renewed[task] = replace(task, scale=found[0] if len(set(found)) == 1 else mean)
        if len(set(found)) > 1:
            notes.append(
                f"the weight of '{task.ref}' differs between tensors, from {min(found):g} to "
                f"{max(found):g}; its scale is their mean"
            )
    base = inputs.base
    if base is not None:
        renewed[base] = base

    def moved(operand: Operand) -> Operand:
        mean = operand.mean._replace(input=renewed[operand.mean.input])
        return operand._replace(input=renewed[operand.input], mean=mean)

    def renew(step: Step) -> Step:
        operands = {id(operand): moved(operand) for operand in step.operands}
        if step.rest is not None and id(step.rest) not in operands:  # of a copied tensor
            operands[id(step.rest)] = moved(step.rest)
        return replace(
            step,
            base=None if step.base is None else operands[id(step.base)],
            tasks=tuple(operands[id(task)] for task in step.tasks),
            # One of these operands itself: what needs more of it looks for that object.
            rest=None if step.rest is None else operands[id(step.rest)],
        )

    moved_steps = [renew(step) for step in steps]
    return Inputs(base, tuple(renewed[task] for task in inputs.tasks)), moved_steps
