"""The layers of an adapter: which weights it changes, by which factors, with which scaling."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from mergekit_bayes.checkpoint.specs import MERGEABLE, Array
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora.config import CONFIG, PREFIX, LoraConfig
from mergekit_bayes.posterior import Posterior

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_T = TypeVar("_T")


class Factors(NamedTuple):
    """The two factors of a layer, or their variances."""

    a: Array  # (r, d_in)
    b: Array  # (d_out, r)


class Layer(NamedTuple):
    """One adapted weight: it changes by `s B A`, shape (rows, columns) = (d_out, d_in).

    Attributes:
        module: The module's name in the model.
        a: Name of the factor A on disk, shape (rank, columns).
        b: Name of the factor B on disk, shape (rows, rank).
        rank: Rank of the change.
        rows: d_out.
        columns: d_in.
        scaling: s.
    """

    module: str
    a: str
    b: str
    rank: int
    rows: int
    columns: int
    scaling: float


def read_layers(
    posterior: Posterior, config: LoraConfig
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Sort an adapter's tensors into layers and tensors that replace the base's.

    Returns:
        The layers by module, in order of the modules' names; and the tensors of `modules_to_save`,
        from the name in the model to the name on disk.

    Raises:
        CheckpointError: There are no layers, or a factor is missing or no matrix of numbers.
        ConfigError: A tensor is neither a factor of a matrix nor of `modules_to_save`.
        MismatchError: The factors have another rank than the config says.
    """
    names: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for disk in posterior.mean.specs:
        name = disk.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            names.setdefault(match["module"], {})[match["factor"]] = disk
        elif _is_saved(name, config.get("modules_to_save") or ()):
            replacements[name] = disk
        else:
            raise ConfigError(
                f"{posterior.mean.where(disk)}: '{disk}' is neither lora_A, lora_B nor of "
                "modules_to_save. Adapters of embeddings and other kinds are not read; fold it "
                "into its base with `PeftModel.merge_and_unload()`."
            )
    if not names:
        raise CheckpointError(
            f"{posterior.mean.files[0]}: holds no lora_A and lora_B. Is it a LoRA adapter?"
        )
    layers = {m: _read_layer(posterior, config, m, names[m]) for m in sorted(names)}
    return layers, replacements


def _read_layer(
    posterior: Posterior, config: LoraConfig, module: str, names: Mapping[str, str]
) -> Layer:
    if len(names) < 2:
        only = next(iter(names.values()))
        raise CheckpointError(
            f"{posterior.mean.where(only)}: '{only}' has no other factor. Save the adapter again."
        )
    a, b = posterior.mean.specs[names["A"]], posterior.mean.specs[names["B"]]
    where = posterior.mean.where(names["A"])
    for spec, name in ((a, names["A"]), (b, names["B"])):
        if spec.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{where}: '{name}' is {spec.dtype}; factors are read from {', '.join(MERGEABLE)}."
            )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ConfigError(
            f"{where}: '{names['A']}' is {list(a.shape)}; only adapters of matrices are read. Fold "
            "it into its base with `PeftModel.merge_and_unload()`."
        )
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    if a.shape[0] != rank or b.shape[1] != rank:
        raise MismatchError(
            f"{where}: the factors of '{module}' are {list(a.shape)} and {list(b.shape)}, but "
            f"{CONFIG} gives it rank {rank}. The two files do not belong together."
        )
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Layer(module, names["A"], names["B"], rank, b.shape[0], a.shape[1], scaling)


def _by_pattern(patterns: Mapping[str, _T] | None, module: str, default: _T) -> _T:
    """The value of the first pattern that matches the end of a module's name.

    The match begins at a dot or at the start of the name, as in PEFT.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_saved(name: str, modules: Sequence[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)
