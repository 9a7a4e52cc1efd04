"""Tensors with one row a token: vocabularies that differ between the models of a merge."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.checkpoint.tokenizers import has_tokens, read_tokens, tokens_apart
from mergekit_bayes.errors import MismatchError, shown
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.names import OTHER_BASE
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import TensorRef
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import EMPTIED


class CommonEntries(NamedTuple):
    """The entries of a tensor that all models have.

    Attributes:
        merged: How many entries are merged, from the first on.
        copied: The reason if none are merged.
        decision: What `--vocab` decided, to be recorded.
        rest: The tensor that gives the rows beyond the donor's; None if the donor has all.
    """

    merged: int
    copied: str | None = None
    decision: str | None = None
    rest: TensorRef | None = None


def token_folder(model: Posterior) -> Path | None:
    """The folder that lists the tokens of a model; None if there is none.

    An adapter may bring a tokenizer of its own, and a file may lie in its model's folder.
    """
    paths = [part.path for part in reversed(model.parts)] or [model.path]
    folders = (path if path.is_dir() else path.parent for path in paths if _is_models(path))
    return next(filter(has_tokens, folders), None)


def _is_models(path: Path) -> bool:
    """Whether a path is a model's folder, or a file that has its name there."""
    return path.is_dir() or path.stem in ("model", "adapter_model")


