"""Where a merge decides which tensors are tied: one tensor of the model under several names.

One checkpoint stores a tied tensor under one name, another one a copy under each, and a third has
untied them in training. What the output ties follows from all models that matter for the tensor:

- Tied in all of them: one tensor is merged. Where the donor stores a copy, the copy is written with
  the same values; it takes no part in what is counted, measured or drawn at random.
- Untied in one of them: each name is a tensor of its own, also where the donor lacks it, and a
  model that ties it contributes its one tensor to both. The written config then says so.
"""

from collections.abc import Callable, Collection, Mapping

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.ties import Tie, find_ties, resolve, ties_embeddings, untying
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.posterior import Posterior

Names = Mapping[Input, Mapping[str, str]]  # for each input, the donor's names to its own


def rename_copies(donor: Posterior, model: Posterior, names: Mapping[str, str]) -> dict[str, str]:
    """Rename copies of tied tensors as what they are copies of is renamed.

    A copy that the donor does not store has no partner there by which it could be found.

    Args:
        donor: The model whose names the output has.
        model: A model.
        names: The donor's names to the model's own; what the donor lacks keeps its name.
    """
    renamed = {own: name for name, own in names.items()}
    for tie in find_ties({name: spec.shape for name, spec in model.mean.specs.items()}):
        source = renamed.get(tie.source)
        if source is None:
            continue
        before, after = _prefixes(tie.source, source)
        for name in (*tie.copies, *(tie.heads if before else ())):
            other = after + name.removeprefix(before)
            is_free = renamed.get(name) == name and name not in donor.mean.specs
            if is_free and name.startswith(before) and other not in names:
                renamed[name] = other
    return {name: own for own, name in renamed.items()}


def _prefixes(own: str, donors: str) -> tuple[str, str]:
    """What two names of one tensor begin with, before the parts that they share."""
    one, other = own.split("."), donors.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    return "".join(f"{part}." for part in one), "".join(f"{part}." for part in other)


