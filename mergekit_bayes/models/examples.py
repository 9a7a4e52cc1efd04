"""From rows where they lie to the examples of a loaded model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from mergekit_bayes.draws import mix
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.models.chat import encode_chat, has_words, read_chat
from mergekit_bayes.models.columns import TEXT, TOOLS, Columns, Form, form_of
from mergekit_bayes.models.encode import Encoding, encode_texts, refuse_unscored
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import Table, Wanted, load_tables
from mergekit_bayes.models.turns import ASSISTANT, Conversation

if TYPE_CHECKING:
    from datasets import Dataset


class Encoded(NamedTuple):
    """The examples of some rows.

    Attributes:
        rows: Rows that were read, after `where` and `max_rows`, and without `blank`.
        examples: As `encode_rows` makes them: one a row, or blocks of packed rows. Some templates
            need an example for each of the assistant's turns.
        blank: Number of rows without a word that were left out.
        notes: What was guessed, cut or left out, a clause each.
    """

    rows: int
    examples: list[dict[str, Any]]
    blank: int = 0
    notes: tuple[str, ...] = ()


class Weights(NamedTuple):
    """How often a pass over the data draws each row of its sources.

    Attributes:
        sources: A factor for each source: 2 for every row twice, 0.5 for half of the rows.
        seed: Seed of the choice of rows where a factor is no whole number.
    """

    sources: Sequence[float]
    seed: int


def read_examples(
    refs: str | Sequence[str],
    loaded: Loaded,
    *,
    columns: Columns = Columns(),  # noqa: B008 (it is immutable)
    label: str | None = None,
    where: Mapping[str, object] | None = None,
    max_rows: int | None = None,
    max_length: int = 512,
    pack: bool = False,
    skip_blank: bool = False,
    weights: Weights | None = None,
) -> Encoded:
    """Read rows and encode them.

    Args:
        refs: As `rows.load_rows` takes them, with `where` and `max_rows`.
        loaded: The model that they are for. Classifiers read texts only.
        columns: The columns that the user has named.
        label: Column of a classifier's label; None for rows whose labels are not looked at.
        where: Which rows.
        max_rows: How many of them at most.
        max_length: As `encode.encode_rows` takes it, with `pack`.
        pack: Whether texts are joined into blocks.
        skip_blank: Leave out rows without a word. Of one a language model learns that a text may
            end at once; an estimate would count it as a row.
        weights: How often each row is drawn; by default once.

    Raises:
        CheckpointError: They cannot be read.
        ConfigError: Rows that are no texts are to be joined into blocks.
        MismatchError: Rows without the named columns or with unknown labels, or none with a word.
    """
    names = [refs] if isinstance(refs, str) else list(refs)
    parts = []
    for table, form, drawn_from in _tables(names, loaded, columns, label, where, max_rows, weights):
        parts.append(_part(table, form, drawn_from, label, skip_blank=skip_blank))
    if not any(part.worded for part in parts):
        if all(part.form.kind == "messages" for part in parts):
            _refuse_unanswered(names, parts)
        _refuse_wordless(names, parts[0].form)
    if pack:
        parts = [_one_stream(parts)]
    max_length = min(max_length, loaded.context)
    encodings = [_encoded(part, loaded, label, max_length, pack=pack) for part in parts]
    examples = [example for encoding in encodings for example in encoding.examples]
    try:
        cut_at = max_length if any(encoding.cut for encoding in encodings) else None
        refuse_unscored(examples, parts[0].form.columns[-1], cut_at)
    except MismatchError as error:
        raise MismatchError(f"{', '.join(map(repr, names))}: {error}") from None
    notes = [
        note for part, made in zip(parts, encodings, strict=True) for note in _notes_on(part, made)
    ]
    return Encoded(
        sum(len(part.rows) for part in parts),
        examples,
        sum(part.blank for part in parts),
        (*notes, *_notes_on_lengths(encodings, max_length)),
    )


def refuse_blank(refs: str | Sequence[str], column: str, texts: Sequence[str]) -> None:
    """Refuse rows of which none has a word: a tokenizer that adds EOS makes examples even of them.

    Raises:
        MismatchError: There is nothing to read in them.
    """
    if not any(text.strip() for text in texts):
        _refuse_wordless([refs] if isinstance(refs, str) else refs, Form("text", (column,)))


def _refuse_wordless(names: Sequence[str], form: Form) -> NoReturn:
    column, rows = form.columns[-1], f"no row of {', '.join(names)}"
    if form.kind == "messages":
        raise MismatchError(
            f"{rows} has a turn of the assistant with a word in its column '{column}'. Such turns "
            "alone are scored: their role is assistant."
        )
    raise MismatchError(f"{rows} has a word in its column '{column}', or a token to read.")


def _refuse_unanswered(names: Sequence[str], parts: Sequence["_Part"]) -> None:
    """Refuse conversations without a turn of the assistant, which is all that is scored.

    Raises:
        MismatchError: There is none.
    """
    roles = frozenset[str]().union(*(part.roles for part in parts))
    if ASSISTANT not in roles:
        raise MismatchError(
            f"no conversation of {', '.join(map(repr, names))} has a turn of the assistant, which "
            f"is what is scored: the roles are {', '.join(sorted(roles))}. Write role: assistant "
            "there (gpt beside from)."
        )


class _Part(NamedTuple):
    """The checked rows of one source.

    Attributes:
        name: The source.
        form: The form of its rows.
        rows: Texts, or pairs and conversations.
        labels: Labels of the texts, if they are looked at.
        worded: Number of rows with a word.
        blank: Number of rows without one that were left out.
        drawn_from: Number of rows that the source has, where weights draw more or fewer of them.
        roles: Who speaks in its conversations, those that were left out included.
    """

    name: str
    form: Form
    rows: Sequence[Any]
    labels: Sequence[object] | None
    worded: int
    blank: int
    drawn_from: int | None
    roles: frozenset[str]


def _tables(
    names: Sequence[str],
    loaded: Loaded,
    columns: Columns,
    label: str | None,
    where: Mapping[str, object] | None,
    max_rows: int | None,
    weights: Weights | None,
) -> Iterator[tuple[Table, Form, int | None]]:
    """The tables of all sources with their forms, and the rows that weights have drawn from."""
    forms = []

    def choose(name: str, rows: "Dataset") -> Wanted:
        if loaded.task == "classification":
            form = _form_of_labelled(columns)
        else:
            form = form_of(columns, rows.features, name)
        forms.append(form)
        if form.kind == "text":
            return Wanted(text=form.columns[0], label=label)
        return Wanted((*form.columns, *([TOOLS] if TOOLS in rows.column_names else [])))

    tables = load_tables(names, choose, where=where, max_rows=max_rows)
    for i, (table, form) in enumerate(zip(tables, forms, strict=True)):
        if not len(table.rows):
            continue
        count, factor = len(table.rows), weights.sources[i] if weights else 1.0
        if factor == 1:
            yield table, form, None
            continue
        assert weights is not None
        drawn = drawn_rows(count, factor, mix(weights.seed, i))
        numbers = [table.numbers[row] for row in drawn]
        yield table._replace(rows=table.rows.select(drawn), numbers=numbers), form, count


def drawn_rows(count: int, weight: float, seed: int) -> list[int]:
    """The rows that a pass over a source of this weight draws, in their order.

    Every row comes as often as the whole part of the weight says. Further rows, chosen at random,
    make it round(weight * count) rows, at least one.

    Args:
        count: Rows of the source.
        weight: Its weight, above 0.
        seed: Seed of the choice.
    """
    whole, rest = divmod(max(1, round(weight * count)), count)
    generator = torch.Generator().manual_seed(seed % 2**63)
    some = torch.randperm(count, generator=generator)[:rest].tolist()
    return sorted([*range(count)] * whole + some)


def _form_of_labelled(columns: Columns) -> Form:
    """Classifiers read texts.

    Raises:
        ConfigError: Other columns are named.
    """
    if any((columns.messages, columns.prompt, columns.completion)):
        raise ConfigError(
            "messages_column, prompt_column and completion_column are for language models. A "
            "classifier reads the texts in text_column."
        )
    return Form("text", (columns.text or TEXT,))


def _part(
    table: Table, form: Form, drawn_from: int | None, label: str | None, *, skip_blank: bool
) -> _Part:
    rows: Sequence[Any]
    labels: Sequence[object] | None = None
    if form.kind == "text":
        rows = list(table.rows[form.columns[0]])
        labels = None if label is None else list(table.rows[label])
        worded = [i for i, text in enumerate(rows) if text.strip()]
    else:
        rows = read_chat(table, form)
        worded = [i for i, row in enumerate(rows) if has_words(row)]
    roles = frozenset(
        str(message["role"])
        for row in rows
        if isinstance(row, Conversation)
        for message in row.messages
    )
    blank = len(rows) - len(worded) if skip_blank else 0
    if blank:
        rows = [rows[i] for i in worded]
        labels = None if labels is None else [labels[i] for i in worded]
    return _Part(table.name, form, rows, labels, len(worded), blank, drawn_from, roles)


def _one_stream(parts: Sequence[_Part]) -> _Part:
    """All texts as one part, so that blocks go on from source to source.

    Raises:
        ConfigError: Rows of another form are among them.
    """
    others = [part for part in parts if part.form.kind != "text"]
    if others:
        raise ConfigError(
            f"pack: joined cuts a stream of texts, and '{others[0].name}' holds "
            f"{others[0].form.describe()}. Use pack: documents."
        )
    rows = [text for part in parts for text in part.rows]
    blank = sum(part.blank for part in parts)
    return parts[0]._replace(rows=rows, blank=blank, drawn_from=None)


def _encoded(
    part: _Part, loaded: Loaded, label: str | None, max_length: int, *, pack: bool
) -> Encoding:
    if part.form.kind != "text":
        return encode_chat(part.rows, loaded, part.name, max_length)
    text, columns = part.form.columns[0], {part.form.columns[0]: part.rows}
    if label is not None and part.labels is not None:
        columns[label] = part.labels
    try:
        return encode_texts(
            columns, loaded, text=text, label=label, max_length=max_length, pack=pack
        )
    except MismatchError as error:
        raise MismatchError(f"'{part.name}': {error}") from None


def _notes_on(part: _Part, encoding: Encoding) -> Iterator[str]:
    """What is said of one source."""
    if part.form.is_guessed and part.form.columns != (TEXT,):
        yield f"'{part.name}': {part.form.describe()}"
    if part.drawn_from is not None:
        drawn = f"{len(part.rows):,} rows of {part.drawn_from:,}"
        yield f"'{part.name}': by its weight a pass draws {drawn}"
    if part.form.kind == "messages" and encoding.rows > len(part.rows):
        yield (
            f"'{part.name}': the chat template renders a turn in the history otherwise than at the "
            f"end, so {len(part.rows):,} conversations are {encoding.rows:,} examples, each up to "
            "one of the assistant's turns"
        )


def _notes_on_lengths(encodings: Sequence[Encoding], max_length: int) -> Iterator[str]:
    """What is said of rows that were cut and left out."""
    rows, tokens, cut, lost, unscored = (
        sum(values) for values in zip(*(encoding[1:] for encoding in encodings), strict=True)
    )
    if cut:
        yield (
            f"max_length: {cut:,} of {rows:,} rows are cut at {max_length:,} tokens, which loses "
            f"{lost:,} of {tokens:,} tokens"
        )
    if unscored:
        yield f"{unscored:,} of {rows:,} rows have no token that is scored, and are left out"
