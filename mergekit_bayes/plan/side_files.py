"""Choose whose tokenizer, chat template, generation config and the like the output gets.

The output has the base's names and shapes and thus its `config.json`. With a base and scale 1 it
behaves as the task was trained to, so that the other side files are the task's by default: a chat
model with the base's template and end-of-text token would never stop. Where a task gives the rows
of tokens that the base lacks, the tokenizer must be that task's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.side_files import (
    CHAT,
    CHAT_TEMPLATE,
    GatheredFiles,
    gather_side_files,
    inline_template,
    side_files,
)
from mergekit_bayes.checkpoint.tokenizers import (
    TokenList,
    has_tokens,
    read_tokens,
    special_token_ids,
    tokenizer_identity,
    tokens_apart,
)
from mergekit_bayes.documents import DocumentError, read_bytes, read_object
from mergekit_bayes.errors import ConfigError, MismatchError, shown
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.plan.vocabulary import is_token_matrix, token_folder, tokens_between
from mergekit_bayes.posterior import Posterior

_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")
_ID_KEYS = tuple(f"{name}_token_id" for name in _SPECIAL)
_NOT_COMPARED = ("transformers_version", "_from_model_config", "_name_or_path", "name_or_path")


@dataclass(frozen=True)
class SideFileChoice:
    """Where the side files of an output folder come from.

    Attributes:
        ref: The model whose tokenizer and the like are taken, as given.
        config_folder: The folder whose `config.json` is taken.
        gathered: The files.
        token_ids: Keys of the written `config.json` that follow from the tokenizer.
        generation_ids: The same of a written `generation_config.json` of another folder.
    """

    ref: str
    config_folder: Path
    gathered: GatheredFiles
    token_ids: Mapping[str, object] = field(default_factory=dict)
    generation_ids: Mapping[str, object] = field(default_factory=dict)


def choose_side_files(
    config: MergeConfig,
    inputs: Inputs,
    steps: Sequence[Step],
    target: Path,
    notes: list[str],
    *,
    why: str | None = "as --side-files says",
) -> SideFileChoice | None:
    """Choose the side files of a merge; None for an output without any.

    Args:
        config: The settings.
        inputs: The models.
        steps: The tensors of the output.
        target: The output.
        notes: Remarks for the report are appended here.
        why: Why the named model's are taken; None where nobody asked for it.

    Raises:
        ConfigError: `--side-files` names no model of this merge, or a file.
        MismatchError: The tokenizer of the named model does not fit the written embeddings.
    """
    named = _named_input(config, inputs)
    config_owner = config_input(inputs)
    if target.suffix == ".safetensors" or config_owner is None:
        if named is not None and why is not None:
            notes.append("--side-files has no effect: the output has no side files")
        return None
    if is_united := config.vocab == "union":
        steps = ()  # whose tokenizer is written is decided, and it fits
    owner, reason = _choose_owner(inputs, steps, config_owner, named, why)
    config_folder = config_owner.posterior.path
    folders = dict.fromkeys(_folders(owner.posterior))
    if config_owner.scale >= 0:  # a model that is subtracted gives nothing that the owner lacks
        folders |= dict.fromkeys(_folders(config_owner.posterior))
    gathered = gather_side_files(config_folder, list(folders))
    default = _folders(owner.posterior)[-1]
    token_ids, generation_ids = _special_ids(config_folder, gathered, default)
    chosen = gathered
    if is_united:
        folders_of = {g: f for g, f in gathered.folders.items() if g != "tokenizer"}
        chosen = gathered._replace(folders=folders_of)
    is_told = _note_choice(inputs, owner, reason, chosen, notes)
    own = _own_groups(owner, chosen)
    if borrowed := [group for group in chosen.folders if group not in own]:
        notes.append(
            f"'{owner.ref}' has no {_listed(borrowed)}; those of '{config_owner.ref}' are taken"
        )
    if token_ids and not is_told:
        notes.append(f"{_listed(sorted(token_ids))} of config.json are those of '{owner.ref}'")
    _note_beyond(gathered, steps, notes)
    return SideFileChoice(owner.posterior.ref, config_folder, gathered, token_ids, generation_ids)


def refuse_links(inputs: Inputs) -> None:
    """Refuse models with side files that are links out of their folder, before any is read.

    Raises:
        CheckpointError: A model has one.
    """
    for model in inputs:
        for folder in _folders(model.posterior):
            side_files(folder)


def config_input(inputs: Inputs) -> Input | None:
    """The input whose `config.json` the output gets: the base, else the first one that is a folder.

    A model that is added goes before one that is subtracted or has scale zero.
    """
    folders = [model for model in inputs if model.posterior.path.is_dir()]
    added = (model for model in folders if model is inputs.donor or model.scale > 0)
    return next(added, folders[0] if folders else None)


def _named_input(config: MergeConfig, inputs: Inputs) -> Input | None:
    """The input that `--side-files` names; None without the flag."""
    name = config.side_files
    if name is None:
        return None
    # That of a mixture is of its plain model.
    by_ref = {model.posterior.ref: model for model in reversed(tuple(inputs))}
    if name not in by_ref:
        raise ConfigError(
            f"--side-files {name}: no such model here. Name it as given: "
            f"{', '.join(model.ref for model in inputs)}."
        )
    if not _folders(by_ref[name].posterior):
        raise ConfigError(
            f"--side-files {name}: it is a file, which has no tokenizer beside it. Name a folder."
        )
    return by_ref[name]


def _folders(model: Posterior) -> list[Path]:
    """The folders of a model, of BASE+ADAPTER the adapter's first."""
    paths = [part.path for part in reversed(model.parts)] or [model.path]
    return [path for path in paths if path.is_dir()]


