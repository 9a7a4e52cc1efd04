"""Which parameter has which number in the state of an optimizer.

`optimizer.state_dict()` counts parameters through all groups, and trainings make groups: those with
weight decay first, then those without, each in the order of the model. So number 1 is rarely the
model's second parameter. Which parameters have no decay is a rule of the program that trained:

    Trainer             no LayerNorm, no "bias", no "norm" as a word of the name (transformers 4.46)
    Trainer, earlier    no LayerNorm, no "bias"
    ... with RMSNorm    likewise, and no RMSNorm, for models that had themselves listed
    examples            no "bias", no "LayerNorm.weight" (or "layer_norm.weight")
    matrices            all with two axes or more, as in nanoGPT

A rule is taken only if the groups have as many parameters as it says, with the same shapes in the
same order. Rules that agree on all names count as one; where two that differ fit, neither is taken.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.errors import MismatchError, shown
from mergekit_bayes.moments.base import Moment, Moments

_NORM_WORDS = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_WRAPPERS = re.compile(
    r"^module\.|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_WAY_OUT = (
    "Name the moments: make the optimizer of `model.named_parameters()`, or write them by name to "
    "exp_avg_sq.safetensors."
)


class Parameter(NamedTuple):
    """A trained parameter of a model.

    Attributes:
        name: Its name in memory.
        shape: Its shape.
        owner: Name of the class of the module that holds it.
    """

    name: str
    shape: tuple[int, ...]
    owner: str


_Rule = Callable[[Parameter], bool]
_RULES: Mapping[str, _Rule] = {
    "Trainer": lambda p: p.owner != "LayerNorm" and not _NORM_WORDS.search(p.name.lower()),
    "Trainer, earlier": lambda p: p.owner != "LayerNorm" and "bias" not in p.name,
    "... with RMSNorm": lambda p: (
        not p.owner.endswith(("LayerNorm", "RMSNorm")) and "bias" not in p.name
    ),
    "examples": lambda p: (
        "bias" not in p.name and not p.name.endswith(("LayerNorm.weight", "layer_norm.weight"))
    ),
    "matrices": lambda p: len(p.shape) > 1,
}
_Groups = tuple[tuple[Parameter, ...], ...]


def name_moments(moments: Moments, parameters: Sequence[Parameter]) -> dict[str, Moment]:
    """The second moments by the names of their parameters.

    Names in the file are taken as they are, without those that wrappers add.

    Args:
        moments: What was read.
        parameters: The trained parameters of the model, in its order, tied ones once.

    Raises:
        MismatchError: The numbers in the file are those of another model, or cannot be told.
    """
    keys = [key for group in moments.groups for key in group]
    if len(set(keys)) != len(keys):
        raise MismatchError(f"{moments.path}: its groups list a parameter twice. {_WAY_OUT}")
    if all(isinstance(key, str) for key in keys):
        named: dict[str, Moment] = {}
        for key, moment in moments.by_key.items():
            name = _WRAPPERS.sub("", str(key))
            if name in named:
                raise MismatchError(
                    f"{moments.path}: holds two moments of {shown(name)}, with and without the "
                    "name of a wrapper. Leave one out."
                )
            named[name] = moment
        return named
    groups = _grouped(moments, parameters)
    return {
        parameter.name: moments.by_key[key]
        for keys, members in zip(moments.groups, groups, strict=True)
        for key, parameter in zip(keys, members, strict=True)
        if key in moments.by_key
    }


def _grouped(moments: Moments, parameters: Sequence[Parameter]) -> _Groups:
    """The parameters in the groups of the optimizer, by the one rule that fits.

    Raises:
        MismatchError: None fits, or several that differ do.
    """
    count = sum(map(len, moments.groups))
    if count != len(parameters):
        raise MismatchError(
            f"{moments.path}: is the state of {count} parameters, but the model trains "
            f"{len(parameters)}. Is it of another model, or were some frozen? {_WAY_OUT}"
        )
    fitting: dict[_Groups, str] = {}
    misfit = ""
    for rule, groups in _candidates(parameters, len(moments.groups)).items():
        reason = _misfit(moments, groups)
        if reason is None:
            fitting.setdefault(groups, rule)
        misfit = misfit or reason or ""
    if len(fitting) == 1:
        return next(iter(fitting))
    if fitting:
        one, other = list(fitting)[:2]
        name = next(p for a, b in zip(one, other, strict=True) for p in a if p not in b).name
        raise MismatchError(
            f"{moments.path}: its parameters are numbered, and the numbers can be read in two ways "
            f"({' and '.join(fitting.values())}), which differ in {shown(name)}. {_WAY_OUT}"
        )
    raise MismatchError(
        f"{moments.path}: its parameters are numbered, in groups of "
        f"{', '.join(str(len(group)) for group in moments.groups)}, and by no rule are they those "
        f"of the model ({misfit or 'no program makes so many groups'}). Is it of another model? "
        f"{_WAY_OUT}"
    )


def _candidates(parameters: Sequence[Parameter], count: int) -> dict[str, _Groups]:
    """How trainings put parameters into this many groups, by the name of the rule."""
    if count == 1:
        return {"one group": (tuple(parameters),)}
    if count > 2:
        return {}
    return {
        name: (_only(parameters, rule, True), _only(parameters, rule, False))
        for name, rule in _RULES.items()
    }


def _only(parameters: Iterable[Parameter], rule: _Rule, decays: bool) -> tuple[Parameter, ...]:
    return tuple(p for p in parameters if rule(p) is decays)


def _misfit(moments: Moments, groups: _Groups) -> str | None:
    """Why the groups of the file are not these; None if they may be."""
    for keys, members in zip(moments.groups, groups, strict=True):
        if len(keys) != len(members):
            return f"expected {len(members)} in a group of {len(keys)}"
        for key, parameter in zip(keys, members, strict=True):
            if not _fits(moments.by_key.get(key), parameter):
                found = list(moments.by_key[key].shape)
                return f"number {key} is {found}, and '{parameter.name}' is {list(parameter.shape)}"
    return None


def _fits(moment: Moment | None, parameter: Parameter) -> bool:
    """Whether a moment may be a parameter's; one that never had a gradient has none."""
    return moment is None or moment.shape == parameter.shape
