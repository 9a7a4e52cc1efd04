"""Which model decides the labels and the architecture that the written config names.

The config is that of the donor, and the head of a classifier may be another model's: of an adapter
that trained one on a base without, or of tasks whose base does not name its labels.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.model_config import (
    architecture_for,
    are_generic,
    label_keys,
    labels,
    read_config,
    read_model_config,
)
from mergekit_bayes.checkpoint.names import is_label_head
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora import adapted_mean
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.side_files import config_input
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior import Posterior

if TYPE_CHECKING:
    from mergekit_bayes.lora import Adapter

_ANSWER_HEAD = re.compile(r"(^|\.)qa_outputs\.weight$")
_TASKS = {  # of PEFT, and what transformers appends to the name of an architecture
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def head_changes(
    config: MergeConfig, inputs: Inputs, steps: Sequence[Step], notes: list[str]
) -> dict[str, object]:
    """The keys of the written config that follow from the head: labels, architecture, kind of task.

    Args:
        config: The settings.
        inputs: The models.
        steps: The tensors of the output.
        notes: Remarks for the report are appended here.

    Raises:
        MismatchError: Heads whose rows stand for other labels are merged.
    """
    owner = config_input(inputs)
    stored = read_config(owner.posterior.path) if owner is not None else {}
    changes: dict[str, object] = {}
    for step in steps:
        if is_label_head(step.name) and len(step.spec.shape) == 2:
            head_owner, names = _labels_of(config, step, notes)
            changes |= _label_changes(stored, step, head_owner, names, notes)
        if is_label_head(step.name) or _ANSWER_HEAD.search(step.name):
            changes |= _architecture_changes(stored, step, notes)
    return changes if stored else {}


def _labels_of(
    config: MergeConfig, step: Step, notes: list[str]
) -> tuple[Input, tuple[str, ...] | None]:
    """The model that decides the labels of a head, and its labels, None if unknown."""
    rows = step.spec.shape[0]
    models = step.contributors
    named: dict[Input, tuple[str, ...]] = {}
    for model in models:
        names = labels(_config_of_head(model, step.name))
        if names is not None and len(names) == rows:
            named[model] = names
    chosen = {model: names for model, names in named.items() if not are_generic(names)}
    if chosen:
        _compare_labels(config, step.name, chosen, notes)
    if chosen and config.on_config == "base":
        return next(iter(chosen.items()))  # the base's, or else the first model's
    for candidates in (chosen, named):
        # A head that a task trained is described by that task, not by what it started from.
        trained = [m for m in candidates if m.scale > 0] or list(candidates)
        if trained:
            return trained[0], candidates[trained[0]]
    return models[-1], None


def _compare_labels(
    config: MergeConfig, name: str, chosen: dict[Input, tuple[str, ...]], notes: list[str]
) -> None:
    (first, names), *others = chosen.items()
    for model, other_names in others:
        left, right = _spelled_alike(names, other_names)
        if left == right:
            continue
        where = (
            f"config.json numbers the labels {list(other_names)} in '{model.ref}' and "
            f"{list(names)} in '{first.ref}'"
        )
        if sorted(left) == sorted(right):
            raise MismatchError(
                f"{where}, so that one row of '{name}' stands for two classes. Number the labels "
                "of one model as the other does (config.json and the rows of its head), or merge "
                "all but the head with --only."
            )
        if config.on_config == "error":
            raise MismatchError(
                f"{where}: the rows of '{name}' stand for other labels. Merge all but the head "
                "with --only; or, if both mean the same classes in the same order, pass "
                "--on-config base."
            )
        notes.append(f"{where}; by --on-config base they are taken to be the same")


def _spelled_alike(one: Sequence[str], other: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels without case and punctuation, unless two of one model would then be the same."""
    folded = [[re.sub(r"[\W_]+", "", name).casefold() for name in names] for names in (one, other)]
    if any(len(set(names)) < len(names) or "" in names for names in folded):
        return list(one), list(other)
    return folded[0], folded[1]


def _config_of_head(model: Input, name: str) -> dict[str, object]:
    """The config that describes a model's head: the adapter's own, if it trained the head."""
    adapter = _adapter_of(model.posterior, name)
    if adapter is not None and (own := read_config(adapter.posterior.path)):
        return own
    return read_model_config(model.posterior.path)


def _label_changes(
    stored: dict[str, object],
    step: Step,
    owner: Input,
    names: tuple[str, ...] | None,
    notes: list[str],
) -> dict[str, object]:
    """What the written config must say of the labels, where it says something else."""
    rows, written = step.spec.shape[0], labels(stored)
    kind = _config_of_head(owner, step.name).get("problem_type")
    # Without it, how labels of the same names are read would be guessed from the names.
    unsaid: dict[str, object] = (
        {"problem_type": kind} if kind and not stored.get("problem_type") else {}
    )
    if names is None:
        is_told = written is not None and len(written) == rows
        if is_told or _adapter_of(owner.posterior, step.name) is None:
            return unsaid
        names = tuple(f"LABEL_{number}" for number in range(rows))
        notes.append(
            f"the adapter of '{owner.ref}' does not record the names of its {rows} labels; "
            "config.json numbers them"
        )
    elif written != names and not are_generic(names):
        notes.append(f"config.json names the labels of '{owner.ref}', whose head is written")
    if written == names or (written is None and are_generic(names) and rows == 2):
        return unsaid  # two numbered labels are the default
    changes = label_keys(names)
    if "num_labels" in stored:
        changes["num_labels"] = rows
    if kind:
        changes["problem_type"] = kind
    return changes


def _architecture_changes(
    stored: dict[str, object], step: Step, notes: list[str]
) -> dict[str, object]:
    """The class that loads a head which an adapter trained on a model without one."""
    adapter = _adapter_of(step.donor.input.posterior, step.name)
    if adapter is None:
        return {}
    task = str(adapter.config.get("task_type"))
    ending = _TASKS.get(task)
    if ending is None:
        return {}
    architecture = architecture_for(stored, ending)
    if architecture is None:
        notes.append(
            f"'{adapter.ref}' trained '{step.name}' ({task}), and the "
            "architecture in config.json has no known class for that; load the output with the "
            f"class that ends in {ending}"
        )
        return {}
    return (
        {} if stored.get("architectures") == [architecture] else {"architectures": [architecture]}
    )


def _adapter_of(model: Posterior, name: str) -> "Adapter | None":
    """The adapter that trained a tensor of BASE+ADAPTER as a whole; None for other tensors."""
    mean = adapted_mean(model)
    return mean.adapter if mean is not None and name in mean.replaced else None
