"""mergekit's recipes, read as they are."""

from mergekit_bayes.mergekit.document import is_mergekit, read_recipes
from mergekit_bayes.mergekit.objects import Recipe

__all__ = ["Recipe", "is_mergekit", "read_recipes"]
