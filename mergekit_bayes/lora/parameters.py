"""Which tensor of a model a pair of factors adapts, where PEFT wraps more than one of a module.

A pair belongs to the weight of its module, unless the config has `target_parameters`. These are
adapted themselves, such as the stacked experts of a mixture: PEFT wraps their module once for each
of them, one wrapper around the other, and the name on disk only says how deep a pair lies
(`experts.lora_A`, `experts.base_layer.lora_A`). Wrappers are made in the order in which the module
registers its parameters, so that the last one is the outermost.
"""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple, TypeVar

from mergekit_bayes.checkpoint.adapter_patterns import (
    LONGEST_MODULE,
    MOST_PATTERNS,
    module_pattern,
)
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, shown
from mergekit_bayes.lora.config import CONFIG, LoraConfig
from mergekit_bayes.lora.writers import FOLD, FOLD_ALL

_T = TypeVar("_T")
WEIGHT = "weight"
_ALL = "all-linear"  # what PEFT writes out as a list, and other programs as it is
_WRAPPED = ".base_layer"
_ATTENTION = ".base_layer.out_proj"  # in the wrapper of a whole MultiheadAttention
# Parameters that one module may register, in that order (transformers 5.23, all models).
_ORDER = (
    *("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "w2"),
    *("down_proj", "down_proj_bias", "weight", "bias"),
)


class Target(NamedTuple):
    """The tensor that a pair of factors adapts.

    Attributes:
        module: The module's name in the model, without what PEFT put into it.
        parameter: The tensor's name in the module.
        pattern_name: The name by which `rank_pattern` and `alpha_pattern` are matched.
        is_parameter: Whether the adapter targets the parameter itself: then it may be a stack of
            experts, and a matrix is never stored transposed.
    """

    module: str
    parameter: str
    pattern_name: str
    is_parameter: bool = False


class _Named(NamedTuple):
    """The entries of `target_parameters`: names by their module, or its end, and those without."""

    by_owner: Mapping[str, list[str]]
    bare: list[str]


def find_targets(config: LoraConfig, modules: Collection[str], where: str) -> dict[str, Target]:
    """Find what each pair of factors adapts.

    Args:
        config: The adapter's config.
        modules: What stands before `.lora_A` and `.lora_B`, without PEFT's prefix.
        where: The file, for messages.

    Returns:
        The target of each entry of `modules`.

    Raises:
        CheckpointError: Two pairs are for one weight.
        ConfigError: The config and the file do not tell which of several parameters is adapted,
            or what PEFT makes of a pair.
        MismatchError: A module is wrapped more often than the config names parameters of it.
    """
    attention = next((m for m in modules if f"{m}{_ATTENTION}" in modules), None)
    if attention is not None:
        raise ConfigError(
            f"{where}: '{attention}' is torch's MultiheadAttention as a whole, of which PEFT adds "
            "the change of out_proj twice (0.21) and a later version perhaps once, so that what "
            f"the factors stand for is not known. With the PEFT that trained it: {FOLD}"
        )
    wrappers: dict[str, dict[int, str]] = {}
    for stored in modules:
        bare = stored
        while bare.endswith(_WRAPPED):
            bare = bare.removesuffix(_WRAPPED)
        depth = (len(stored) - len(bare)) // len(_WRAPPED)
        other = wrappers.setdefault(_bare(bare), {}).setdefault(depth, stored)
        if other != stored:
            raise CheckpointError(
                f"{where}: the factors of '{other}' and of '{stored}' are for one weight of the "
                "model. Save the adapter again."
            )
    targets, named = dict[str, Target](), _named_parameters(config)
    for module, stored_at in wrappers.items():
        names = _parameters(config, named, module, len(stored_at), where)
        _check_wrappers(module, stored_at, names, where)
        for depth, name in enumerate(reversed(names)):
            targets[stored_at[depth]] = Target(module, name, f"{module}.{name}", True)
        if not names:
            targets[stored_at[0]] = Target(module, WEIGHT, module)
    return targets


def is_grouped(config: LoraConfig, where: str) -> bool:
    """Whether the columns of B are those of one expert after another.

    PEFT has the expert as the fastest index. Unsloth read adapters of stacked experts as grouped
    until September 2026 (its pull request 1269 to unsloth-zoo), and has recorded since which of the
    two it trained.

    Args:
        config: The adapter's config.
        where: The file, for messages.

    Raises:
        ConfigError: The adapter is Unsloth's, and does not record it.
    """
    layout, mapping = config.get("lora_B_layout"), config.get("auto_mapping")
    if layout in ("rank_major", "grouped_by_expert"):
        return layout == "grouped_by_expert"
    if layout is not None or (isinstance(mapping, dict) and mapping.get("unsloth_fixed")):
        raise ConfigError(
            f"{where}: in which order the experts' columns of lora_B are is not known: {CONFIG} "
            f"has lora_B_layout={shown(layout)}, and Unsloth changed it in September 2026 (PEFT "
            'cannot tell either). Write "lora_B_layout": "grouped_by_expert" there if the adapter '
            'was trained by an Unsloth from before, "rank_major" if by a later one.'
        )
    return False


def wrapped_names(module: str, parameters: Collection[str]) -> dict[str, str]:
    """How PEFT calls a module for each of its parameters that is adapted itself.

    Args:
        module: The module's name in the model.
        parameters: The parameters' names in the module.

    Raises:
        ConfigError: In which order the module registers them is not known.
    """
    unknown = [name for name in parameters if name not in _ORDER]
    if len(parameters) > 1 and unknown:
        raise ConfigError(
            f"'{module}' has several parameters that are adapted ({', '.join(parameters)}), and "
            f"the order in which its code registers them is not known for '{unknown[0]}'. Fold "
            f"instead: {FOLD_ALL}."
        )
    ordered = sorted(parameters, key=_ORDER.index) if len(parameters) > 1 else list(parameters)
    return {name: module + depth * _WRAPPED for depth, name in enumerate(reversed(ordered))}


def by_pattern(
    patterns: Mapping[str, _T] | None, module: str, default: _T
) -> tuple[_T, str | None]:
    """The value of the first pattern that matches the end of a name, and the pattern.

    Args:
        patterns: `rank_pattern` or `alpha_pattern`.
        module: The name; see `Target.pattern_name`.
        default: The value where no pattern matches.

    Raises:
        ConfigError: The name is too long to be matched.
    """
    if patterns and len(module) > LONGEST_MODULE:
        raise ConfigError(
            f"{CONFIG} has patterns, and the module {shown(module)} a name of {len(module):,} "
            f"characters, where patterns are matched with up to {LONGEST_MODULE}."
        )
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(module):
            return value, pattern
    return default, None


@lru_cache(maxsize=MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(module_pattern(pattern))


def _check_wrappers(
    module: str, stored_at: Mapping[int, str], names: Collection[str], where: str
) -> None:
    """Compare the wrappers around a module, by their depth, with the parameters that have one."""
    missing = next((depth for depth in range(max(stored_at)) if depth not in stored_at), None)
    if missing is not None:
        raise MismatchError(
            f"{where}: it holds the factors of '{stored_at[max(stored_at)]}', and not those of "
            f"'{module}{missing * _WRAPPED}', which PEFT wraps around it. Save the adapter again."
        )
    if len(stored_at) != len(names or (WEIGHT,)):
        raise MismatchError(
            f"{where}: '{module}' has the factors of {len(stored_at)} parameters (the innermost "
            f"are those of '{stored_at[max(stored_at)]}'), and {CONFIG} names {len(names)} "
            "(target_parameters). The two files do not belong together."
        )


def _bare(name: str) -> str:
    """A module's name without PEFT's wrappers around modules above it."""
    return name.replace(f"{_WRAPPED}.", ".")


def _parameters(
    config: LoraConfig, named: _Named, module: str, count: int, where: str
) -> list[str]:
    """The parameters of a module that are adapted, in order; none if its weight is, as usual."""
    words = module.split(".")
    ends = (".".join(words[start:]) for start in range(len(words)))
    exact = list(dict.fromkeys(name for end in ends for name in named.by_owner.get(end, ())))
    if not (exact or named.bare) or _is_module_targeted(config, module):
        return []
    if not exact and count == 1 and config.get("target_modules") == _ALL:
        return []
    more = [] if count <= len(exact) else [name for name in named.bare if name not in exact]
    names = exact + more
    if count < len(names):
        raise ConfigError(
            f"{where}: '{module}' has the factors of {count} of its parameters, and {CONFIG} names "
            f"{len(names)} that they may be ({', '.join(names[:4])}). {FOLD}"
        )
    unknown = [name for name in names if name not in _ORDER]
    if len(names) > 1 and unknown:
        raise ConfigError(
            f"{where}: '{module}' has the factors of {len(names)} of its parameters "
            f"({', '.join(names)}), and which pair is whose depends on the order in which the "
            f"model's code registers them, which is not known for '{unknown[0]}'. {FOLD}"
        )
    return sorted(names, key=_ORDER.index) if len(names) > 1 else names


def _named_parameters(config: LoraConfig) -> _Named:
    by_owner: dict[str, list[str]] = {}
    for target in dict.fromkeys(config.get("target_parameters") or ()):
        owner, _, name = target.rpartition(".")
        by_owner.setdefault(owner, []).append(name)
    return _Named(by_owner, by_owner.pop("", []))


def _is_module_targeted(config: LoraConfig, module: str) -> bool:
    """Whether `target_modules` means a module, whose weight is adapted then."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return len(module) <= LONGEST_MODULE and re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)
