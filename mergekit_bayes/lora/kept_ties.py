"""Embeddings and heads that an adapter keeps tied (`ensure_weight_tying`), and must hold alike."""

from mergekit_bayes.checkpoint.ties import Tie, find_ties, have_same_values
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.lora.adapted import AdaptedSource


def refuse_apart(mean: AdaptedSource) -> None:
    """Refuse an adapter that says it keeps an embedding and a head tied, and holds other values.

    PEFT trains one tensor for both: one copy of a whole tensor, and of factors (B A)' for the
    embedding and A' B' for the head. Which of two different ones counts is not known.

    Raises:
        CheckpointError: They differ.
    """
    if not mean.adapter.config.get("ensure_weight_tying"):
        return
    for tie in find_ties({name: spec.shape for name, spec in mean.specs.items()}):
        for head in tie.heads:
            if head in mean.specs and not _are_alike(mean, tie, head):
                raise CheckpointError(
                    f"'{mean.adapter.ref}' says that it keeps '{tie.source}' and '{head}' tied "
                    "(ensure_weight_tying), and holds different values of them: they were trained "
                    "apart. Save it again from the trained model, or set ensure_weight_tying to "
                    "false in adapter_config.json if both are meant."
                )


def _are_alike(mean: AdaptedSource, tie: Tie, head: str) -> bool:
    """Whether an adapter holds the same of an embedding and a head, as far as it holds both."""
    stored = mean.adapter.posterior.mean
    wholes = [mean.replaced[name] for name in (tie.source, head) if name in mean.replaced]
    if len(wholes) == 2 and not have_same_values(stored, *wholes):
        return False
    if tie.source in mean.adapted and head in mean.adapted:
        table, matrix = mean.adapted[tie.source].layer, mean.adapted[head].layer
        if not table.is_embedding or table.rank != matrix.rank or table.shape != matrix.shape:
            return False
        one, other = mean.adapter.factors(table), mean.adapter.factors(matrix)
        is_same = bool((other.b == one.a.T).all() and (other.a == one.b.T).all())
        return is_same and table.scaling == matrix.scaling
    return True