class Ties:
    """The tied tensors of a merge.

    Args:
        inputs: The models.
        names: For each input, the donor's names to its own.
        matters: Whether an input has a share in one of some tensors, by the donor's names.

    Attributes:
        copies: The tensors that are written as copies, each with the name of the tensor.
        added: The tensors that are written although the donor does not store them: copies, and
            those that another model has untied.
        untied: The tensors of the output that some model ties and another does not.
        config_changes: What the written config must say, because it ties what the output unties.
    """

    def __init__(
        self, inputs: Inputs, names: Names, matters: Callable[[Input, Collection[str]], bool]
    ) -> None:
        self._names, self._donor = names, inputs.donor
        self._configs = {model: read_config(model.posterior.path) for model in inputs}
        self.copies: dict[str, str] = {}
        self.added: list[str] = []
        self.untied: dict[str, str] = {}
        self._own: dict[Input, dict[str, str | None]] = {model: {} for model in inputs}
        shapes = {
            name: model.posterior.mean.specs[own].shape
            for model in reversed(list(inputs))
            for name, own in names[model].items()
        }
        ties = find_ties(shapes)
        for tie in ties:
            for model in inputs:
                self._own[model] |= self._resolve(tie, model)
        self._tie_of = {name: tie for tie in reversed(ties) for name in tie.names}
        unstored: dict[str, str] = {}
        for tie in ties:
            models = [m for m in inputs if m is inputs.donor or matters(m, tie.names)]
            unstored |= self._decide(tie, models)
        self.config_changes: dict[str, object] = {}
        if self.untied:
            # The first config is the likeliest to be written, so what it needs wins.
            for config in reversed(self._configs.values()):
                self.config_changes |= untying(config) if config else {}
        if self.config_changes:  # a reader of such a config expects every name
            self.copies |= unstored
            self.added += unstored

    def _resolve(self, tie: Tie, model: Input) -> dict[str, str | None]:
        stored = {n: own for n in tie.names if (own := self._names[model].get(n))}
        ties_heads = ties_embeddings(self._configs[model])
        return resolve(tie, model.posterior.mean, stored, ties_heads=ties_heads)

    def _decide(self, tie: Tie, models: Collection[Input]) -> dict[str, str]:
        """Decide which names of a tie are copies in the output.

        Returns:
            The names that are tied in the output and that the donor does not store, each with the
            name of the tensor.
        """
        stored, has = self._names[self._donor], self._own[self._donor]
        kept: list[str] = []
        unstored: dict[str, str] = {}
        # A name of which the donor has no tensor, tied or not, is not written.
        for name in sorted(filter(has.get, tie.names), key=lambda name: name not in stored):
            equal = (other for other in kept if self._is_same(name, other, models))
            source = next(equal, None)
            if source is None:
                kept.append(name)
                if name not in stored:
                    self.added.append(name)
            elif name in stored:
                self.copies[name] = source
            else:
                unstored[name] = source
        first, *others = kept or [""]
        self.untied |= dict.fromkeys(others, first)
        return unstored

    def _is_same(self, one: str, other: str, models: Collection[Input]) -> bool:
        """Whether two names are one tensor in all of these models, or lacking in them."""
        return all(self._own[m].get(one) == self._own[m].get(other) for m in models)

    def stored_name(self, name: str, model: Input) -> tuple[str | None, str | None]:
        """The name under which a model stores a tensor of the output.

        Args:
            name: The donor's name.
            model: The model to look in.

        Returns:
            The model's own name, None if it has no such tensor; and the decision to record, if it
            stores the tensor under another name that is tied to it.
        """
        own = self._names[model].get(name)
        if name not in self._own[model]:
            return own, None
        source = self._own[model][name]
        if own is None and source is not None:
            return source, f"'{model.ref}' ties it to '{source}'"
        return source, None

    def is_written(self, name: str) -> bool:
        """Whether the output has a tensor that the donor may not store."""
        return name in self._names[self._donor] or name in self.added

    def reason_to_leave_out(self, name: str, model: Input) -> str | None:
        """Why a tensor that the output lacks is not needed; None if it is no tied one.

        Args:
            name: The donor's name of it, which a model stores.
            model: The model.
        """
        own, donors = self._own[model].get(name), self._own[self._donor]
        if own is None or donors.get(name, "") is None:
            return None
        if own != self._names[model][name]:
            is_head = name in self._tie_of[name].heads
            what = "the input embedding" if is_head else f"'{own}'"
            return f"tied to {what} in '{model.ref}'"
        return f"only '{model.ref}' has it" if name in donors else None

    def explain_missing(self, name: str, model: Input) -> str | None:
        """Why a model lacks a tensor that its config does not tie; None for other tensors."""
        if self._own[model].get(name, "") is not None:
            return None
        config, own = self._configs[model], self._own[model]
        partner = next(source for n in self._tie_of[name].names if (source := own[n]))
        says = (
            "has tie_word_embeddings false"
            if "tie_word_embeddings" in {**config, **text_config(config)}
            else "does not set tie_word_embeddings, which is false for its architecture"
        )
        return (
            f"The config.json of '{model.ref}' {says}, so '{partner}' is not taken for it. Was it "
            "lost when the model was saved, or has the model no such head?"
        )

    def forget(self, left_out: Collection[str]) -> None:
        """Forget what of the untied tensors is not written after all."""
        self.untied = {n: source for n, source in self.untied.items() if n not in left_out}
        if not self.untied:
            self.config_changes = {}

    def describe_untied(self) -> str:
        """A remark on what the output no longer ties."""
        (name, source), *others = self.untied.items()
        more = f" (and {len(others)} more)" if others else ""
        return (
            f"'{name}' is written apart from '{source}'{more}, because not all models have the "
            "same values in both; config.json says tie_word_embeddings false"
        )

    def drawing_identity(self, model: Input) -> str:
        """Content hash of a model without copies, by which its random numbers are drawn."""
        own = self._names[model]
        copies = {own[n] for n, source in self._own[model].items() if n in own and source != own[n]}
        if not copies:
            return model.posterior.identity
        posterior = model.posterior
        return identity(posterior.stored_mean or posterior.mean, but=copies)


def precision_names(name: str, stored: str, model: Posterior) -> list[str]:
    """The names under which a model's precision of a tensor may be stored, the likeliest first.

    Args:
        name: The donor's name of the tensor.
        stored: The model's own name of it.
        model: The model.
    """
    aliases = model.info.aliases if model.info else {}
    candidates = [stored, name]
    candidates += [aliases[stored]] if stored in aliases else []
    return candidates + [alias for alias, source in aliases.items() if source == stored]