def is_token_matrix(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is an embedding or a head with one row for each token of the tokenizer."""
    return len(spec.shape) == 2 and is_vocabulary(name) and "per_layer" not in name


def tokens_between(
    one: Input, other: Input, below: int | None = None
) -> list[tuple[int, str, str]]:
    """The token numbers that stand for other tokens in another model, with both tokens.

    Args:
        one: A model.
        other: Another.
        below: Only numbers below this one; None for all.
    """
    folder, others_folder = token_folder(one.posterior), token_folder(other.posterior)
    if folder is None or others_folder is None or folder == others_folder:
        return []
    apart = tokens_apart(folder, others_folder)
    return apart if below is None else [conflict for conflict in apart if conflict[0] < below]


class TokenConflicts:
    """Finds token numbers that stand for different tokens in two models of a merge.

    Rows of embeddings are merged by number, so that such a merge would mix up tokens. All pairs of
    models are compared: two tasks may have added different tokens where the base has none.

    Args:
        inputs: The models.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._donor = inputs.donor
        self._lists: dict[Input, int | None] = {}
        self._apart: dict[tuple[int, int], list[tuple[int, str, str]]] = {}

    def find(self, rows: Mapping[Input, int], growing: Collection[Input]) -> str | None:
        """The message if a row of one tensor stands for different tokens; None if none does.

        Args:
            rows: The rows of the tensor in each model that is merged, the donor's first.
            growing: The tasks that may give rows to the output.
        """
        donor_rows = next(iter(rows.values()))
        givers = {model for model in growing if rows.get(model, 0) > donor_rows}
        for one, other in combinations(rows, 2):
            # Rows that the donor lacks are given, not merged: only those who may give them count.
            is_whole = one is self._donor or {one, other} <= givers
            conflicts = [c for c in self._between(one, other) if is_whole or c[0] < donor_rows]
            if conflicts:
                return self._describe(one, other, conflicts)
        return None

    def _between(self, one: Input, other: Input) -> list[tuple[int, str, str]]:
        """`tokens_between`, once for all models whose lists are the same."""
        left, right = self._list_of(one), self._list_of(other)
        if left is None or right is None or left == right:
            return []
        if (left, right) not in self._apart:
            self._apart[left, right] = tokens_between(one, other)
        return self._apart[left, right]

    def _list_of(self, model: Input) -> int | None:
        """A hash that says which models have the same list of tokens; None for none."""
        if model not in self._lists:
            folder = token_folder(model.posterior)
            listed = read_tokens(folder) if folder is not None else None
            self._lists[model] = None
            if listed is not None:
                content = (frozenset(listed.tokens.items()), listed.special)
                self._lists[model] = hash((content, listed.is_sentencepiece))
        return self._lists[model]

    def _describe(self, one: Input, other: Input, conflicts: list[tuple[int, str, str]]) -> str:
        number, token, others_token = conflicts[0]
        folders = (token_folder(model.posterior) for model in (one, other))
        lists = (read_tokens(folder) for folder in folders if folder is not None)
        files = dict.fromkeys(tokens.file.name for tokens in lists if tokens is not None)
        if token_folder(self._donor.posterior) is not None:
            way_out = (
                "--vocab union (in mergekit's YAML tokenizer_source: union) finds rows by their "
                f"tokens, --vocab base keeps those of '{self._donor.ref}'."
            )
        else:
            way_out = (
                f"'{self._donor.ref}' lists no tokens that could tell which of them it has: name "
                "it as a folder with its tokenizer."
            )
        is_one = len(conflicts) == 1
        stand = "number stands for another token" if is_one else "numbers stand for other tokens"
        return (
            f"{len(conflicts):,} token {stand} in '{other.ref}' than in "
            f"'{one.ref}' ({number} is {shown(others_token)} there, {shown(token)} here; "
            f"{' and '.join(files)}). Embeddings are merged by number: {way_out}"
        )


def common_entries(
    config: MergeConfig,
    name: str,
    spec: TensorSpec,
    means: Sequence[TensorRef],
    donor: str,
    growing: Collection[Input],
) -> CommonEntries:
    """How many entries of a tensor can be merged, and who gives the rows that the donor lacks.

    Rows of tokens that the donor does not have are taken from one model, the first of those that
    list the most tokens, so that no trained token is lost and none is made of two models' different
    ones (`TokenConflicts` refuses these). Where a model lists no tokens, the most rows decide.

    Args:
        config: The settings.
        name: The donor's name of the tensor.
        spec: The donor's spec of it.
        means: Each model's tensor, the donor's first.
        donor: The donor's path or Hub id, for messages.
        growing: The tasks that may give rows to the output: those with a scale above zero.

    Raises:
        MismatchError: A dtype that is not merged, or shapes that differ otherwise than by the rule
            for vocabularies.
    """
    rows = [_rows(config, name, spec, mean, donor) for mean in means]
    fewest, most = min(rows), max(rows)
    if fewest == most:
        return CommonEntries(spec.size)
    if config.vocab == "base":
        counts = ", ".join(map(str, rows))
        return CommonEntries(0, f"vocabularies differ ({counts} rows); --vocab base")
    givers = [
        mean for mean in means if mean.input in growing and mean.spec.shape[:1] > spec.shape[:1]
    ]
    rest = _longest(givers) if givers else None
    if fewest < spec.shape[0]:
        decision = f"{fewest} of {spec.shape[0]} rows are merged, the others are '{donor}''s own"
    else:
        decision = f"the first {fewest} rows of {most} are merged"
    if rest is not None:
        last = rest.spec.shape[0] - 1
        decision += f"; rows {spec.shape[0]} to {last} are those of '{rest.input.ref}'"
    return CommonEntries(spec.size // spec.shape[0] * fewest, decision=decision, rest=rest)


def _longest(givers: Sequence[TensorRef]) -> TensorRef:
    """The tensor that has all tokens of the others, which have none that are not its own.

    A model may have more rows than tokens. Those without a token are of no use to the output.
    """
    tokens = [
        read_tokens(folder) if (folder := token_folder(mean.input.posterior)) else None
        for mean in givers
    ]
    rows = [mean.spec.shape[0] for mean in givers]
    if None in tokens:
        keys = [(n, n) for n in rows]
    else:
        counts = [listed.count for listed in tokens if listed is not None]
        keys = [(min(count, n), n) for count, n in zip(counts, rows, strict=True)]
    return givers[keys.index(max(keys))]


def _rows(config: MergeConfig, name: str, spec: TensorSpec, mean: TensorRef, donor: str) -> int:
    stored = mean.spec
    if stored.dtype not in MERGEABLE:
        raise MismatchError(
            f"'{name}' is {stored.dtype} in '{mean.input.ref}' ({mean.where}); means are merged "
            f"from {', '.join(MERGEABLE)}. Cast that model to BF16 first."
        )
    if stored.shape == spec.shape:
        return spec.shape[0] if spec.shape else 1
    is_by_token = (
        bool(spec.shape and stored.shape)
        and stored.shape[1:] == spec.shape[1:]
        and is_vocabulary(name)
    )
    if is_by_token and 0 in (spec.shape[0], stored.shape[0]):
        empty = donor if spec.shape[0] == 0 else mean.input.ref
        raise MismatchError(
            f"'{name}' has no rows in '{empty}' ({list(spec.shape)} in '{donor}', "
            f"{list(stored.shape)} in '{mean.input.ref}'): its file is incomplete. Save that model "
            "again; under DeepSpeed ZeRO-3 its tensors must be gathered first."
        )
    if is_by_token and config.vocab != "error":
        return stored.shape[0]
    if stored.shape == (0,):
        raise MismatchError(
            f"'{name}' is {list(spec.shape)} in '{donor}' but [0] in '{mean.input.ref}' "
            f"({mean.where}). {EMPTIED}"
        )
    way_out = (
        "--vocab union (in mergekit's YAML tokenizer_source: union) writes the tokens of all, "
        f"--vocab common merges the rows that all have, --vocab base keeps those of '{donor}'."
        if is_by_token
        else f"{OTHER_BASE} --only chooses what is merged, for example where heads differ."
    )
    raise MismatchError(
        f"'{name}' is {list(spec.shape)} in '{donor}' but {list(stored.shape)} in "
        f"'{mean.input.ref}' ({mean.where}). {way_out}"
    )
