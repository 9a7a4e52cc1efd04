"""What a checkpoint keeps of each parameter, and where the mean is."""

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.optim.optimizer import StateDict

from mergekit_bayes.optim.shards import local

Group = dict[str, Any]  # a parameter group, as torch.optim has it

COUNTERS = ("step", "estimates")  # of `ParameterState`, on the CPU as in torch's optimizers


class ParameterState(TypedDict, total=False):
    """`optimizer.state[parameter]`: what checkpoints hold, under these keys.

    All tensors are float32. Those of the parameter's shape are sharded like the parameter.

    Attributes:
        step: Number of steps that this parameter has made; a scalar on the CPU.
        momentum: Average of the gradients, mean loss/weight; of the parameter's shape.
        hess: h, estimate of the Hessian diagonal of the mean loss, mean loss/weight^2; of the
            parameter's shape. The posterior precision is `ess (h + d)`.
        mean: Float32 master of the mean, for parameters of fewer than 32 bits only; of the
            parameter's shape.
        estimates: IVON with `curvature="ggn"`: number of estimates in `hess`; a scalar on the CPU.
        noise: IVON with `curvature="price"`: average of ((f - h) / (h + d))^2; a scalar.
        weight_decay: IVON with `adapt_prior`, matrices only: d, the adapted prior precision over
            `ess`; a scalar.
    """

    step: Tensor
    momentum: Tensor
    hess: Tensor
    mean: Tensor
    estimates: Tensor
    noise: Tensor
    weight_decay: Tensor


def check_shapes(groups: Sequence[Group], saved: StateDict, optimizer: str) -> None:
    """Check that the tensors of a checkpoint have the shapes of the parameters.

    The compiled passes believe the sizes of state.

    Args:
        groups: The parameter groups of the optimizer.
        saved: The checkpoint.
        optimizer: Its name, for the message.

    Raises:
        ValueError: A tensor has another shape: the checkpoint is another model's.
    """
    parameters = [p for group in groups for p in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    # torch refuses another number of parameters.
    for index, parameter in zip(indices, parameters, strict=False):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{optimizer}: the checkpoint's {name} of parameter {index} has shape "
                    f"{list(value.shape)}, the parameter {list(parameter.shape)}: it was made with "
                    "another model. Resume with that model."
                )


def check_curvature(saved: StateDict, curvature: str) -> None:
    """Compare the curvature of IVON with that of a checkpoint.

    Args:
        saved: The checkpoint, of any version of this package.
        curvature: "price" or "ggn".

    Raises:
        ValueError: The checkpoint was made with the other one.
    """
    has_estimates = any("estimates" in state for state in saved["state"].values())
    for group in saved["param_groups"]:
        # Older checkpoints do not say which curvature theirs is.
        found = "ggn" if group.get("ggn", has_estimates) else "price"
        if (saved["state"] or "ggn" in group) and found != curvature:
            raise ValueError(
                f"IVON: the checkpoint was made with curvature='{found}', whose h is another than "
                f"that of '{curvature}'. Resume with curvature='{found}', or give its posterior as "
                "the prior."
            )


def undamped(hess: Tensor, group: Group) -> Tensor:
    """Return h without the damping that IVON adds to every estimate of the GGN; not negative.

    Args:
        hess: The state of a parameter.
        group: Its group. The damping of bSAM is another, a part of its h.
    """
    if not group.get("ggn") or not group["damping"]:
        return hess
    damping: float = group["damping"]
    return hess.sub(damping).clamp_min_(0)


def mean_of(parameter: Tensor, state: ParameterState) -> Tensor:
    """Return this rank's shard of the mean, where it is kept between two contexts.

    That is the float32 master if there is one, else the parameter itself. While the weights are
    sampled, `moves.Moved` says where the mean of a parameter without a master is.
    """
    return local(state["mean"]) if "mean" in state else local(parameter)


def update_weights(parameter: Tensor, state: ParameterState) -> None:
    """Round a float32 master, where there is one, to the parameter."""
    if "mean" in state:
        local(parameter).copy_(local(state["mean"]))
