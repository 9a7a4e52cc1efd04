"""The table of merging rules as mergekit's YAML means them, by its `merge_method`.

Where mergekit departs from a paper, its rule stands here, and the paper's in `table`; the docstring
of each says how they differ. Where it does not, the same object stands in both.
"""

from mergekit_bayes.methods.arcee_fusion import ARCEE_FUSION
from mergekit_bayes.methods.karcher import KARCHER
from mergekit_bayes.methods.model_stock import MODEL_STOCK
from mergekit_bayes.methods.multislerp import MULTISLERP
from mergekit_bayes.methods.nearswap import NEARSWAP
from mergekit_bayes.methods.nuslerp import NUSLERP
from mergekit_bayes.methods.passthrough import PASSTHROUGH
from mergekit_bayes.methods.recipe_linear import RECIPE_LINEAR
from mergekit_bayes.methods.recipe_slerp import RECIPE_SLERP
from mergekit_bayes.methods.sce import SCE
from mergekit_bayes.methods.weighed_arithmetic import WEIGHED_ARITHMETIC
from mergekit_bayes.methods.weighed_breadcrumbs import WEIGHED_BREADCRUMBS
from mergekit_bayes.methods.weighed_breadcrumbs_ties import WEIGHED_BREADCRUMBS_TIES
from mergekit_bayes.methods.weighed_dare_linear import WEIGHED_DARE_LINEAR
from mergekit_bayes.methods.weighed_dare_ties import WEIGHED_DARE_TIES
from mergekit_bayes.methods.weighed_della import WEIGHED_DELLA
from mergekit_bayes.methods.weighed_della_linear import WEIGHED_DELLA_LINEAR
from mergekit_bayes.methods.weighed_ties import WEIGHED_TIES

_ALL = (
    RECIPE_LINEAR,
    RECIPE_SLERP,
    NUSLERP,
    MULTISLERP,
    KARCHER,
    WEIGHED_ARITHMETIC,
    WEIGHED_TIES,
    WEIGHED_DARE_LINEAR,
    WEIGHED_DARE_TIES,
    WEIGHED_DELLA,
    WEIGHED_DELLA_LINEAR,
    WEIGHED_BREADCRUMBS,
    WEIGHED_BREADCRUMBS_TIES,
    SCE,
    MODEL_STOCK,
    NEARSWAP,
    ARCEE_FUSION,
    PASSTHROUGH,
)
RECIPE_METHODS = {method.name: method for method in _ALL}
