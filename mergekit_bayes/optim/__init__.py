"""Optimizers that leave a posterior: `ivon`, `vogn` and `bsam`, one file each.

`base` opens the sampling context of all three. The other modules, in the order of a step:

    noise      draws the noise of a weight sample, on a CPU in `passes`
    moves      adds the noise to the mean, and puts the mean back whatever happens
    samples    sums gradients, and noise * gradient, over the samples of a step
    squares    sums squared gradients instead, the curvature that IVON is given under "ggn"
    steps      makes IVON's step of one parameter, by the equations in `updates`
    together   does all that for many small parameters in one call, by `pointed` or `foreach`;
               `steps_together` makes their steps
    state      declares what a checkpoint holds of each parameter, and says where the mean is
    transient  declares what an optimizer holds besides, between the samples of a step
"""

from mergekit_bayes.optim.bsam import BSAM, bsam_update
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.optim.shards import full_tensors
from mergekit_bayes.optim.updates import ggn_update, ivon_update
from mergekit_bayes.optim.vogn import VOGN, vogn_update

__all__ = [
    "BSAM",
    "IVON",
    "VOGN",
    "bsam_update",
    "full_tensors",
    "ggn_update",
    "ivon_update",
    "vogn_update",
]
