"""The layers of an adapter: which weights it changes, by which factors, with which scaling."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from mergekit_bayes.checkpoint.adapter_patterns import (
    LONGEST_MODULE,
    MOST_PATTERNS,
    module_pattern,
)
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, Array, TensorSpec
from mergekit_bayes.checkpoint.ties import have_same_values
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, shown
from mergekit_bayes.lora.config import CONFIG, PREFIX, LoraConfig
from mergekit_bayes.lora.parameters import WEIGHT, Target, find_targets
from mergekit_bayes.lora.writers import FOLD, explain_name
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import EMPTIED

# PEFT leaves the adapter's name out of a saved file; a raw state dict has it (`lora_A.default`).
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"\.original_module\.")
# Modules that compiling and sharding wrap around others, and their prefix.
_WRAPPER = re.compile(
    r"(?:(?<=^)|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = "module."
_T = TypeVar("_T")


class Factors(NamedTuple):
    """The two factors of a layer, or their variances."""

    a: Array  # (r, d_in)
    b: Array  # (d_out, r)


class Layer(NamedTuple):
    """One adapted weight: it changes by `s B A`, shape (rows, columns) = (d_out, d_in).

    A convolution is the same product on flattened kernels: with A of (r, d_in, k, ...) and B of
    kernel 1, `dW[o, i, k] = s sum_r B[o, r] A[r, i, k]`, whose columns are d_in times the kernel.
    Stacked experts have E products in one pair of factors; see `experts`.

    Attributes:
        module: The module's name in the model.
        a: Name of the factor A on disk, shape (E rank, columns).
        b: Name of the factor B on disk, shape (rows, E rank).
        rank: Rank of the change, of one expert's where there are several.
        rows: d_out.
        columns: d_in, times the kernel of a convolution.
        scaling: s.
        kernel: The kernel's shape; empty for a matrix.
        parameter: The weight's name in the module.
        experts: E, the number of products.
        is_parameter: Whether the adapter targets a parameter itself, which as a matrix is never
            stored transposed.
        target: The name by which the config means it, if that is another than the module's.
    """

    module: str
    a: str
    b: str
    rank: int
    rows: int
    columns: int
    scaling: float
    kernel: tuple[int, ...] = ()
    parameter: str = WEIGHT
    experts: int = 1
    is_parameter: bool = False
    target: str = ""

    @property
    def tensor(self) -> str:
        """Name of the weight in the model."""
        return f"{self.module}.{self.parameter}"

    @property
    def total_rank(self) -> int:
        """Rows of A and columns of B on disk: the ranks of all experts."""
        return self.rank * self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change as the weight is stored, a matrix not transposed."""
        stack = (self.experts,) if self.experts > 1 else ()
        return (*stack, self.rows, *self._inner)

    @property
    def _inner(self) -> tuple[int, ...]:
        return (self.columns // math.prod(self.kernel), *self.kernel)

    def stored_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which factors A and B of some rank, one expert's, are stored."""
        total = rank * self.experts
        return (total, *self._inner), (self.rows, total, *(1 for _ in self.kernel))


class AdapterTensors(NamedTuple):
    """The tensors of an adapter by what they are for.

    Attributes:
        layers: The layers by module, in order of the modules' names; where another parameter than
            the module's weight is adapted, by the parameter's name.
        replacements: Tensors that replace the base's (`modules_to_save`, and embeddings and heads
            that were stored whole), from the name in the model to the name on disk.
        unused: Names on disk of the base's own copies of modules that are replaced, and of second
            copies of one tensor.
    """

    layers: dict[str, Layer]
    replacements: dict[str, str]
    unused: tuple[str, ...]


def read_layers(posterior: Posterior, config: LoraConfig) -> AdapterTensors:
    """Sort an adapter's tensors into layers and tensors that replace the base's.

    Raises:
        CheckpointError: There are no layers, a factor is missing, empty or not of numbers, or one
            tensor is stored twice with different values.
        ConfigError: A tensor is neither a factor of a matrix nor a whole tensor of the model, or
            there are several adapters in the file.
        MismatchError: The factors have another rank than the config says.
    """
    names: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    unused: list[str] = []
    in_model = {disk: _in_model(disk) for disk in posterior.mean.specs}
    factors = {disk: _FACTOR.fullmatch(name) for disk, name in in_model.items()}
    adapters = {match["adapter"] for match in factors.values() if match and match["adapter"]}
    for disk, name in in_model.items():
        factor, saved = factors[disk], _SAVED.fullmatch(name)
        if factor:
            sides = names.setdefault(factor["module"], {})
            unused += _add(sides, factor["factor"], disk, posterior)
        elif saved:
            tensor = _without_adapter(saved["rest"], adapters)
            unused += _add(replacements, f"{saved['module']}.{tensor}", disk, posterior)
        elif is_original(name):
            unused.append(disk)
        elif _is_whole(name, config.get("modules_to_save") or ()):
            unused += _add(replacements, name.replace(".base_layer.", "."), disk, posterior)
        else:
            raise ConfigError(
                f"{posterior.mean.where(disk)}: "
                + (
                    explain_name(disk)
                    or f"'{disk}' is neither lora_A, lora_B nor of modules_to_save, and nothing "
                    f"else is read. {FOLD}"
                )
            )
    if len(adapters) > 1:
        raise ConfigError(
            f"{posterior.mean.files[0]}: holds several adapters ({', '.join(sorted(adapters))}). "
            "Save one alone: `model.save_pretrained(OUT, selected_adapters=[NAME])`."
        )
    if not names:
        raise CheckpointError(
            f"{posterior.mean.files[0]}: holds no lora_A and lora_B. Is it a LoRA adapter?"
        )
    for disk in replacements.values():
        if posterior.mean.specs[disk].shape == (0,):
            raise CheckpointError(
                f"{posterior.mean.where(disk)}: '{disk}' has the shape [0]. {EMPTIED}"
            )
    targets = find_targets(config, names, str(posterior.mean.files[0]))
    layers = [_read_layer(posterior, config, targets[m], names[m]) for m in names]
    by_name = {layer.tensor.removesuffix(f".{WEIGHT}"): layer for layer in layers}
    return AdapterTensors(dict(sorted(by_name.items())), replacements, tuple(unused))


def is_original(disk: str) -> bool:
    """Whether a tensor is the base's own copy of a module that the adapter replaces."""
    return bool(_ORIGINAL.search(disk))


def _in_model(disk: str) -> str:
    """A tensor's name in the model, perhaps with what PEFT put into it."""
    name = _WRAPPER.sub("", disk)
    return name.removeprefix(_PARALLEL).removeprefix(PREFIX).removeprefix(_PARALLEL)


def _without_adapter(name: str, adapters: Collection[str]) -> str:
    """A name below `modules_to_save`, which may begin with that of the adapter."""
    first, _, rest = name.partition(".")
    return rest if rest and first in (adapters or ("default",)) else name


def _add(names: dict[str, str], name: str, disk: str, posterior: Posterior) -> list[str]:
    """Record where a tensor of the model is stored, and return the second copies of it.

    PEFT stores a trained embedding or head twice where the vocabulary was resized: as a module to
    save, and as an embedding. Of equal copies the one with a precision counts, or else the one
    under `modules_to_save`, whatever the order in the file.
    """
    other = names.setdefault(name, disk)
    if other == disk:
        return []
    if not have_same_values(posterior.mean, disk, other):
        raise CheckpointError(
            f"{posterior.mean.where(disk)}: '{disk}' and '{other}' are one tensor of the model, "
            "and their values differ. Save the adapter again."
        )
    precise = () if posterior.precision is None else posterior.precision.specs

    def rank(copy: str) -> tuple[bool, bool]:
        return copy in precise, _SAVED.search(copy) is not None

    names[name] = max(other, disk, key=rank)
    return [other if names[name] == disk else disk]


def _read_layer(
    posterior: Posterior, config: LoraConfig, target: Target, names: Mapping[str, str]
) -> Layer:
    module = target.module
    if len(names) < 2:
        only = next(iter(names.values()))
        raise CheckpointError(
            f"{posterior.mean.where(only)}: '{only}' has no other factor. Save the adapter again."
        )
    a, b = posterior.mean.specs[names["A"]], posterior.mean.specs[names["B"]]
    where = posterior.mean.where(names["A"])
    for spec, name in ((a, names["A"]), (b, names["B"])):
        _check_factor(where, name, spec)
    if len(a.shape) != len(b.shape) or any(n != 1 for n in b.shape[2:]):
        raise ConfigError(
            f"{where}: '{names['A']}' is {list(a.shape)} and '{names['B']}' {list(b.shape)}; of "
            f"convolutions only those are read whose B has the kernel 1. {FOLD}"
        )
    rank = int(_by_pattern(config.get("rank_pattern"), target.pattern_name, config["r"]))
    if len(a.shape) > 2 and a.shape[0] == rank and b.shape[1] < rank:
        raise ConfigError(
            f"{where}: '{names['A']}' is {list(a.shape)} and '{names['B']}' {list(b.shape)}: "
            "factors of a convolution with groups, which neither this reader nor PEFT folds. Take "
            "the layer out of the adapter."
        )
    experts = max(1, a.shape[0] // rank) if target.is_parameter and len(a.shape) == 2 else 1
    if a.shape[0] != rank * experts or b.shape[1] != rank * experts:
        raise MismatchError(
            f"{where}: the factors of '{target.pattern_name}' are {list(a.shape)} and "
            f"{list(b.shape)}, but {CONFIG} gives it rank {rank}"
            + (", of each expert" if target.is_parameter else "")
            + ". The two files do not belong together."
        )
    alpha = float(
        _by_pattern(config.get("alpha_pattern"), target.pattern_name, config["lora_alpha"])
    )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    columns, kernel = math.prod(a.shape[1:]), a.shape[2:]
    return Layer(
        module,
        names["A"],
        names["B"],
        rank,
        b.shape[0],
        columns,
        scaling,
        kernel,
        target.parameter,
        experts,
        target.is_parameter,
        "" if target.pattern_name == module else target.pattern_name,
    )


def _check_factor(where: str, name: str, spec: TensorSpec) -> None:
    if spec.dtype not in MERGEABLE:
        raise CheckpointError(
            f"{where}: '{name}' is {spec.dtype}; factors are read from {', '.join(MERGEABLE)}."
        )
    if spec.shape == (0,):
        raise CheckpointError(f"{where}: '{name}' has the shape [0]. {EMPTIED}")
    if len(spec.shape) < 2:
        raise CheckpointError(
            f"{where}: '{name}' is {list(spec.shape)}, where a factor is a matrix: it is the flat "
            "shard of one process, as FSDP keeps it. Gather the weights and save again (FSDP: "
            "fsdp_state_dict_type: FULL_STATE_DICT)."
        )
    if not spec.size:
        raise CheckpointError(
            f"{where}: '{name}' is {list(spec.shape)}: it has rank 0 or no entries, and changes "
            "nothing. Save the adapter again, or take the layer out."
        )


def _by_pattern(patterns: Mapping[str, _T] | None, module: str, default: _T) -> _T:
    """The value of the first pattern that matches the end of a module's name."""
    if patterns and len(module) > LONGEST_MODULE:
        raise ConfigError(
            f"{CONFIG} has patterns, and the module {shown(module)} a name of {len(module):,} "
            f"characters, where patterns are matched with up to {LONGEST_MODULE}."
        )
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(module):
            return value
    return default


@lru_cache(maxsize=MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(module_pattern(pattern))


def _is_whole(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor is the model's own, stored whole.

    PEFT stores the embedding and the head beside the factors where the vocabulary was resized,
    and where they are adapted themselves; then their names have a `base_layer`.
    """
    if is_vocabulary(name.replace(".base_layer.", ".")):
        return True
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)
