"""Which tensors of a tuned model and of its base are one, and the refusal of another base."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from mergekit_bayes.checkpoint.model_config import read_model_config
from mergekit_bayes.checkpoint.names import (
    USUAL_HEAD,
    is_buffer,
    is_token_embedding,
    is_vocabulary,
    may_be_tied_head,
)
from mergekit_bayes.checkpoint.renaming import find_renaming, renamed_note
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.checkpoint.ties import find_ties, stored_copies, ties_embeddings
from mergekit_bayes.errors import ConfigError, MismatchError, shown
from mergekit_bayes.lora import is_adapter, open_model, refuse_other_base
from mergekit_bayes.plan.model_configs import find_differences
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import refuse_emptied, refuse_quantised

_MADE_OF = "Name the model that it was made of as --base."


class Pairing(NamedTuple):
    """The tensors that both models hold.

    Attributes:
        tuned: The tuned model's name of each tensor, by the base's.
        tied: By the base's name of an embedding, the names of the heads that are the same tensor.
        notes: Remarks for the report.
    """

    tuned: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def with_usual_head(self, specs: Mapping[str, TensorSpec]) -> "Pairing":
        """The same, with the head of a causal model that is not stored beside its embedding.

        Args:
            specs: The base's tensors.
        """
        embeddings = [name for name in self.tuned if is_token_embedding(name)]
        is_stored = any(may_be_tied_head(name) for name in specs) or self.tied
        if is_stored or len(embeddings) != 1:
            return self
        return self._replace(tied={embeddings[0]: (USUAL_HEAD,)})


def open_whole(
    ref: str, *, precision: str | None = None, with_precision: bool = False
) -> Posterior:
    """Open a whole model, or BASE+ADAPTER as one.

    Raises:
        CheckpointError: There is no such model, or a file cannot be read.
        ConfigError: It is an adapter alone.
        MismatchError: It is quantised, or its weights are empty, or an adapter is on another base
            than it records.
    """
    with ExitStack() as stack:
        model = stack.enter_context(
            open_model(ref, precision=precision, with_precision=with_precision)
        )
        if not model.parts and is_adapter(model.path):
            raise ConfigError(f"'{ref}' is an adapter without its base. Name both: BASE+{ref}.")
        if not model.parts:
            refuse_emptied(model)
            refuse_quantised(model)
        refuse_other_base(model)
        stack.pop_all()  # the caller closes it
    return model


def pair(tuned: Posterior, base: Posterior) -> Pairing:
    """Match the tensors of a tuned model with those of its base.

    Raises:
        MismatchError: A tensor that only one of them has, or that has other shapes.
    """
    ours, theirs = _parameters(base), _parameters(tuned)
    renaming = find_renaming(ours, theirs)
    names = {renaming(name): name for name in theirs}
    notes = [renamed_note(tuned.ref, renaming)] if renaming.names else []
    copies = stored_copies(base.mean)
    tuned_copies = {
        renaming(name): renaming(other) for name, other in stored_copies(tuned.mean).items()
    }
    pairs = {name: names[name] for name in ours if name in names}
    _check_shapes(ours, theirs, pairs, base, tuned)
    only_base = [name for name in ours if name not in names and name not in copies]
    only_tuned = [name for name in names if name not in ours and name not in tuned_copies]
    if only_base or only_tuned:
        raise _not_of_both(only_base, only_tuned, base, tuned)
    is_untied = ties_embeddings(read_model_config(base.path)) is False
    for name in copies:
        if name in pairs and not is_untied:
            if name not in tuned_copies and tuned_copies.get(copies[name]) != name:
                raise _untied(name, copies[name], tuned)
            del pairs[name]
    if not pairs:
        raise MismatchError(
            f"'{tuned.ref}' and '{base.ref}' have no weights of one name. {_MADE_OF}"
        )
    notes += _config_notes(tuned, base)
    return Pairing(pairs, {} if is_untied else _tied(base, ours, pairs), tuple(notes))


def _parameters(model: Posterior) -> dict[str, TensorSpec]:
    return {
        name: spec
        for name, spec in model.mean.specs.items()
        if not is_buffer(name) and spec.dtype in MERGEABLE
    }


def _check_shapes(
    ours: Mapping[str, TensorSpec],
    theirs: Mapping[str, TensorSpec],
    pairs: Mapping[str, str],
    base: Posterior,
    tuned: Posterior,
) -> None:
    for name, other in pairs.items():
        here, there = ours[name].shape, theirs[other].shape
        if here == there:
            continue
        found = (
            f"'{name}' is {list(here)} in {base.mean.where(name)} and {list(there)} in "
            f"{tuned.mean.where(other)}"
        )
        if is_vocabulary(name) and here[1:] == there[1:]:
            raise MismatchError(
                f"{found}: the vocabulary was resized, and no low-rank change adds rows. Resize "
                "the base's alike and save it, then name that as --base."
            )
        raise MismatchError(f"{found}. {_MADE_OF}")


def _not_of_both(
    only_base: list[str], only_tuned: list[str], base: Posterior, tuned: Posterior
) -> MismatchError:
    """The message for tensors that one of the models lacks."""
    lacks, holds, names = (tuned, base, only_base) if only_base else (base, tuned, only_tuned)
    if any(is_vocabulary(name) for name in names) and len(names) == 1 and holds is tuned:
        return _untied(names[0], "the embedding", tuned)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return MismatchError(
        f"'{holds.ref}' has {shown(names[0])}{more}, which '{lacks.ref}' lacks: they are not of "
        f"one architecture. {_MADE_OF}"
    )


def _untied(head: str, embedding: str, tuned: Posterior) -> MismatchError:
    return MismatchError(
        f"'{tuned.ref}' has a head {shown(head)} of its own, which the base ties to its embedding "
        f"({embedding}): an adapter cannot untie them. Save the base with a head of its own "
        "(tie_word_embeddings: false), and name that as --base."
    )


def _tied(
    base: Posterior, ours: Mapping[str, TensorSpec], pairs: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """The names that are tied to each embedding of the base."""
    ties = find_ties({name: spec.shape for name, spec in ours.items()})
    kept = set(pairs)
    return {
        tie.source: others
        for tie in ties
        if tie.source in kept
        and (others := tuple(n for n in tie.names if n != tie.source and n not in kept))
    }


def _config_notes(tuned: Posterior, base: Posterior) -> list[str]:
    configs = [read_model_config(model.path) for model in (base, tuned)]
    if not all(configs):
        return []
    return [
        f"config.json has {shown(key)} {shown(one)} in '{base.ref}' and {shown(other)} in "
        f"'{tuned.ref}', which no adapter holds: PEFT loads it on the base's"
        for key, one, other, *_ in find_differences(*configs)
    ]
