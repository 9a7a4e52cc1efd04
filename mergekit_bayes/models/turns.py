"""Conversations as a chat template writes them, and which characters of that the assistant wrote.

A template with `{% generation %}` marks the assistant's turns itself. Of any other the text before
a turn is rendered alone: where that is how the text with the turn begins, and that how the whole
begins, the rest is the turn. Templates that render a turn in the history otherwise than at the end
(some strip reasoning there) fail this; of those each turn becomes a text of its own, which ends
with the turn and is what the model will see when it writes it.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_bayes.documents import DocumentError, parse_json
from mergekit_bayes.errors import CheckpointError, MismatchError, shown
from mergekit_bayes.libraries import call
from mergekit_bayes.models.cells import described

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
# Keys of a message that can stand for its content: a call of a tool, or reasoning alone.
_IN_PLACE_OF_CONTENT = {
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
}
_SHARED = {"human": "user", "gpt": ASSISTANT}  # roles of conversations in ShareGPT's form
_ADVICE = (
    "Give it a template that marks the assistant's turns with {% generation %} "
    "(chat_template: FILE in bmerge finetune), or remove such rows."
)


class Conversation(NamedTuple):
    """The messages of a row.

    Attributes:
        messages: Objects with `role` and `content`, and whatever else the template reads.
        scored_from: Number of messages at the start that are context only.
        tools: Descriptions of tools, for the template.
        place: The row, for messages.
    """

    messages: list[dict[str, Any]]
    scored_from: int
    tools: list[Any] | None
    place: str


class Scored(NamedTuple):
    """A text, and the characters of it that are scored, as (first, one past the last)."""

    text: str
    spans: list[tuple[int, int]]


def conversation(
    messages: object,
    column: str,
    place: str,
    *,
    completion: tuple[object, str] | None = None,
    tools: object = None,
) -> Conversation:
    """The conversation of a row, after its messages were checked.

    Args:
        messages: Messages as they are in the file, with `role` and `content` or, as ShareGPT has
            them, `from` and `value`.
        column: Name of their column.
        place: The row, for messages.
        completion: More messages, behind those, which alone are scored then, and their column.
        tools: What the row's column of tools holds.

    Raises:
        MismatchError: They are no messages.
    """
    first = _messages(messages, column, place)
    more = [] if completion is None else _messages(*completion, place)
    start = len(first) if completion is not None else 0
    return Conversation([*first, *more], start, _tools(tools, place), place)


def says_something(chat: Conversation) -> bool:
    """Whether the assistant says or calls anything in what is scored."""
    return any(
        message["role"] == ASSISTANT and (str(message["content"]).strip() or len(message) > 2)
        for message in chat.messages[chat.scored_from :]
    )


def refuse_no_template(tokenizer: "PreTrainedTokenizerBase", model: str, source: str) -> None:
    """Refuse conversations for a model without a chat template, or whose tokens have no place.

    Raises:
        CheckpointError: There is none.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"'{source}' holds conversations, and the tokenizer of '{model}' has no chat template. "
            "Name one (chat_template: FILE in bmerge finetune), start from a chat model, or write "
            "each row as one string in a column 'text'."
        )


def rendered(chat: Conversation, tokenizer: "PreTrainedTokenizerBase") -> list[Scored]:
    """The texts of a conversation: one, or one for each of the assistant's turns.

    Raises:
        CheckpointError: The template fails on the messages.
        MismatchError: The template does not say which characters are the assistant's.
    """
    template = call(
        f"{chat.place}: the chat template cannot be chosen",
        partial(tokenizer.get_chat_template, None, chat.tools),
    )
    render = partial(_render, chat, tokenizer, template)
    if _MARKED.search(template):
        text, spans = render(len(chat.messages), is_marked=True)
        start = 0
        if chat.scored_from:
            start = len(_beginning(render(chat.scored_from, is_prompt=True)[0], text, chat))
        return [Scored(text, [(a, b) for a, b in spans if b > start])]
    return _by_prefixes(chat, render)