def _choose_owner(
    inputs: Inputs,
    steps: Sequence[Step],
    config_owner: Input,
    named: Input | None,
    why: str | None,
) -> tuple[Input, str]:
    """The input whose side files are taken, and why."""
    if named is not None:
        if misfit := _misfit(named, steps):
            raise MismatchError(f"--side-files {named.ref}: {misfit}. Name another model.")
        return named, why or "the model that gives names and shapes"
    role = "the base" if config_owner is inputs.base else "the first folder"
    giver = next((s.rest.input for s in steps if s.rest and is_token_matrix(s.name, s.spec)), None)
    if giver is not None and token_folder(giver.posterior) in _folders(giver.posterior):
        return giver, "which gives the rows of tokens that the others lack"
    if inputs.base is None:
        return config_owner, role
    task = next((task for task in inputs.tasks if task.scale > 0), None)
    if task is None:
        return config_owner, f"{role}; no task has a positive scale"
    if not _folders(task.posterior):
        return config_owner, f"{role}; '{task.ref}' is a file"
    if misfit := _misfit(task, steps):
        return config_owner, f"{role}; of '{task.ref}', {misfit}"
    return task, "the first task with a positive scale"


def _misfit(owner: Input, steps: Sequence[Step]) -> str | None:
    """Why the tokenizer of a model does not fit the written embeddings; None if it does."""
    folder = token_folder(owner.posterior)
    tokens = read_tokens(folder) if folder is not None else None
    matrices = [step for step in steps if is_token_matrix(step.name, step.spec)]
    if tokens is None or not matrices:
        return None
    smallest = min(matrices, key=lambda step: step.spec.shape[0])
    rows = smallest.spec.shape[0]
    if tokens.count > rows and _own_rows(owner, smallest) != rows:
        return (
            f"its tokenizer ({tokens.file}) has {tokens.count:,} tokens and the written embedding "
            f"{rows:,} rows"
        )
    for step in matrices:
        donor = step.donor.mean
        is_compared = owner in step.contributors  # with the others, when they were matched
        for model in () if is_compared else step.contributors:
            if tokens_between(owner, model, donor.spec.shape[0]):
                return _other_tokens(tokens, model)
        if step.rest is not None and tokens_between(owner, step.rest.input):
            return _other_tokens(tokens, step.rest.input)
        # Tokens that the donor lacks have no trained row where its embedding is copied.
        donors_folder = token_folder(donor.input.posterior)
        donors_tokens = read_tokens(donors_folder) if donors_folder is not None else None
        is_copy = step.copied is not None and owner is not donor.input
        if is_copy and donors_tokens is not None and tokens.count > donors_tokens.count:
            return _other_tokens(tokens, donor.input)
    return None


def _other_tokens(tokens: TokenList, model: Input) -> str:
    return (
        f"its tokenizer ({tokens.file}) has other tokens than '{model.ref}', whose embedding is "
        "written"
    )


def _own_rows(owner: Input, step: Step) -> int | None:
    """Rows of a written tensor in a model; None if it lacks the tensor.

    A tokenizer may have more tokens than its own model has rows, as many have that got a token for
    padding. It fits the output as well as it fitted its model.
    """
    for operand in step.operands:
        if operand.mean.input is owner:
            return operand.mean.spec.shape[0]
    spec = owner.posterior.mean.specs.get(step.name)
    return spec.shape[0] if spec is not None and spec.shape else None


def _special_ids(
    config_folder: Path, gathered: GatheredFiles, default: Path
) -> tuple[dict[str, object], dict[str, object]]:
    """The special tokens' numbers that `config.json` and `generation_config.json` must change.

    They are those of the folder that gives the tokenizer, `default` if there is no tokenizer.
    """
    folder = gathered.folders.get("tokenizer", default)
    if folder == config_folder:
        return {}, {}
    own = read_config(folder)
    ids = {**_ids(own), **_ids(text_config(own))} if own else special_token_ids(folder)
    stored = read_config(config_folder)
    written = {**_ids(stored), **_ids(text_config(stored))}
    changes = {k: v for k, v in ids.items() if not _includes(written.get(k), v)}
    generation_folder = gathered.folders.get("generation config")
    if generation_folder is None or generation_folder == folder:
        return changes, {}
    generation = read_object(generation_folder / "generation_config.json")
    ids = {key: value for key, value in ids.items() if key in generation}
    return changes, {k: v for k, v in ids.items() if not _includes(generation[k], v)}


