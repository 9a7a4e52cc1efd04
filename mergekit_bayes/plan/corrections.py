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
    if rows is not None and ("vocab_size" in config or "vocab_size" in text_config(config)):
        changes["vocab_size"] = rows
    return changes


def _vocabulary_rows(owner: Input, steps: Sequence[Step]) -> int | None:
    """The rows of the written vocabulary; None if they are those that the config's owner has.

    Raises:
        MismatchError: An embedding and its head, which have as many rows in the owner, would have
            different numbers of them.
    """
    matrices = [s for s in steps if is_vocabulary(s.name) and "per_layer" not in s.name]
    stored = {step: _stored_rows(owner, step) for step in matrices}
    changed = [s for s in matrices if stored[s] is not None and stored[s] != s.spec.shape[0]]
    if not changed:
        return None
    first = changed[0]
    for step in matrices:
        is_of_it = step in changed or stored[step] in (None, stored[first])
        if is_of_it and step.spec.shape[0] != first.spec.shape[0]:
            raise MismatchError(
                f"'{first.name}' would have {first.spec.shape[0]:,} rows and '{step.name}' "
                f"{step.spec.shape[0]:,}, but both have one row for each token: no config fits "
                f"them. {_sources(first)}; {_sources(step)}. --vocab base keeps the rows of "
                f"'{first.donor.input.ref}' in both."
            )
    return first.spec.shape[0]


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