def _by_prefixes(chat: Conversation, render: Callable[..., tuple[str, Any]]) -> list[Scored]:
    text, _ = render(len(chat.messages))
    turns: list[Scored] = []
    for i in range(chat.scored_from, len(chat.messages)):
        if chat.messages[i]["role"] == ASSISTANT:
            after, _ = render(i + 1)
            before = _beginning(_before(i, render), after, chat)
            turns.append(Scored(after, [(len(before), len(after))]))
    if all(text.startswith(turn.text) for turn in turns):
        return [Scored(text, [span for turn in turns for span in turn.spans])]
    return turns


def _before(count: int, render: Callable[..., tuple[str, Any]]) -> str:
    """The text that the assistant answers; before a first message some templates have none."""
    try:
        return render(count, is_prompt=True)[0]
    except CheckpointError:
        if count:
            raise
        return ""


def _beginning(before: str, text: str, chat: Conversation) -> str:
    """The text before a turn, if the text with the turn begins with it."""
    if not text.startswith(before):
        pairs = enumerate(zip(before, text, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(text)))
        raise MismatchError(
            f"{chat.place}: the chat template renders what comes before the assistant's turn "
            f"otherwise once the turn is there (from {shown(before[same : same + 20])} to "
            f"{shown(text[same : same + 20])}), so that it does not say which tokens are the "
            f"assistant's. {_ADVICE}"
        )
    return before


def _render(
    chat: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    count: int,
    *,
    is_prompt: bool = False,
    is_marked: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The first `count` messages as text, and the spans that the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = call(
        f"{chat.place}: the chat template fails on the messages",
        lambda: render_jinja_template(
            conversations=[chat.messages[:count]],
            tools=chat.tools,
            chat_template=template,
            add_generation_prompt=is_prompt,
            return_assistant_tokens_mask=is_marked,
            **tokenizer.special_tokens_map,
        ),
        "Remove such rows, write them as the template expects, or give another template "
        "(chat_template: FILE in bmerge finetune).",
    )
    return texts[0], spans[0] if is_marked else []


def _messages(value: object, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise MismatchError(
            f"{place}: '{column}' is {described(value)}, expected a list of messages, each an "
            "object with role and content. Write such a list there, or name another column."
        )
    return [
        _message(message, f"{place}: message {i} of '{column}'")
        for i, message in enumerate(value, 1)
    ]


def _message(value: object, place: str) -> dict[str, Any]:
    """One message, without the keys that a reader has filled with null."""
    if not isinstance(value, Mapping):
        raise MismatchError(f"{place} is {described(value)}, expected an object.")
    message = _without_null(value)
    assert isinstance(message, dict)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {
            "role": _SHARED.get(str(role), role),
            "content": message.pop("value", None),
        } | message
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise MismatchError(f"{place} has {described(role)} as its role, expected text.")
    if content is None and message.keys() & _IN_PLACE_OF_CONTENT:
        content = ""
    if isinstance(content, list):
        content = _text_of_parts(content)
    if content is None and len(others := message.keys() - {"role", "content"}):
        raise MismatchError(
            f"{place} has no content, but {', '.join(sorted(others))}. Write its text as content."
        )
    if not isinstance(content, str):
        what = "a list of parts" if content and isinstance(content, list) else described(content)
        raise MismatchError(
            f"{place} has {what} as its content, expected text. Images and other "
            "parts are not read."
        )
    return {"role": role, "content": content} | {
        name: part for name, part in message.items() if name not in ("role", "content")
    }


def _text_of_parts(parts: list[Any]) -> object:
    """The text of a message that is written as a list of texts; other lists as they are."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    is_text = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if is_text and parts else parts


def _without_null(value: object) -> object:
    """A value without the keys of objects that are null: readers give all objects the same keys."""
    if isinstance(value, Mapping):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_without_null(part) for part in value]
    return value


def _tools(value: object, place: str) -> list[Any] | None:
    """Tools as a list of objects; some sets hold them as JSON in a string."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except DocumentError as error:
            raise MismatchError(f"{place}: 'tools' is not JSON ({error}).") from None
    if value is None or value == []:
        return None
    tools = _without_null(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MismatchError(f"{place}: 'tools' is {described(value)}, expected a list of objects.")
    return tools
