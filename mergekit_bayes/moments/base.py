"""What an optimizer's file says of a second moment, and the precision that follows from it.

Adam keeps, for every entry, a moving average of the squared gradient of the mean loss of a batch:

    v_t = beta2 v_{t-1} + (1 - beta2) g_t^2,    v_0 = 0

so that `v / (1 - beta2^t)` is a mean of `g^2`. Where the model no longer learns much, the gradient
of a batch of B observations is mostly noise, `E[g^2] = (F + (B - 1) gbar^2) / B`, where F is the
diagonal of the empirical Fisher of one observation and gbar the gradient of the mean loss over all
data. So B times that mean is F, and more than F by `(B - 1) gbar^2` as long as the model learns.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError, shown

SQUARES = "exp_avg_sq"  # what torch calls the second moment
FROM_DATA = "Estimate the precision from text instead: `bmerge precision MODEL --data ...`."
NO_MOMENTS = (
    "its optimizer keeps no second moments: it has made no step, or is one that keeps none, as "
    f"SGD. {FROM_DATA}"
)
FLOATS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an entry
_IN_8_BITS = ("state2", "qmap2", "absmax2", "codes")  # names of bitsandbytes and of torchao
_FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col")  # Adafactor's

_MOST_STEPS = 1 << 53

Key = str | int


@dataclass(frozen=True)
class Moment:
    """The second moment of one parameter.

    Attributes:
        shape: Its shape, which is the parameter's as it lies in memory.
        dtype: Name of its dtype in torch.
        step: t, the number of optimizer steps in it; None if the file does not say.
        beta2: The decay; None if the file does not say.
        read: Reads v, in whatever dtype it is stored.
    """

    shape: tuple[int, ...]
    dtype: str
    step: int | None
    beta2: float | None
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Moments:
    """The second moments of a model.

    Attributes:
        path: Where they are, for messages.
        by_key: Each by its parameter's name or, where the file has none, by its number. A
            parameter that never had a gradient has none.
        groups: The names or numbers of the parameters, group by group, in the optimizer's order.
        mean: Content hash of the weights that they belong to, where it is recorded.
        decays: Whether the optimizer added the weight decay to the gradients.
    """

    path: Path
    by_key: Mapping[Key, Moment]
    groups: tuple[tuple[Key, ...], ...]
    mean: str | None = None
    decays: bool = False

    @property
    def step(self) -> int | None:
        """The number of optimizer steps; parameters without a gradient in some have fewer."""
        return max((m.step for m in self.by_key.values() if m.step is not None), default=None)


def precision_of(moment: Moment, observations: float, batch: float) -> Tensor:
    """The precision that a second moment stands for, float32, in 1/weight^2.

        S = N B v / (1 - beta2^t)

    Bias: `N (B - 1) gbar^2`, see above; a gradient that was clipped by a factor c counts c^2 times.
    Variance: about `2 (1 - beta2) / (1 + beta2)` of S^2 for gradients that are normal.

    Args:
        moment: With step and beta2.
        observations: N, of all the data that the precision stands for.
        batch: B, the observations whose mean loss one optimizer step follows.

    Raises:
        ConfigError: The file does not say step or beta2.
    """
    if moment.step is None or moment.beta2 is None:
        raise ConfigError("the second moment has no step or no beta2: pass --step and --beta2.")
    factor = observations * batch / (1 - moment.beta2**moment.step)
    return moment.read().float().mul(factor)


def refuse_other_states(path: Path, names: Collection[str]) -> None:
    """Refuse what an optimizer keeps for a parameter, by its names, unless there is a `v` in it.

    Raises:
        CheckpointError: As said; the message says which optimizer it is.
    """
    if SQUARES in names:
        return
    if any(name in names for name in _IN_8_BITS):
        raise CheckpointError(
            f"{path}: its moments are those of bitsandbytes, which keeps them in 8 bits: expected "
            f"{SQUARES} in floating point. {FROM_DATA}"
        )
    if any(name in names for name in _FACTORED):
        raise CheckpointError(
            f"{path}: Adafactor has kept one number a row and a column, and not {SQUARES} for "
            f"every entry. {FROM_DATA}"
        )
    raise CheckpointError(
        f"{path}: its optimizer keeps {shown(', '.join(sorted(map(str, names))))} for a parameter, "
        f"and no {SQUARES}, so that it is not Adam. {FROM_DATA}"
    )


def refuse_other_numbers(path: Path, key: Key, dtype: str) -> None:
    """Refuse a moment that is not stored in floating point.

    Raises:
        CheckpointError: As said.
    """
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: the second moment of {shown(key)} is {dtype}, expected floating point. If "
            f"it is a code in 8 bits, it cannot be read. {FROM_DATA}"
        )


def refuse_other_layouts(path: Path, key: Key, value: object) -> Tensor:
    """The value, if it is a plain tensor whose numbers are in memory.

    Raises:
        CheckpointError: It is of a class of its own, sparse, or without numbers.
    """
    if (
        type(value) is not Tensor
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
    ):
        raise CheckpointError(
            f"{path}: what it holds of {shown(key)} is {type(value).__name__}, expected a plain "
            f"tensor. {FROM_DATA}"
        )
    return value


def as_step(path: Path, key: Key, value: object) -> int | None:
    """The number of steps in a file; None where it holds none.

    Raises:
        CheckpointError: It is no whole number from 1 on.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or not 1 <= value < _MOST_STEPS or value % 1:
        raise CheckpointError(
            f"{path}: the step of {shown(key)} is {shown(value)}, expected a whole number from 1 "
            "on. Take the state of an optimizer that has made a step."
        )
    return int(value)


def as_beta2(path: Path, group: Mapping[str, object]) -> float | None:
    """The decay of a group of parameters; None where the file holds none.

    Raises:
        CheckpointError: It is no number between 0 and 1.
    """
    betas = group.get("betas")
    if betas is None:
        return None
    beta2 = betas[1] if isinstance(betas, list | tuple) and len(betas) >= 2 else None
    if isinstance(beta2, Tensor) and beta2.numel() == 1:
        beta2 = beta2.item()
    if not isinstance(beta2, int | float) or not 0 <= beta2 < 1:
        raise CheckpointError(
            f"{path}: the betas of its optimizer are {shown(betas)}, expected two numbers from 0 "
            "to 1."
        )
    return float(beta2)


def adds_decay(group: Mapping[str, object]) -> bool:
    """Whether an optimizer adds this group's weight decay to the gradient before it is squared."""
    decay = group.get("weight_decay")
    has_decay = isinstance(decay, int | float) and decay > 0
    return has_decay and group.get("decoupled_weight_decay") is False
