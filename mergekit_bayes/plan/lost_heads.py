"""Refuse a language model whose config unties its output head, but whose file has none."""

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Input, Inputs

_WITH_HEADS = ("ForCausalLM", "LMHeadModel")  # how classes with an output head are called


def refuse_lost_heads(inputs: Inputs) -> None:
    """Refuse a merge in which a model has lost its output head and no model stores one.

    The output would have no head either, and a loader would make one up at random. Where another
    model stores a head, the plan says which one is missing, and what would keep it.

    Raises:
        MismatchError: Such a model.
    """
    if any(len(_token_matrices(model)) > 1 for model in inputs):
        return
    for model in inputs:
        matrices = _token_matrices(model)
        if matrices and _unties(model):
            raise MismatchError(
                f"'{model.ref}' has no output head: its config.json has tie_word_embeddings false, "
                f"and of its tensors only '{matrices[0]}' has a row for each token. The head was "
                "lost when the model was saved; save it again. If the head is tied to the "
                "embedding, set tie_word_embeddings to true there."
            )


def _token_matrices(model: Input) -> list[str]:
    """The tensors of the shape of the input embedding, under whatever names."""
    specs = model.posterior.mean.specs
    embeddings = [n for n, spec in specs.items() if is_vocabulary(n) and len(spec.shape) == 2]
    shapes = {specs[name].shape for name in embeddings}
    return [name for name, spec in specs.items() if spec.shape in shapes]


def _unties(model: Input) -> bool:
    config = read_config(model.posterior.path)
    said = {**config, **text_config(config)}
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    return said.get("tie_word_embeddings") is False and str(name).endswith(_WITH_HEADS)
