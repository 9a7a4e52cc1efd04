"""Which columns of a set of rows hold what a language model learns from.

Rows have one of three forms: a text, a pair of a prompt and its completion, or a conversation.
What a user names is taken; a name is guessed only where one form alone is there.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from mergekit_bayes.errors import ConfigError, MismatchError

TEXT, TOOLS = "text", "tools"
_PAIR = ("prompt", "completion")
_CONVERSATIONS = ("messages", "conversations")

TextColumn: TypeAlias = Annotated[
    str | None,
    Field(
        description="Column of the text. Without any name, the form of the rows is what their "
        "columns say where they say one: `text`, `messages` (or `conversations`), or `prompt` and "
        "`completion`."
    ),
]
MessagesColumn: TypeAlias = Annotated[
    str | None,
    Field(
        description="Column of conversations, which the tokenizer's chat template writes; the "
        "assistant's turns are scored."
    ),
]
PromptColumn: TypeAlias = Annotated[
    str | None,
    Field(description="Column of the prompts, texts or lists of messages, which are not scored."),
]
CompletionColumn: TypeAlias = Annotated[
    str | None,
    Field(description="Column of their completions, of the same kind, which are scored."),
]


class Columns(NamedTuple):
    """Columns that a user has named; None for those that are looked for.

    Attributes:
        text: Column of texts.
        messages: Column of conversations.
        prompt: Column of prompts.
        completion: Column of completions.
    """

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


class Form(NamedTuple):
    """The form of the rows of one source.

    Attributes:
        kind: `text`, `pair` or `messages`.
        columns: The columns that are read: one, or those of the prompt and the completion.
        is_guessed: Whether the user has named none of them.
    """

    kind: Literal["text", "pair", "messages"]
    columns: tuple[str, ...]
    is_guessed: bool = False

    def describe(self) -> str:
        """What is read and what is scored, for a line to the user."""
        names = " and ".join(f"'{name}'" for name in self.columns)
        if self.kind == "pair":
            return f"pairs in the columns {names}, of which the completion is scored"
        if self.kind == "messages":
            return f"conversations in the column {names}, of which the assistant's turns are scored"
        return f"texts in the column {names}"


def form_of(asked: Columns, features: Mapping[str, Any], source: str) -> Form:
    """The form of a source's rows.

    Args:
        asked: What the user has named.
        features: The types of the source's columns by their names, as `datasets` has them.
        source: Name of the source, for messages.

    Returns:
        The form. A source with no known column counts as texts, so that whoever reads it names the
        columns that would do.

    Raises:
        ConfigError: Columns of several forms are named.
        MismatchError: Columns of several forms are there and none is named, or the rows are for
            another kind of training.
    """
    named = _named_form(asked)
    if named is not None:
        return named
    _refuse_preferences(features, source)
    found = [Form("text", (TEXT,))] if TEXT in features else []
    found += [Form("messages", (name,)) for name in _CONVERSATIONS if name in features]
    if all(name in features for name in _PAIR):
        found.append(Form("pair", _PAIR))
    if len(found) > 1:
        there = ", ".join(" and ".join(form.columns) for form in found)
        ways = " or ".join(f"{form.kind}_column: {form.columns[0]}" for form in found)
        ways = ways.replace("pair_column", "prompt_column")
        raise MismatchError(f"'{source}' could be read by its columns {there}. Name one: {ways}.")
    if found:
        return found[0]._replace(is_guessed=True)
    if _PAIR[0] in features:
        raise MismatchError(
            f"'{source}' has prompts without completions. Models learn from such rows by sampling, "
            "as with trl's GRPOTrainer; to train on the prompts as texts, set text_column: prompt."
        )
    return Form("text", (TEXT,))


def _named_form(asked: Columns) -> Form | None:
    named: dict[Literal["text", "pair", "messages"], str] = {}
    if asked.text is not None:
        named["text"] = "text_column"
    if asked.messages is not None:
        named["messages"] = "messages_column"
    if asked.prompt is not None or asked.completion is not None:
        named["pair"] = "prompt_column and completion_column"
    if len(named) > 1:
        raise ConfigError(
            f"{', '.join(named.values())}: rows have one form, a text, a conversation or a pair. "
            "Name the columns of one."
        )
    if "text" in named:
        return Form("text", (asked.text or TEXT,))
    if "messages" in named:
        return Form("messages", (asked.messages or _CONVERSATIONS[0],))
    if "pair" in named:
        return Form("pair", (asked.prompt or _PAIR[0], asked.completion or _PAIR[1]))
    return None


def _refuse_preferences(features: Mapping[str, Any], source: str) -> None:
    """Refuse rows that compare or judge answers: they have losses of their own.

    Raises:
        MismatchError: They do; the message names the trainer that takes them.
    """
    is_truth = str(getattr(features.get("label"), "dtype", "")) == "bool"
    if "chosen" in features and "rejected" in features:
        what, way = "preferences (chosen and rejected)", "trl's DPOTrainer, or its RewardTrainer"
        other = "To train on the preferred answers alone, name their column."
    elif all(name in features for name in _PAIR) and is_truth:
        what, way = "judged completions (a label of true or false)", "trl's KTOTrainer"
        other = "To train on the good ones alone, keep them by where and name prompt_column."
    elif "completions" in features and "labels" in features:
        what, way = "judged steps (completions and labels)", "trl's PRMTrainer"
        other = "To train on texts of these rows, write them into a column of their own."
    else:
        return
    raise MismatchError(
        f"'{source}' holds {what}, which bmerge does not train on. Use {way}. {other}"
    )
