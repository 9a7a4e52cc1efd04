"""The weighted average of checkpoints, also known as model soup (Wortsman et al., ICML 2022)."""

from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.means import weighted_mean

AVERAGE = Method(
    "average",
    weighted_mean,
    needs_base=False,
    needs_precision=False,
    summary="The mean of the weights; scales are shares (model soup, Wortsman et al., ICML 2022).",
    example="bmerge merge A B",
    formula="m = sum_t scale_t m_t / sum_t scale_t",
    is_posterior=True,
    turns=True,
)
