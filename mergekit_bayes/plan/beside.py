"""What a merge writes beside its tensors: changes of the config, and side files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.stamps import Stamp, stamps_of
from mergekit_bayes.plan.corrections import correct_config
from mergekit_bayes.plan.heads import head_changes
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.model_configs import compare_configs
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.side_files import SideFileChoice, choose_side_files
from mergekit_bayes.plan.steps import Step

if TYPE_CHECKING:
    from mergekit_bayes.plan.unions import TokenPlan


class Beside(NamedTuple):
    """What lies beside the tensors of an output.

    Attributes:
        config_changes: Keys of `config.json` that are set, or removed where they are None.
        side_files: Where the side files come from; None where the output has none.
        made: The text of files that are made, by name; None for one that is not copied.
        copied: The files that are copied, as they are now.
    """

    config_changes: dict[str, object]
    side_files: SideFileChoice | None
    made: dict[str, str | None]
    copied: dict[Path, Stamp]


def plan_beside(
    config: MergeConfig,
    inputs: Inputs,
    steps: Sequence[Step],
    target: Path,
    tokens: "TokenPlan | None",
    notes: list[str],
    *,
    further: Mapping[str, object] | None = None,
    why: str | None = "as --side-files says",
) -> Beside:
    """Decide what is written beside the tensors.

    Args:
        config: The settings of the merge.
        inputs: The models.
        steps: The tensors of the output.
        target: The output.
        tokens: The tokens of the output, where they were chosen.
        notes: Remarks for the report are appended here.
        further: Changes of the config by what is known of the tensors only to the caller.
        why: Why the named model's side files are taken; None where nobody asked for it.

    Raises:
        MismatchError: Configs that give the weights another meaning.
        BmergeError: A config or a side file that cannot be read.
    """
    compare_configs(config, inputs, steps, notes)
    changes = correct_config(inputs, steps, notes) | head_changes(config, inputs, steps, notes)
    changes |= further or {}
    side_files = choose_side_files(config, inputs, steps, target, notes, why=why)
    made: dict[str, str | None] = {}
    if tokens is not None:
        from mergekit_bayes.plan.united import side_files_of

        side_files, made = side_files_of(side_files, tokens, notes)
        changes |= tokens.config_changes
    copied = {} if side_files is None else stamps_of(side_files.gathered.files.values())
    return Beside(changes, side_files, made, copied)
