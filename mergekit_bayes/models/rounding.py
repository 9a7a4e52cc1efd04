"""Round the matrices of a loaded model to 4 bits, as a simple quantiser would store them.

This is round to nearest with a scale and an offset for every 64 weights, and nothing else: no
calibration data (GPTQ, AWQ), no levels at quantiles (NF4), and all parts of the model alike. So it
tells whether an edit survives coarse weights, not what a given format makes of the model.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.merged import merge_adapter, refuse_fixed_weights

GROUP = 64  # weights with the same levels
_STEPS = 15  # between the 16 levels of 4 bits
_LEAST = 1e-30  # a step of a group of zeros
_AT_ONCE = 1 << 22  # weights that are rounded together, so that memory does not grow with a matrix

# Parameters of transformers that multiply their inputs from the right, so that the last axis but
# one is that of the inputs. Elsewhere it is the last one, as in `Linear`: also in experts that are
# stacked on a first axis, unless their module says `is_transposed`. DBRX lays its experts under
# each other. The three axes of XLNet's projections are none of these; their groups run along the
# last one, too.
_INPUTS_FIRST = frozenset(
    {
        "Conv1D.weight",
        "CsmCodebooksHead.weight",
        "DbrxExpertGLU.w2",
        "GroupedLinearLayer.weight",
        "Llama4TextExperts.down_proj",
        "Llama4TextExperts.gate_up_proj",
    }
)


def round_to_four_bits(loaded: Loaded) -> None:
    """Round every matrix of a model in place; an adapter is merged into its base first.

    The weights that are rounded are then those that a merged checkpoint of the adapter would hold.

    Raises:
        ConfigError: The model is quantised already, or its adapter cannot be merged.
        CheckpointError: A matrix holds something that is not finite.
    """
    refuse_fixed_weights(loaded)
    merge_adapter(loaded)
    round_matrices(loaded.model, f"'{loaded.path}'")


@torch.no_grad()
def refuse_unroundable(loaded: Loaded) -> None:
    """Refuse a model that `round_to_four_bits` would refuse, and change nothing.

    Raises:
        ConfigError: As `round_to_four_bits`.
        CheckpointError: As `round_to_four_bits`; an adapter and its base are looked at one by one.
    """
    refuse_fixed_weights(loaded)
    name = f"'{loaded.path}'"
    for where, matrix in _matrices(loaded.model):
        for _, nearest in _by_rows(matrix):
            _refuse_infinite(nearest, name, where)


@torch.no_grad()
def round_matrices(model: torch.nn.Module, name: str) -> None:
    """Round every matrix of a module in place by `rounded`.

    Matrices are all parameters with two axes, embeddings included, and the last two axes of those
    with three, which are stacked experts. What only looks like one is left alone: kernels of
    convolutions, stacked biases and vectors. A parameter that several modules share is rounded
    once.

    Args:
        model: The module, whose matrices are floating-point numbers of 16 bits or more.
        name: What messages call it.

    Raises:
        CheckpointError: A matrix holds something that is not finite.
    """
    for where, matrix in _matrices(model):
        for rows, nearest in _by_rows(matrix):
            _refuse_infinite(nearest, name, where)
            rows.copy_(nearest)


def rounded(matrix: Tensor) -> Tensor:
    """A matrix with the entries of each group rounded to the nearest of its 16 levels.

    A group is 64 weights that enter one output: `GROUP` neighbours of a row, fewer at its end. With
    its extremes `low = min(0, w)` and `high = max(0, w)` the levels are

        low + k (high - low) / 15,  k = 0 to 15,

    so zero lies in their range, though not always on a level. No error exceeds half a step, up to
    rounding of the floating-point numbers.

    Args:
        matrix: `(outputs, inputs)`, in float32 or wider.
    """
    rows, columns = matrix.shape
    groups = torch.nn.functional.pad(matrix, (0, -columns % GROUP)).reshape(rows, -1, GROUP)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    step = (groups.amax(-1, keepdim=True).clamp(min=0) - low).clamp(min=_LEAST) / _STEPS
    nearest = ((groups - low) / step).round().clamp(0, _STEPS) * step + low
    return nearest.reshape(rows, -1)[:, :columns]


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The name of each matrix of a module, and itself as `(outputs, inputs)`."""
    done: set[int] = set()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not _is_matrix(module, parameter) or id(parameter) in done:
                continue
            done.add(id(parameter))
            for matrix in parameter if parameter.ndim == 3 else (parameter,):
                where = f"{path}.{key}" if path else key
                yield where, matrix.T if _has_inputs_first(module, key) else matrix


def _by_rows(matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, and what they are rounded to, in float32 or wider."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    count = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count]
        yield rows, rounded(rows.to(wide))


def _refuse_infinite(nearest: Tensor, name: str, where: str) -> None:
    if not nearest.isfinite().all():
        raise CheckpointError(
            f"{name}: '{where}' holds a weight that is not finite, or a range of weights that "
            "float32 cannot, so it has no levels of 4 bits. Repair the checkpoint, or leave "
            "--four-bits out."
        )


def _is_matrix(module: torch.nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return False
    if parameter.ndim == 2:
        return not hasattr(module, "is_transposed")  # of experts: their weights have three axes
    return parameter.ndim == 3 and 1 not in parameter.shape[1:]


def _has_inputs_first(module: torch.nn.Module, key: str) -> bool:
    if f"{type(module).__name__}.{key}" in _INPUTS_FIRST:
        return True
    return bool(getattr(module, "is_transposed", False))
