"""Parameters that are sharded over ranks (DTensor): each rank has the sums of its own rows.

Under `fully_shard` each rank runs a batch of its own, and gets its rows of the gradients after they
have been added up over the ranks. So what is squared is the gradient of the batches of all ranks
together, as if they were one batch:

    ( sum over ranks r of sum_n J_rn' v_rn )^2

The vectors of different ranks are as independent as those of one batch, and their cross terms
vanish likewise. With as many rows in all, it is the same number that one process would add.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_bayes.curvature.stability import Part
from mergekit_bayes.curvature.sums import Keeping, Sums
from mergekit_bayes.ranks import gather, is_main, rows_to_main


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor; one that is not sharded is returned as it is."""
    from torch.distributed.tensor import DTensor  # takes a second to load

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_sums(parameters: Mapping[str, Tensor], keep: Keeping) -> dict[str, Tensor]:
    """Room on rank 0 for the sums of whole parameters, in memory or in a file; none elsewhere.

    Raises:
        CheckpointError: There is no room for them on the disk.
    """
    if not is_main():
        return {}
    elsewhere = keep._replace(place="cpu" if keep.place == "device" else keep.place)
    return Sums(parameters, elsewhere).totals


def gather_sums(own: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Put together the sums of all ranks, one parameter after the other. All ranks must call it.

    Args:
        own: The sums of this rank's rows, by parameter name.
        whole: Of `whole_sums`.
    """
    for name, total in own.items():
        rows_to_main(total, whole.get(name))


def gather_parts(own: Sequence[Part]) -> tuple[Part, ...]:
    """Put together the subsamples of all ranks, which are of the same batches.

    All ranks must call it, and get them.

    Args:
        own: Of this rank's rows.
    """
    return tuple(
        Part({n: torch.cat([p.rows[n] for p in same]) for n in same[0].rows}, same[0].observations)
        for same in zip(*gather(tuple(own)), strict=True)
    )
