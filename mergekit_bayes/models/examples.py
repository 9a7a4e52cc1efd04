"""From rows of text where they lie to the examples of a loaded model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import load_rows


class Encoded(NamedTuple):
    """The examples of some rows.

    Attributes:
        rows: Rows that were read, after `where` and `max_rows`, and without `blank`.
        examples: As `encode_rows` makes them: one a row, or blocks of packed rows.
        blank: Number of rows without a word that were left out.
    """

    rows: int
    examples: list[dict[str, Any]]
    blank: int = 0


def read_examples(
    refs: str | Sequence[str],
    loaded: Loaded,
    *,
    text: str,
    label: str | None = None,
    where: Mapping[str, object] | None = None,
    max_rows: int | None = None,
    max_length: int = 512,
    pack: bool = False,
    skip_blank: bool = False,
) -> Encoded:
    """Read rows and encode them.

    Args:
        refs: As `rows.load_rows` takes them, with `where` and `max_rows`.
        loaded: The model that they are for.
        text: Column of the text.
        label: Column of a classifier's label; None for rows whose labels are not looked at.
        where: Which rows.
        max_rows: How many of them at most.
        max_length: As `encode.encode_rows` takes it, with `pack`.
        pack: Whether rows are joined into blocks.
        skip_blank: Leave out rows without a word. Of one a language model learns that a text may
            end at once; an estimate would count it as a row.

    Raises:
        CheckpointError: They cannot be read.
        MismatchError: Rows without the named columns or with unknown labels, or none with a word.
    """
    rows = load_rows(refs, where=where, max_rows=max_rows, text=text, label=label)
    refuse_blank(refs, text, rows[text])
    found = len(rows)
    if skip_blank:
        worded = [i for i, one in enumerate(rows[text]) if one.strip()]
        rows = rows if len(worded) == found else rows.select(worded)
    examples = encode_rows(
        rows, loaded, text=text, label=label, max_length=max_length, pack=pack, source=refs
    )
    return Encoded(len(rows), examples, found - len(rows))


def refuse_blank(refs: str | Sequence[str], column: str, texts: Sequence[str]) -> None:
    """Refuse rows of which none has a word: a tokenizer that adds EOS makes examples even of them.

    Raises:
        MismatchError: There is nothing to read in them.
    """
    if not any(text.strip() for text in texts):
        names = refs if isinstance(refs, str) else ", ".join(refs)
        raise MismatchError(
            f"no row of {names} has a word in its column '{column}', or a token to read."
        )
