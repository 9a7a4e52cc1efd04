"""Tensors with one row a token: vocabularies that differ between the models of a merge."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.checkpoint.tokenizers import has_tokens, read_tokens, tokens_apart
from mergekit_bayes.errors import MismatchError
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


def find_token_conflict(inputs: Inputs) -> str | None:
    """The message if one token number stands for different tokens in two models; else None.

    Rows of embeddings are merged by number, so that such a merge would mix up tokens.
    """
    donor = inputs.donor
    donors_folder = token_folder(donor.posterior)
    for model in inputs:
        folder = token_folder(model.posterior)
        if folder is None or donors_folder is None or folder == donors_folder:
            continue
        conflicts = tokens_apart(donors_folder, folder)
        if conflicts:
            number, donors_token, other_token = conflicts[0]
            files = dict.fromkeys(
                tokens.file.name
                for tokens in (read_tokens(donors_folder), read_tokens(folder))
                if tokens is not None
            )
            return (
                f"{len(conflicts):,} token numbers stand for other tokens in '{model.ref}' than in "
                f"'{donor.ref}' ({number} is {other_token!r} there, {donors_token!r} here; "
                f"{' and '.join(files)}). Embeddings are merged by number: "
                f"--vocab base keeps those of '{donor.ref}'."
            )
    return None


def common_entries(
    config: MergeConfig,
    name: str,
    spec: TensorSpec,
    means: Sequence[TensorRef],
    donor: str,
    growing: Collection[Input],
) -> CommonEntries:
    """How many entries of a tensor can be merged, and who gives the rows that the donor lacks.

    Rows of tokens that the donor does not have are taken from one model, the first of those with
    the most rows, so that no trained token is lost and none is made of two models' different ones.

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
    givers = [(n, mean) for n, mean in zip(rows, means, strict=True) if mean.input in growing]
    longest = max((n for n, _ in givers), default=0)
    rest = None
    if longest > spec.shape[0]:
        rest = next(mean for n, mean in givers if n == longest)
    if fewest < spec.shape[0]:
        decision = f"{fewest} of {spec.shape[0]} rows are merged, the others are '{donor}''s own"
    else:
        decision = f"the first {fewest} rows of {most} are merged"
    if rest is not None:
        decision += f"; rows {spec.shape[0]} to {longest - 1} are those of '{rest.input.ref}'"
    return CommonEntries(spec.size // spec.shape[0] * fewest, decision=decision, rest=rest)


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
        f"--vocab common merges the tokens that all have, --vocab base keeps those of '{donor}'."
        if is_by_token
        else f"{OTHER_BASE} --only chooses what is merged, for example where heads differ."
    )
    raise MismatchError(
        f"'{name}' is {list(spec.shape)} in '{donor}' but {list(stored.shape)} in "
        f"'{mean.input.ref}' ({mean.where}). {way_out}"
    )
