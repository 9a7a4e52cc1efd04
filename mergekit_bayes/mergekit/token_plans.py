"""The tokens that a recipe chooses, in the words of our plans."""

from collections.abc import Mapping

from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.mergekit.objects import Reference, Tokenizer, TokenSource
from mergekit_bayes.plan.unions import RowChoice, TokenChoice, TokenPlan, plan_tokens
from mergekit_bayes.posterior import Posterior


def tokens_of(
    tokenizer: Tokenizer, models: Mapping[str, Posterior], base: Posterior | None
) -> TokenPlan:
    """Bring all models of a recipe to the tokens that it chooses.

    Args:
        tokenizer: What the recipe says.
        models: The models, by how recipes write them.
        base: The base; None without one.

    Raises:
        BmergeError: As `plan_tokens`.
        ConfigError: A token has no source.
    """
    for token, given in tokenizer.tokens.items():
        if given.source is None:
            raise ConfigError(
                f"tokenizer.tokens: {shown(token)} has no source, which says whose row it gets: a "
                "model, or a mapping with kind. Name one, or leave the token out."
            )

    def ref(model: Reference | None) -> str | None:
        if model is None:
            return None
        opened = models.get(str(model))
        return str(model) if opened is None else opened.ref

    source = ref(tokenizer.model) or tokenizer.source
    rows = {token: _row(given, ref(given.model)) for token, given in tokenizer.tokens.items()}
    choice = TokenChoice(source, rows, tokenizer.pad_to_multiple_of or 1)
    listed = list(models.values())
    position = next((i for i, model in enumerate(listed) if model is base), None)
    return plan_tokens(listed, position, choice)


def _row(given: TokenSource, model: str | None) -> RowChoice:
    return RowChoice(model, given.token, given.token_id, given.force)
