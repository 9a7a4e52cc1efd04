"""Keys of the copied `config.json` that would not be true of the output."""

from collections.abc import Sequence

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.side_files import config_input
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior.quantised import stale_claims


def correct_config(inputs: Inputs, steps: Sequence[Step], notes: list[str]) -> dict[str, object]:
    """What the written `config.json` must say otherwise than the copied one.

    A `quantization_config` beside plain numbers is dropped, and `vocab_size` follows the rows that
    are written.

    Args:
        inputs: The models.
        steps: The tensors of the output.
        notes: Remarks for the report are appended here.

    Returns:
        New values by key; None removes a key. Empty where the output has no config.

    Raises:
        MismatchError: Tensors of one vocabulary would be written with different rows.
    """
    owner = config_input(inputs)
    rows = _vocabulary_rows(owner or inputs.donor, steps)
    if owner is None:
        return {}
    config = read_config(owner.posterior.path)
    changes = stale_claims(config)
    if changes:
        notes.append(
            f"the config.json of '{owner.ref}' has a quantization_config, but its tensors are "
            "plain numbers: the block is left over, and the merge does not copy it"
        )
    said = text_config(config).get("vocab_size", config.get("vocab_size"))
    if not isinstance(said, int):
        return changes
    changed = {written for stored, written in rows.items() if stored != written}
    # A model may have several vocabularies, or more rows than its config says.
    written = rows[said] if said in rows else changed.pop() if len(changed) == 1 else said
    return changes if written == said else changes | {"vocab_size": written}


def _vocabulary_rows(owner: Input, steps: Sequence[Step]) -> dict[int, int]:
    """The rows of each written vocabulary by those that it has in the config's owner.

    Raises:
        MismatchError: An embedding and its head, which have as many rows in the owner, would have
            different numbers of them.
    """
    matrices = [s for s in steps if is_vocabulary(s.name) and "per_layer" not in s.name]
    stored = {step: _stored_rows(owner, step) for step in matrices}
    first: dict[int, Step] = {}
    for step in matrices:
        if (rows := stored[step]) is not None:
            _compare_rows(first.setdefault(rows, step), step)
    for step in matrices:  # a head that the owner has under the embedding's name
        if stored[step] is None and len(first) == 1:
            _compare_rows(next(iter(first.values())), step)
    return {rows: step.spec.shape[0] for rows, step in first.items()}


def _compare_rows(one: Step, other: Step) -> None:
    if one.spec.shape[0] != other.spec.shape[0]:
        raise MismatchError(
            f"'{one.name}' would have {one.spec.shape[0]:,} rows and '{other.name}' "
            f"{other.spec.shape[0]:,}, but both have one row for each token: no config fits "
            f"them. {_sources(one)}; {_sources(other)}. --vocab base keeps the rows of "
            f"'{one.donor.input.ref}' in both."
        )


def _stored_rows(owner: Input, step: Step) -> int | None:
    """The rows of a written tensor in the files that the config describes; None if it lacks it."""
    model = owner.posterior
    stored = model.parts[0].mean.specs if model.parts else model.mean.specs
    own = (o.mean.name for o in step.operands if o.mean.input is owner)
    spec = stored.get(next(own, step.name))
    return spec.shape[0] if spec is not None and spec.shape else None


def _sources(step: Step) -> str:
    """How many rows each model has of a written tensor, for messages."""
    means = {operand.mean.input: operand.mean for operand in step.operands}
    rows = ", ".join(f"{mean.spec.shape[0]:,} in '{m.ref}'" for m, mean in means.items())
    return f"'{step.name}' has {rows}"
