"""The layers of an adapter: which weights it changes, by which factors, with which scaling."""

import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, Array, TensorSpec
from mergekit_bayes.checkpoint.ties import have_same_values
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, shown
from mergekit_bayes.lora.config import CONFIG, PREFIX, LoraConfig
from mergekit_bayes.lora.parameters import WEIGHT, Target, by_pattern, find_targets, is_grouped
from mergekit_bayes.lora.parts import ROWS, part_of
from mergekit_bayes.lora.tokens import TrainedRows, read_rows
from mergekit_bayes.lora.variants import initial_move
from mergekit_bayes.lora.vectors import read_vector
from mergekit_bayes.lora.writers import FOLD, explain_name
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import EMPTIED

_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"\.original_module\.|\.trainable_tokens_original(\.|$)")
_OF_TRAINING = re.compile(r"\.lora_velora_\w+(\.|$)")  # which compresses gradients
_BELOW = re.compile(r"\.(token_adapter\.)?base_layer\.")  # of a weight below an adapter
# Modules that compiling and sharding wrap around others, and their prefix.
_WRAPPER = re.compile(
    r"(?:(?<=^)|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = "module."


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
        is_embedding: Whether the weight is a table of embeddings, (columns, rows), a row per token.
        bias: Name on disk of the bias of B, (rows,), of which s times is added to the module's own.
        magnitude: Name on disk of DoRA's magnitudes, one for each of the rows.
        parameter: The weight's name in the module.
        experts: E, the number of products.
        expert: The one of them that is meant; None for all.
        is_grouped: Whether B has the columns of one expert after another; see `experts`.
        is_parameter: Whether the adapter targets a parameter itself, which as a matrix is never
            stored transposed.
        wrapper: The module's name where it is written, if PEFT puts something into it.
    """

    module: str
    a: str
    b: str
    rank: int
    rows: int
    columns: int
    scaling: float
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    bias: str | None = None
    magnitude: str | None = None
    parameter: str = WEIGHT
    experts: int = 1
    expert: int | None = None
    is_grouped: bool = False
    is_parameter: bool = False
    wrapper: str = ""

    @property
    def tensor(self) -> str:
        """Name of the weight in the model."""
        return f"{self.module}.{self.parameter}"

    @property
    def total_rank(self) -> int:
        """Rows of A and columns of B: the ranks of all experts, unless one is meant."""
        return self.rank * (self.experts if self.expert is None else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change as the weight is stored, a matrix not transposed."""
        stack = (self.experts,) if self.experts > 1 else ()
        matrix = (self.columns, self.rows) if self.is_embedding else (self.rows, *self._inner)
        return (*stack, *matrix)

    @property
    def stored_names(self) -> tuple[str, str]:
        """The names under which PEFT stores the factors A and B, after its prefix."""
        module = self.wrapper or self.module
        if self.is_embedding:
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

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
        unused: Names on disk of the base's own copies of modules that are replaced, of second
            copies of one tensor, and of what is for training only.
        rows: Rows of tensors that replace the base's, by the name in the model.
    """

    layers: dict[str, Layer]
    replacements: dict[str, str]
    unused: tuple[str, ...]
    rows: dict[str, TrainedRows]


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
    rows: dict[str, str] = {}
    in_model = {disk: _in_model(disk) for disk in posterior.mean.specs}
    parts = {disk: part_of(name) for disk, name in in_model.items()}
    adapters = {part.adapter for part in parts.values() if part and part.adapter}
    for disk, name in in_model.items():
        part, saved = parts[disk], _SAVED.fullmatch(name)
        if part:
            of_module = rows if part.part == ROWS else names.setdefault(part.module, {})
            key = part.module if part.part == ROWS else part.part
            unused += _add(of_module, key, disk, posterior)
        elif saved:
            tensor = _without_adapter(saved["rest"], adapters)
            unused += _add(replacements, f"{saved['module']}.{tensor}", disk, posterior)
        elif is_original(name) or is_of_training(name):
            unused.append(disk)
        elif _is_whole(name, config):
            unused += _add(replacements, _BELOW.sub(".", name), disk, posterior)
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
    found = [_read_layer(posterior, config, targets[m], names[m]) for m in names]
    layers = {layer.tensor.removesuffix(f".{WEIGHT}"): layer for layer in found}
    trained = read_rows(posterior, config, rows)
    return AdapterTensors(dict(sorted(layers.items())), replacements, tuple(unused), trained)


def is_original(disk: str) -> bool:
    """Whether a tensor is the base's own copy of a module that the adapter replaces."""
    return bool(_ORIGINAL.search(disk))


def is_of_training(disk: str) -> bool:
    """Whether a tensor is of use in training only, and changes nothing that the model computes."""
    return bool(_OF_TRAINING.search(disk))


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
    is_embedding = "embedding_A" in names or "embedding_B" in names
    sides = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if is_embedding and ("A" in names or "B" in names):
        raise ConfigError(
            f"{posterior.mean.files[0]}: '{module}' has factors of a linear layer and of an "
            "embedding, and is one of them only. Save the adapter again."
        )
    missing = [side for side in sides if side not in names]
    if missing:
        only = next(iter(names.values()))
        raise CheckpointError(
            f"{posterior.mean.where(only)}: '{only}' has no other factor (lora_{missing[0]}). Save "
            "the adapter again."
        )
    name_a, name_b = (names[side] for side in sides)
    a, b = posterior.mean.specs[name_a], posterior.mean.specs[name_b]
    where = posterior.mean.where(name_a)
    for spec, name in ((a, name_a), (b, name_b)):
        _check_factor(where, name, spec)
    if len(a.shape) != len(b.shape) or any(n != 1 for n in b.shape[2:]):
        raise ConfigError(
            f"{where}: '{name_a}' is {list(a.shape)} and '{name_b}' {list(b.shape)}; of "
            f"convolutions only those are read whose B has the kernel 1. {FOLD}"
        )
    rank, key = by_pattern(config.get("rank_pattern"), target.pattern_name, config["r"])
    if len(a.shape) > 2 and a.shape[0] == rank and b.shape[1] < rank:
        raise ConfigError(
            f"{where}: '{name_a}' is {list(a.shape)} and '{name_b}' {list(b.shape)}: "
            "factors of a convolution with groups, which neither this reader nor PEFT folds. Take "
            "the layer out of the adapter."
        )
    experts = max(1, a.shape[0] // rank) if target.is_parameter and len(a.shape) == 2 else 1
    if a.shape[0] != rank * experts or b.shape[1] != rank * experts:
        raise MismatchError(
            f"{where}: the factors of '{target.pattern_name}' are {list(a.shape)} and "
            f"{list(b.shape)}, but {CONFIG} gives it rank {rank} "
            + ("(r)" if key is None else f"(rank_pattern, {shown(key)}, the first that matches)")
            + (", of each expert" if target.is_parameter else "")
            + ". The two files do not belong together."
        )
    alphas = config.get("alpha_pattern")
    alpha, _ = by_pattern(alphas, target.pattern_name, float(config["lora_alpha"]))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    columns, kernel = math.prod(a.shape[1:]), a.shape[2:]
    bias = read_vector(posterior, config, names, "bias", b.shape[0])
    magnitude = read_vector(posterior, config, names, "magnitude", b.shape[0])
    layer = Layer(
        *(module, name_a, name_b, rank, b.shape[0], columns, scaling, kernel),
        is_embedding=is_embedding,
        bias=bias,
        magnitude=magnitude,
        parameter=target.parameter,
        experts=experts,
        is_grouped=experts > 1 and rank > 1 and is_grouped(config, where),
        is_parameter=target.is_parameter,
    )
    _check_initialisation(config, where, layer)
    return layer


def _check_initialisation(config: LoraConfig, where: str, layer: Layer) -> None:
    """Refuse an initialisation that moves the base where PEFT has none for such a layer."""
    move = initial_move(config)
    is_linear = not layer.kernel and not layer.is_embedding and layer.parameter == WEIGHT
    if move is not None and (layer.is_parameter or not is_linear):
        raise ConfigError(
            f"{where}: '{layer.a}' adapts no linear layer, and init_lora_weights={move!r} in "
            f"{CONFIG} is for linear layers only. {FOLD}"
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


def _is_whole(name: str, config: LoraConfig) -> bool:
    """Whether a tensor is the model's own, stored whole.

    PEFT stores the embedding and the head beside the factors where the vocabulary was resized,
    and where they are adapted themselves; then their names have a `base_layer`. With `bias` it
    stores biases: all of them, or those of the adapted modules.
    """
    plain = _BELOW.sub(".", name)
    if is_vocabulary(plain):
        return True
    if config.get("bias") in ("all", "lora_only") and plain.rpartition(".")[2] == "bias":
        return True
    modules = config.get("modules_to_save") or ()
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)
