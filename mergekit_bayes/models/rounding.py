"""Round the matrices of a loaded model to 4 bits, as a simple quantiser would store them.

This is round to nearest with a scale and an offset for every 64 weights, and nothing else: no
calibration data (GPTQ, AWQ), no levels at quantiles (NF4), and all parts of the model alike. So it
tells whether an edit survives coarse weights, not what a given format makes of the model.
"""

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.merged import merge_adapter

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
    name = f"'{loaded.path}'"
    if getattr(loaded.model, "is_quantized", False):
        raise ConfigError(f"{name} is quantised already. Leave --four-bits out.")
    merge_adapter(loaded)
    round_matrices(loaded.model, name)


@torch.no_grad()
def round_matrices(model: torch.nn.Module, name: str) -> None:
    """Round every matrix of a module in place by `rounded`.

    Matrices are all parameters with two axes, embeddings included, and the last two axes of those
    with three, which are stacked experts. What only looks like one is left alone: kernels of
    convolutions, stacked biases and vectors. A parameter that several modules share is rounded
    once.

    Args:
        model: The module.
        name: What messages call it.

    Raises:
        ConfigError: A matrix holds no floating-point numbers of 16 bits or more.
        CheckpointError: A matrix holds something that is not finite.
    """
    done: set[int] = set()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not _is_matrix(module, parameter) or id(parameter) in done:
                continue
            done.add(id(parameter))
            where = f"'{path}.{key}'" if path else f"'{key}'"
            if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                raise ConfigError(f"{name} is quantised already: {where} is {parameter.dtype}.")
            for matrix in parameter if parameter.ndim == 3 else (parameter,):
                if not _round_in_place(matrix.T if _has_inputs_first(module, key) else matrix):
                    raise CheckpointError(
                        f"{name}: {where} holds a weight that is not finite, or a range of weights "
                        "that float32 cannot, so it has no levels of 4 bits. Repair the "
                        "checkpoint, or leave --four-bits out."
                    )


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


def _round_in_place(matrix: Tensor) -> bool:
    """Round some rows at a time, in float32 or wider; False if the result is not finite."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    count = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count]
        nearest = rounded(rows.to(wide))
        if not nearest.isfinite().all():
            return False
        rows.copy_(nearest)
    return True


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
