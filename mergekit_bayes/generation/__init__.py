"""Texts of a causal language model: continuations of prompts, and texts that it writes by itself.

Both are drawn with noise that does not depend on the batch.
"""

from mergekit_bayes.generation.sampling import (
    Samples,
    Sampling,
    room_for_prompts,
    sample_continuations,
    write_texts,
)

__all__ = ["Samples", "Sampling", "room_for_prompts", "sample_continuations", "write_texts"]
