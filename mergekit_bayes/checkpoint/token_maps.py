"""Which row of which model each token of an output has.

For model m and the output's number t of a token

    row of m at t = own row of the token           if m has it, and no rule forces another one
                    the rule's row                 if a rule names one
                    the base's row                 if the base has the token
                    mean over the models with it   else; one model's row where only one has it
                    zero                           if no model has it

and a padding row is the mean of the rows of m. A merge then sees tensors that agree in their rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ZERO, MEAN, PADDING = -1, -2, -3  # owners that are no model
Numbers = NDArray[np.int64]


class TokenRule(NamedTuple):
    """The row of one token, where a model lacks it.

    Attributes:
        model: The number of the model that gives the row; `ZERO` for zeros.
        row: Its row there.
        is_forced: Whether the models that have the token take this row, too.
    """

    model: int
    row: int = 0
    is_forced: bool = False


class Rows(NamedTuple):
    """Where each row of one model comes from.

    Attributes:
        owner: The number of a model, or `ZERO`, `MEAN` or `PADDING`.
        row: The row there; no meaning without a model.
    """

    owner: Numbers
    row: Numbers


@dataclass(frozen=True)
class TokenMaps:
    """The maps of all models of a merge.

    Attributes:
        own: For each model the own row of each token, -1 where it has none.
        filled: What a model gets that lacks a token.
        forced: Which tokens all models get in this way.
        counted: The models of which a mean is made; a model that is listed twice is there once.
        rows: Rows of the output, at least one a token.
    """

    own: tuple[Numbers, ...]
    filled: Rows
    forced: NDArray[np.bool_]
    counted: tuple[int, ...]
    rows: int

    @property
    def tokens(self) -> int:
        """Rows that stand for numbers of the tokenizer; those behind are padding."""
        return len(self.forced)

    def of(self, model: int) -> Rows:
        """Where each row of a model comes from.

        Args:
            model: Its number.

        Returns:
            Arrays of `rows` entries.
        """
        own = self.own[model]
        is_own = (own >= 0) & ~self.forced
        padding = self.rows - self.tokens
        owner = np.where(is_own, model, self.filled.owner)
        row = np.where(is_own, own, self.filled.row)
        return Rows(
            np.concatenate([owner, np.full(padding, PADDING)]),
            np.concatenate([row, np.zeros(padding, np.int64)]),
        )

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the maps of all models."""
        digest = hashlib.sha256(repr((self.rows, self.counted)).encode())
        for array in (*self.own, *self.filled, self.forced):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def sharing(self, token: int) -> list[tuple[int, int]]:
        """The models that have a token, each with its row."""
        return [(m, int(self.own[m][token])) for m in self.counted if self.own[m][token] >= 0]


def token_maps(
    numbers: Mapping[str, int],
    models: Sequence[Mapping[str, int]],
    rows: Sequence[int],
    *,
    base: int | None = None,
    rules: Mapping[int, TokenRule] | None = None,
    counted: Sequence[int] | None = None,
    total: int = 0,
) -> TokenMaps:
    """Map the rows of all models to the tokens of an output.

    Args:
        numbers: The number of each token in the output.
        models: The number of each token in each model.
        rows: How many rows each model has. Higher numbers are of tokens without weights.
        base: The number of the model whose rows are taken where another one lacks a token.
        rules: Rules of single tokens, by their numbers in the output.
        counted: The models of which a mean is made; by default all.
        total: Rows of the output, if it has more than tokens.

    Returns:
        The maps.
    """
    count = max(numbers.values(), default=-1) + 1
    own = []
    for listed, most in zip(models, rows, strict=True):
        of_model = np.full(count, -1, np.int64)
        for token, number in numbers.items():
            if 0 <= (stored := listed.get(token, -1)) < most:
                of_model[number] = stored
        own.append(of_model)
    counted = tuple(range(len(own)) if counted is None else counted)
    owner, row = np.full(count, ZERO, np.int64), np.zeros(count, np.int64)
    sharing = np.zeros(count, np.int64)
    for model in counted:
        has = own[model] >= 0
        sharing += has
        owner[has], row[has] = model, own[model][has]
    owner[sharing > 1] = MEAN
    if base is not None:
        has = own[base] >= 0
        owner[has], row[has] = base, own[base][has]
    forced = np.zeros(count, np.bool_)
    for number, rule in (rules or {}).items():
        owner[number], row[number], forced[number] = rule.model, rule.row, rule.is_forced
    return TokenMaps(tuple(own), Rows(owner, row), forced, counted, max(total, count))
