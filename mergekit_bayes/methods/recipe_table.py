"""The table of what mergekit's recipes mean by a `merge_method`.

Where mergekit's rule is the published one, the same object stands in `table.METHODS`.
"""

from mergekit_bayes.methods.karcher import KARCHER
from mergekit_bayes.methods.model_stock import MODEL_STOCK
from mergekit_bayes.methods.multislerp import MULTISLERP
from mergekit_bayes.methods.nearswap import NEARSWAP
from mergekit_bayes.methods.nuslerp import NUSLERP
from mergekit_bayes.methods.passthrough import PASSTHROUGH
from mergekit_bayes.methods.recipe_linear import RECIPE_LINEAR
from mergekit_bayes.methods.recipe_slerp import RECIPE_SLERP

_DENSE = (
    RECIPE_LINEAR,
    RECIPE_SLERP,
    NUSLERP,
    MULTISLERP,
    KARCHER,
    MODEL_STOCK,
    NEARSWAP,
    PASSTHROUGH,
)
RECIPE_METHODS = {m.name: m for m in _DENSE}
