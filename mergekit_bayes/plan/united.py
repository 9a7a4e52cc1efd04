"""`--vocab union`: the models of a merge with the rows of all their tokens, and the files."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.side_files import CHAT, CHAT_TEMPLATE, group_of, inline_template
from mergekit_bayes.documents import read_object
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.side_files import SideFileChoice
from mergekit_bayes.plan.unions import TokenPlan, plan_tokens
from mergekit_bayes.posterior import Posterior

_GENERATION = Path("generation_config.json")


class United(NamedTuple):
    """The models of a merge, brought to one list of tokens.

    Attributes:
        inputs: The models, whose means have the rows of the output's tokens.
        tokens: The tokens.
    """

    inputs: Inputs
    tokens: TokenPlan


class SideFilesOfTokens(NamedTuple):
    """The side files of an output whose tokens were chosen.

    Attributes:
        choice: What is copied.
        made: The text of files that are made, by name; None for one that is not copied.
    """

    choice: SideFileChoice | None
    made: dict[str, str | None]


def unite(method: Method, inputs: Inputs, notes: list[str]) -> United:
    """Bring all models of a merge to the tokens of all of them, those of the base first.

    Args:
        method: The merging rule.
        inputs: The models.
        notes: Remarks for the report are appended here.

    Raises:
        BmergeError: As `plan_tokens`.
        MismatchError: A model gets other rows, and its precision would have to get them, too.
    """
    listed = list(inputs)
    tokens = plan_tokens(
        [model.posterior for model in listed], 0 if inputs.base is not None else None
    )
    for model in tokens.models:
        if method.needs_precision and model.stored_mean is not None:
            raise MismatchError(
                f"'{model.ref}' gets other rows by --vocab union, and its precision has those that "
                "it was stored with. Merge without precisions (--weights uniform), or keep the "
                "rows of one model with --vocab base."
            )
    extended = " with the tokens of the others" if tokens.tokens.is_extended else ""
    notes.append(f"the tokenizer is that of '{tokens.ref}'{extended}")
    notes += tokens.notes
    renewed = [
        replace(model, posterior=posterior)
        for model, posterior in zip(listed, tokens.models, strict=True)
    ]
    has_base = inputs.base is not None
    base = renewed[0] if has_base else None
    return United(Inputs(base, tuple(renewed[1:] if has_base else renewed)), tokens)


def side_files_of(
    choice: SideFileChoice | None, tokens: TokenPlan, notes: list[str]
) -> SideFilesOfTokens:
    """Give an output the tokenizer of its tokens; all else stays as it was chosen.

    The special tokens that configs name by number keep their meaning: each number is replaced by
    that of the same token in the output.

    Args:
        choice: What would be copied.
        tokens: The tokens.
        notes: It is appended here if there is no folder to write it to.
    """
    models = tokens.models
    if choice is None:
        notes.append("the output is a file, and the tokenizer of its rows is not written")
        return SideFilesOfTokens(None, {})
    made: dict[str, str | None] = {str(name): text for name, text in tokens.written.items()}
    files = dict(choice.gathered.files)
    for name in choice.gathered.files:
        if group_of(name) == "tokenizer" and name not in tokens.copied:
            made.setdefault(str(name), None)  # it lists other tokens
    files |= tokens.copied
    ids = dict(choice.token_ids)
    owner = next((i for i, model in enumerate(models) if model.ref == choice.ref), None)
    if owner is not None:
        ids |= {k: x for k, x in tokens.new_ids(owner, ids).items() if x is not None}
    generation_ids = dict(choice.generation_ids)
    if (file := files.get(_GENERATION)) is not None:
        owners = (i for i, model in enumerate(models) if file.parent in _folders(model))
        if (position := next(owners, None)) is not None:
            generation_ids |= tokens.new_ids(position, read_object(file))
    folders = choice.gathered.folders | {"tokenizer": tokens.folder}
    template, chat = choice.gathered.template, folders.get(CHAT)
    if template is None and chat not in (None, tokens.folder) and Path(CHAT_TEMPLATE) not in files:
        template = inline_template(chat)  # it was in a config of another tokenizer
    gathered = choice.gathered._replace(
        files=dict(sorted(files.items())), folders=folders, template=template
    )
    return SideFilesOfTokens(
        replace(choice, gathered=gathered, token_ids=ids, generation_ids=generation_ids), made
    )


def _folders(model: Posterior) -> list[Path]:
    return [part.path for part in (model, *model.parts)]
