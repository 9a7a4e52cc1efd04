"""Adam's second moments, as a training leaves them, and the precision that follows from them."""

from mergekit_bayes.moments.base import Moment, Moments, precision_of
from mergekit_bayes.moments.naming import Parameter, name_moments
from mergekit_bayes.moments.reading import read_moments

__all__ = ["Moment", "Moments", "Parameter", "name_moments", "precision_of", "read_moments"]
