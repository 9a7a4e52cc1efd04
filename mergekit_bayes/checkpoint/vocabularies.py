"""The tokens of an output that is made of models with different tokenizers.

The tokens of one tokenizer, the donor's, keep their numbers. A union appends the tokens that others
have, model by model and in the order of their numbers there, so that the same models always give
the same list. Two cases differ in what they mean:

- Tokens that were added to a tokenizer are found in a text before it is split. They are added to
  the donor's, which splits all other text as before.
- Tokens that a tokenizer has learned are what its rules split a text into. They are added to the
  donor's model, with the merges or scores that lead to them. If one tokenizer continues the other,
  the result is that one. If not, it splits some texts as neither does, which is said in a note; and
  where the two write down text in different ways, no such tokenizer exists and a union is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.tokenizer_parts import TokenizerParts
from mergekit_bayes.errors import CheckpointError, MismatchError, shown

_MOST = 2_000_000  # rows of an output

# A token that nobody has: found wherever it is written, and not left out of decoded text.
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


class OwnTokens(NamedTuple):
    """The tokenizer of a model.

    Attributes:
        ref: The model, as the user gave it.
        parts: Its tokenizer.
        rows: How many rows its embedding has. A token with a higher number has no weights.
    """

    ref: str
    parts: TokenizerParts
    rows: int


@dataclass
class OutputTokens:
    """The tokens of the output.

    Attributes:
        donor: The tokenizer that is extended; its numbers are kept.
        numbers: The number of each token.
        added: Tokens to be added to the donor's, with their flags.
        learned: Tokens to be added to the donor's model, in the order of their numbers.
        merges: The merges of the output.
        scores: The scores of the output's pieces.
        notes: Remarks for the report.
        multiple: The number of rows is rounded up to a multiple of it.
    """

    donor: TokenizerParts
    numbers: dict[str, int]
    added: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)
    merges: tuple[tuple[str, str], ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    multiple: int = 1

    @property
    def count(self) -> int:
        """One more than the highest number of a token."""
        return max(self.numbers.values(), default=-1) + 1

    @property
    def rows(self) -> int:
        """How many rows the embedding of the output has."""
        return -(-self.count // self.multiple) * self.multiple

    @property
    def is_extended(self) -> bool:
        """Whether the output's tokenizer has tokens that the donor's lacks."""
        return bool(self.added or self.learned)


def output_tokens(
    donor: OwnTokens,
    models: Sequence[OwnTokens],
    *,
    union: bool = False,
    more: Sequence[str] = (),
    multiple: int = 1,
) -> OutputTokens:
    """Choose the tokens of an output and their numbers.

    Args:
        donor: Whose tokens keep their numbers.
        models: All models, in order.
        union: Append the tokens that other models have.
        more: Tokens that the output must have, whoever has them.
        multiple: The number of rows is rounded up to a multiple of it.

    Returns:
        The tokens. Numbers that the donor leaves out stay without a token.

    Raises:
        CheckpointError: There would be more rows than any model has.
        MismatchError: A union of tokenizers that cannot be united, or to which the donor's form
            has no place to add a token.
    """
    parts = donor.parts
    output = OutputTokens(parts, dict(parts.numbers), multiple=multiple)
    output.merges, output.scores = parts.merges, dict(parts.scores)
    for model in models if union else ():
        if model.parts is not parts:
            _append(output, donor, model)
    for token in more:
        if token not in output.numbers:
            output.numbers[token] = output.count
            flags = (m.parts.added[token] for m in models if token in m.parts.added)
            output.added[token] = next(flags, _PLAIN)
    _compare(output, donor, models)
    if output.rows > _MOST:
        raise CheckpointError(
            f"The output would have {output.rows:,} tokens, where at most {_MOST:,} are written. "
            f"Compare the tokenizers ({', '.join(dict.fromkeys(m.ref for m in models))}); or round "
            "up to a smaller multiple."
        )
    return output


def _append(output: OutputTokens, donor: OwnTokens, model: OwnTokens) -> None:
    """Append the tokens of one model that the output lacks."""
    missing = [token for token in model.parts.numbers if token not in output.numbers]
    missing.sort(key=lambda token: model.parts.numbers[token])
    new = [token for token in missing if model.parts.numbers[token] < model.rows]
    if lost := missing[len(new) :]:  # those with the highest numbers
        output.notes.append(
            f"{len(lost):,} token{'s' if len(lost) > 1 else ''} of '{model.ref}' without a row "
            f"there {'are' if len(lost) > 1 else 'is'} left out: {shown(lost[0])}"
        )
    if not new:
        return
    first = output.count
    output.numbers |= {token: first + i for i, token in enumerate(new)}
    output.added |= {t: model.parts.added[t] for t in new if t in model.parts.added}
    learned = [token for token in new if token not in model.parts.added]
    if learned:
        _refuse_other_kind(donor, model, learned)
        output.learned += learned
        _extend(output, donor, model, learned)
    is_one = len(new) == 1
    rows = f"row {first}" if is_one else f"rows {first} to {first + len(new) - 1}"
    output.notes.append(
        f"{len(new):,} {'token' if is_one else 'tokens'} of '{model.ref}' "
        f"{'is' if is_one else 'are'} new: {shown(new[0])}{'' if is_one else ' and others'}, {rows}"
    )


def _refuse_other_kind(donor: OwnTokens, model: OwnTokens, learned: Sequence[str]) -> None:
    own, other = donor.parts, model.parts
    way_out = "Take the tokens of one of them: the base's, or those of a named model."
    what = (
        f"'{model.ref}' has learned tokens that '{donor.ref}' lacks ({len(learned):,}, such as "
        f"{shown(learned[0])})"
    )
    if not own.can_be_extended:
        raise MismatchError(
            f"{what}, and {own.file} has no place for them. Save that tokenizer by transformers "
            f"(AutoTokenizer.from_pretrained(...).save_pretrained(...)), which writes "
            f"tokenizer.json. {way_out}"
        )
    if (own.kind, own.spelling) != (other.kind, other.spelling):
        raise MismatchError(
            f"{what}, and their tokenizers write text down in different ways ({_kind(own)} in "
            f"{own.file}, {_kind(other)} in {other.file}): no tokenizer finds both in a text. "
            f"{way_out}"
        )


def _kind(parts: TokenizerParts) -> str:
    kind = parts.kind or "a kind that is not said"
    return f"{kind} of {shown(parts.spelling)}" if parts.spelling else kind


def _extend(
    output: OutputTokens, donor: OwnTokens, model: OwnTokens, learned: Sequence[str]
) -> None:
    """Extend the rules that lead to the learned tokens."""
    other, kind = model.parts, donor.parts.kind
    continues = kind == "WordLevel"
    if kind == "BPE":
        continues = other.merges[: len(output.merges)] == output.merges
        known = set(output.merges)
        more = [pair for pair in other.merges if pair not in known]
        numbers = output.numbers
        output.merges += tuple(
            (a, b) for a, b in more if a in numbers and b in numbers and a + b in numbers
        )
    elif kind == "Unigram":
        common = output.scores.keys() & other.scores.keys()
        continues = all(output.scores[piece] == other.scores[piece] for piece in common)
        output.scores |= {piece: other.scores.get(piece, 0.0) for piece in learned}
    if not continues:
        output.notes.append(
            f"the tokenizers of '{donor.ref}' and '{model.ref}' were learned apart: the rules of "
            "the second are appended to those of the first, and some texts are split into tokens "
            "as neither of the two models was trained on"
        )


def _compare(output: OutputTokens, donor: OwnTokens, models: Sequence[OwnTokens]) -> None:
    """Say whose texts are split otherwise than in training."""
    others = dict.fromkeys(
        f"'{model.ref}'" for model in models if not _splits_as(output, donor.parts, model.parts)
    )
    if others:
        output.notes.append(
            f"the output's tokenizer splits some texts otherwise than {', '.join(others)} "
            f"{'was' if len(others) == 1 else 'were'} trained on"
        )


def _splits_as(output: OutputTokens, donor: TokenizerParts, parts: TokenizerParts) -> bool:
    """Whether the output splits all texts as a model's tokenizer does, as far as files say it.

    Words of a list are found alike in a longer list.
    """
    if donor.kind is None or parts.kind is None:
        return True
    own = (parts.kind, parts.spelling, parts.merges)
    rules = {parts.rules, donor.rules} - {""}  # older files do not say them
    if own != (donor.kind, donor.spelling, output.merges) or len(rules) > 1:
        return False
    if parts.kind in ("Unigram", "WordPiece"):
        scores = parts.scores
        return (
            parts.numbers.keys() >= set(output.learned)
            and output.numbers.keys() >= parts.numbers.keys() - parts.added.keys()
            and all(output.scores.get(piece, x) == x for piece, x in scores.items())
        )
    return True
