"""The tokens that a recipe chooses, in the words of our plans, and the files that follow."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.side_files import group_of
from mergekit_bayes.documents import read_object
from mergekit_bayes.mergekit.objects import Reference, Tokenizer, TokenSource
from mergekit_bayes.plan.side_files import SideFileChoice
from mergekit_bayes.plan.unions import RowChoice, TokenChoice, TokenPlan, plan_tokens
from mergekit_bayes.posterior import Posterior

_GENERATION = Path("generation_config.json")


class SideFilesOfTokens(NamedTuple):
    """The side files of an output whose tokens were chosen.

    Attributes:
        choice: What is copied.
        made: The text of files that are made, by name; None for one that is not copied.
    """

    choice: SideFileChoice | None
    made: dict[str, str | None]


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
    """

    def ref(model: Reference | None) -> str | None:
        if model is None:
            return None
        opened = models.get(str(model))
        return str(model) if opened is None else opened.ref

    source = ref(tokenizer.model) or tokenizer.source
    rows = {
        token: _row(given, ref(given.model))
        for token, given in tokenizer.tokens.items()
        if given.source is not None
    }
    choice = TokenChoice(source, rows, tokenizer.pad_to_multiple_of or 1)
    listed = list(models.values())
    position = next((i for i, model in enumerate(listed) if model is base), None)
    return plan_tokens(listed, position, choice)


def _row(given: TokenSource, model: str | None) -> RowChoice:
    return RowChoice(model, given.token, given.token_id, given.force)


def side_files_of(
    choice: SideFileChoice | None, tokens: TokenPlan, models: Mapping[str, Posterior]
) -> SideFilesOfTokens:
    """Give the output the tokenizer of its tokens.

    Args:
        choice: What would be copied.
        tokens: The tokens.
        models: The models of `tokens`, in its order.
    """
    if choice is None:
        return SideFilesOfTokens(None, {})
    made: dict[str, str | None] = {str(name): text for name, text in tokens.written.items()}
    files = dict(choice.gathered.files)
    kept = {*tokens.copied, *tokens.written}
    for name in files:
        if group_of(name) == "tokenizer" and name not in kept:
            made[str(name)] = None  # it lists other tokens
    files |= tokens.copied
    ids = dict(choice.generation_ids)
    if (file := files.get(_GENERATION)) is not None:
        for position, model in enumerate(models.values()):
            if model.path == file.parent:
                ids |= tokens.new_ids(position, read_object(file))
                break
    gathered = choice.gathered._replace(files=files)
    return SideFilesOfTokens(replace(choice, gathered=gathered, generation_ids=ids), made)