def _ids(config: Mapping[str, Any]) -> dict[str, object]:
    return {key: config[key] for key in _ID_KEYS if config.get(key) is not None}


def _includes(stored: object, value: object) -> bool:
    """Whether a stored number, or one of several, is this one."""
    return value == stored or (isinstance(stored, list) and value in stored)


def _note_choice(
    inputs: Inputs, owner: Input, reason: str, gathered: GatheredFiles, notes: list[str]
) -> bool:
    """Say whose side files are taken where another model has other ones, and return whether."""
    own = _own_groups(owner, gathered)
    differing = [
        f"'{model.ref}'"
        for model in inputs
        if model is not owner and _has_others(_folders(model.posterior), own)
    ]
    if differing:
        verb = "are" if len(own) > 1 else "is"
        notes.append(
            f"{_listed(list(own))} {verb} taken from '{owner.ref}', {reason}; {_listed(differing)} "
            f"{'have' if len(differing) > 1 else 'has'} other ones (--side-files chooses)"
        )
    without = [
        f"'{model.ref}'"
        for model in inputs
        if CHAT not in gathered.folders
        and model.scale >= 0  # what is subtracted is not meant to stay
        and any(_has(folder, CHAT) for folder in _folders(model.posterior))
    ]
    if without:
        notes.append(
            f"the output has no chat template: '{owner.ref}' has none, and that of "
            f"{_listed(without)} is left out (--side-files chooses)"
        )
    return bool(differing or without)


def _note_beyond(gathered: GatheredFiles, steps: Sequence[Step], notes: list[str]) -> None:
    """Say if the tokenizer that is written gives numbers for which there is no row."""
    folder = gathered.folders.get("tokenizer")
    tokens = read_tokens(folder) if folder is not None else None
    rows = [step.spec.shape[0] for step in steps if is_token_matrix(step.name, step.spec)]
    if tokens is not None and rows and tokens.count > min(rows):
        last = tokens.count - 1
        notes.append(
            f"{tokens.file} gives the token {shown(tokens.tokens[last])} the number {last:,}, and "
            f"the written embedding has {min(rows):,} rows: the output cannot read that token"
        )


def _own_groups(owner: Input, gathered: GatheredFiles) -> dict[str, Path]:
    """The groups of side files that the owner itself gives, and the folder of each."""
    folders = _folders(owner.posterior)
    return {group: folder for group, folder in gathered.folders.items() if folder in folders}


def _has_others(folders: Sequence[Path], taken: Mapping[str, Path]) -> bool:
    """Whether a model's side files say something else than those that are taken, by group."""
    for group, owners in taken.items():
        own = next((f for f in folders if _has(f, group)), None)
        # A tokenizer without a chat template differs from one with it; a model without a tokenizer
        # is only incomplete.
        is_whole = group == CHAT and any(_has(f, "tokenizer") for f in folders)
        if own is None and is_whole:
            return True
        if own is not None and own != owners and not _says_the_same(own, owners, group):
            return True
    return False


def _has(folder: Path, group: str) -> bool:
    if group == "tokenizer":
        return has_tokens(folder) or bool(_special_tokens(folder))
    return bool(_content(folder, group))


def _says_the_same(one: Path, other: Path, group: str) -> bool:
    if group != "tokenizer":
        return _content(one, group) == _content(other, group)
    if _special_tokens(one) != _special_tokens(other):
        return False
    if tokenizer_identity(one) == tokenizer_identity(other) is not None:
        return True
    counts = [tokens.count if (tokens := read_tokens(f)) else 0 for f in (one, other)]
    return counts[0] == counts[1] and not tokens_apart(one, other)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _content(folder: Path, group: str) -> object:
    """What decides the effect of a group of settings; empty if the folder has nothing of it."""
    if group == CHAT:
        try:
            return read_bytes(folder / CHAT_TEMPLATE)
        except (OSError, DocumentError):  # what cannot be read is reported when it is to be copied
            template = inline_template(folder)
            return template.encode() if template is not None else None
    names = {"generation config": "generation_config.json", "processor": "preprocessor_config.json"}
    content = read_object(folder / names.get(group, "modules.json"))
    return {key: value for key, value in content.items() if key not in _NOT_COMPARED}


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that `tokenizer_config.json` names, by their role."""
    config = read_object(folder / "tokenizer_config.json")
    named = {key: value for key, value in config.items() if key.endswith("_token") and value}
    return {
        k: str(v["content"] if isinstance(v, dict) and "content" in v else v)
        for k, v in named.items()
    }
