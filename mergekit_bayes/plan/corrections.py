"""Keys of the copied `config.json` that would not be true of the output."""

from collections.abc import Mapping, Sequence

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.plan.inputs import Inputs
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
        New values by key; None removes a key.
    """
    changes: dict[str, object] = {}
    for model in inputs:
        stale = stale_claims(read_config(model.posterior.path))
        if stale:
            notes.append(
                f"the config.json of '{model.ref}' has a quantization_config, but its tensors are "
                "plain numbers: the block is left over, and the merge does not copy it"
            )
        changes |= {key: value for key, value in stale.items() if key not in changes}
    return changes | _vocabulary_size(inputs, steps, changes)


def _vocabulary_size(
    inputs: Inputs, steps: Sequence[Step], changes: Mapping[str, object]
) -> dict[str, object]:
    """`vocab_size`, where the output has other rows than the donor's files."""
    donor = inputs.donor.posterior
    stored = donor.parts[0].mean.specs if donor.parts else donor.mean.specs
    rows = {
        step.spec.shape[0]
        for step in steps
        if is_vocabulary(step.name)
        and step.name in stored
        and step.spec.shape[:1] != stored[step.name].shape[:1]
    }
    if len(rows) != 1:
        return {}
    config = {**read_config(donor.path), **changes}
    said = "vocab_size" in config or "vocab_size" in text_config(config)
    return {"vocab_size": rows.pop()} if said else {}
