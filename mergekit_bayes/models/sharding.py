"""A model that is sharded over the ranks of a launcher (FSDP2), for want of room on one device.

Each rank keeps its rows of every parameter, on its own GPU, or in memory where there is none. While
a block runs, forward or backward, all of its parameters are there, and those of no other block;
those outside of blocks (the embedding, the head) are there during the whole of each pass.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.libraries import call

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn import Module

_WAY_OUT = "Leave out --device auto, or start one process."


def all_ranks() -> "DeviceMesh":
    """The devices of all ranks, one each. All of them must call this together."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (get_world_size(),))


def shard(model: "Module", mesh: "DeviceMesh", what: str, way_out: str = _WAY_OUT) -> None:
    """Shard a model in place. Each rank keeps its part; none waits for another one.

    Gradients are means over the ranks, reduced in float32. A parameter that a rank's batch does not
    reach, such as an expert's, has a gradient of zero there.

    Args:
        model: A model of transformers or PEFT, as it was loaded: in memory.
        mesh: Of `all_ranks`.
        what: The model, for messages.
        way_out: What to do where it cannot be sharded, for messages.

    Raises:
        ConfigError: Its modules cannot be sharded.
    """
    blocks = getattr(model, "_no_split_modules", None) or ()
    found = [module for module in model.modules() if type(module).__name__ in blocks]
    _refuse(model, found, what, way_out)
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    names = [name for name, _ in model.named_parameters()]
    # The whole model is resharded, too: a forward pass alone would leave whole parameters behind.
    shard_one = partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
    )
    for module in (*reversed(found), model):  # what lies in another one first
        call(
            f"'{what}': the model cannot be sharded over processes",
            partial(shard_one, module),
            way_out,
        )
    if [name for name, _ in model.named_parameters()] != names:
        raise ConfigError(
            f"'{what}': some of its blocks share a parameter, which several processes cannot keep "
            f"in parts. {way_out}"
        )
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)


def sum_gradients(model: "Module") -> None:
    """Add up the gradients of a sharded model over the ranks from here on, without a mean."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # which gloo knows, too


def is_sharded(model: "Module") -> bool:
    """Whether a model is one of `shard`."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _refuse(model: "Module", blocks: "list[Module]", what: str, instead: str) -> None:
    if not blocks:
        raise ConfigError(
            f"'{what}': the model does not name its blocks (`_no_split_modules`), so that it would "
            f"be whole on each process at once. {instead}"
        )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"'{what}': '{name}' is a number without axes, of which several processes cannot "
                f"keep rows. {instead}"
            )
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"'{what}': its parameters are of {names}, and sharded ones are of one type. Name one "
            "(dtype)."
        )
