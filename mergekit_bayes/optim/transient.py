"""What an optimizer holds between the samples of one step, and no checkpoint holds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_bayes.optim.moves import Buffers
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.together import Arenas


@dataclass(slots=True)
class Transient:
    """Scratch of an optimizer, the same for all of them; dropped when a checkpoint is loaded.

    The first fields are those of the current step, which `forget_step` empties.

    Attributes:
        samples: Number of weight samples taken for the step.
        sampled: Their sums, by parameter.
        squares: Sums of squared gradients by parameter: of the step (IVON), or of the open
            context (VOGN).
        observations: Number of observations in the sums of the step.
        ascended: bSAM: the gradients at the ascended weights, by parameter.
        sampled_on_any_rank: IVON with `rank_noise`: parameters that some rank has a gradient of.
        open_observations: VOGN: number of observations in the open context.
        is_open: Whether the parameters are away from their means.
        ranks_differ: IVON with `rank_noise`: whether the gradients of the ranks were found to
            differ, which is checked in the first step.
        arenas: Memory of small parameters that is kept for the next step.
        buffers: Tensors of the parameters' sizes that are kept for the next step.
        medians: Medians of the priors' precision over `ess`, by parameter.
        generators: torch's generators of noise, by device.
    """

    samples: int = 0
    sampled: dict[Tensor, Sampled] = field(default_factory=dict)
    squares: dict[Tensor, Tensor] = field(default_factory=dict)
    observations: int = 0
    ascended: dict[Tensor, Tensor] = field(default_factory=dict)
    sampled_on_any_rank: set[Tensor] = field(default_factory=set)

    open_observations: int = 0
    is_open: bool = False
    ranks_differ: bool = False
    arenas: Arenas = field(default_factory=Arenas)
    buffers: Buffers = field(default_factory=Buffers)
    medians: dict[Tensor, float] = field(default_factory=dict)
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def take_squares(self) -> tuple[dict[Tensor, Tensor], int]:
        """Take out the sums of squared gradients, and the number of their observations."""
        squares, observations = self.squares, self.observations
        self.squares, self.observations = {}, 0
        return squares, observations

    def forget_step(self) -> None:
        """Forget the samples of the step, which then begins again from its first one."""
        self.samples, self.observations = 0, 0
        self.sampled.clear()
        self.squares.clear()
        self.ascended.clear()
        self.sampled_on_any_rank.clear()
        self.arenas.forget_step()
