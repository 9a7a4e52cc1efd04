"""The prior of each parameter: its form inside an optimizer, and the check that it is the same.

A prior is as large as the model, so checkpoints hold two checksums of it instead. They are sums,
not cryptographic hashes: torch's checkpoints keep numbers where they would refuse strings, and
sums of a prior on a GPU or in other shards agree to rounding.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mergekit_bayes.optim.state import Group

Priors = Mapping[Tensor, tuple[Tensor | None, Tensor | float | None]]
PriorTerm = tuple[Tensor | None, Tensor | float]  # centre (None is zero), precision over ess

_PERIOD = 1 << 17  # of the random factors; checkpoints hold sums made with them


def prior_term(
    parameter: Tensor,
    centre: Tensor | None,
    precision: Tensor | float | None,
    group: Group,
    optimizer: str,
) -> PriorTerm:
    """Return centre and precision over `ess`, float32, laid out like the parameter.

    Args:
        parameter: The parameter that the prior is for.
        centre: Mean of the prior, of the parameter's shape; None is zero.
        precision: In 1/weight^2, a number or of the parameter's shape; None is
            `ess * weight_decay`.
        group: The parameter's group.
        optimizer: Name of the optimizer, for messages.

    Raises:
        ValueError: The prior has another shape, entries that are not finite, or a negative
            precision.
    """
    for name, value in (("mean", centre), ("precision", precision)):
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(
                f"{optimizer}: the prior's {name} is {list(value.shape)}, its parameter "
                f"{list(parameter.shape)}"
            )
        if value is not None and not bool(torch.as_tensor(value).isfinite().all()):
            raise ValueError(f"{optimizer}: the prior's {name} has entries that are not finite")
    if precision is not None and bool((torch.as_tensor(precision) < 0).any()):
        raise ValueError(f"{optimizer}: the prior's precision has negative entries")
    if precision is None:
        decay: Tensor | float = group["weight_decay"]
    elif isinstance(precision, Tensor):
        decay = _laid_out_like(parameter, precision) / group["ess"]
    else:
        decay = precision / group["ess"]
    return (None if centre is None else _laid_out_like(parameter, centre)), decay


def checksums(term: PriorTerm) -> tuple[float, float]:
    """Return two checksums of a prior, which do not depend on how it is sharded.

    The first is its size. The second changes with the sign and the order of its entries.
    """
    size, order = 1.0, 0.0
    for weight, value in zip((0.5, 1.0), term, strict=True):
        if isinstance(value, Tensor):
            norm, scattered = _norm_and_order(value)
            size += weight * norm
            order += weight * scattered
        elif value is not None:
            size += weight * abs(value)
    return size, order


def prior_terms(
    unused: dict[Tensor, tuple[Tensor | None, Tensor | float | None]],
    groups: Sequence[Group],
    optimizer: str,
) -> dict[Tensor, PriorTerm]:
    """Return the priors of all parameters that have one, and add their checksums to the groups.

    Args:
        unused: Centre and precision by parameter, as in `prior_term`; emptied.
        groups: The parameter groups of the optimizer.
        optimizer: Its name, for messages.

    Raises:
        ValueError: A prior does not fit, or is of a tensor that is not optimized.
    """
    terms: dict[Tensor, PriorTerm] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter in unused:
                term = prior_term(parameter, *unused.pop(parameter), group, optimizer)
                terms[parameter] = term
                size, order = checksums(term)
                group["prior_sum"] += size
                # The factor makes it change with the order of the parameters, too.
                group["prior_order"] += order * (2 + math.sin(len(terms)))
    if unused:
        shapes = [tuple(p.shape) for p in unused]
        raise ValueError(
            f"{optimizer}: the prior names tensors that are not optimized, of {shapes}"
        )
    return terms


def check_prior(group: Group, saved: Group, optimizer: str) -> None:
    """Compare the checksums of a group's priors with those in a checkpoint.

    Raises:
        ValueError: The checkpoint was made with another prior.
    """
    size = max(abs(group["prior_sum"]), abs(saved.get("prior_sum", 0.0)))
    # Older checkpoints have no `prior_order`, which then is not compared.
    for name, default in (("prior_sum", 0.0), ("prior_order", group["prior_order"])):
        ours, stored = group[name], saved.get(name, default)
        if abs(ours - stored) > 1e-5 * size:
            raise ValueError(
                f"{optimizer}: the checkpoint was made with another prior (checksum "
                f"{stored:.9g}, here {ours:.9g}). It is not part of state_dict: give the same "
                "`prior` to the constructor."
            )


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    value = value.detach().to(device=parameter.device, dtype=torch.float32)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value if isinstance(value, DTensor) else value.contiguous()


def _norm_and_order(value: Tensor) -> tuple[float, float]:
    """Return the Euclidean norm, and a sum of about that size with a random factor per entry."""
    flat = (value.full_tensor() if isinstance(value, DTensor) else value).reshape(-1)
    generator = torch.Generator().manual_seed(0)
    count = min(_PERIOD, flat.numel())
    factors = torch.randn(count, generator=generator, dtype=torch.float64).to(flat.device)
    squares = scattered = torch.zeros((), dtype=torch.float64, device=flat.device)
    for k, piece in enumerate(torch.split(flat, _PERIOD)):
        entries = piece.double()
        squares = squares + entries.square().sum()
        scattered = scattered + entries.dot(factors[: piece.numel()]) * (2 + math.sin(k))
    return float(squares) ** 0.5, float(scattered)
