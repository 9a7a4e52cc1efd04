"""Explains why a model has some of the layers or experts of another one, and not all.

It has lost them, or it never had them: a shard that was not fetched, a model of another depth, or
layers for the prediction of further tokens, which many training tools do not save. Only the last
is a reason to merge without them.
"""

import re
from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.model_config import (
    DEPTH_KEYS,
    first_count,
    read_model_config,
    text_config,
)
from mergekit_bayes.posterior import Posterior

_List = tuple[str, ...]  # the words before a number

# Keys of a config that count layers of one stack, and experts.
_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")
_ENCODER_DEPTHS = ("encoder_layers",)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Layers behind the last one that predict further tokens.
_FURTHER_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers")
# Words of the towers of multimodal models, and where a config describes them.
_TOWERS = (("vision_config", re.compile("vis|image")), ("audio_config", re.compile("audio|speech")))
_FETCH = "Fetch or save it again with all of its shards"


class MissingLayers(NamedTuple):
    """Why a model lacks tensors of numbered layers or experts.

    Attributes:
        cause: One or more sentences.
        may_be_absent: Whether the model is complete without them, so that `--on-missing` is right.
    """

    cause: str
    may_be_absent: bool = False


def explain_missing_layers(
    missing: Collection[str], model: Posterior, names: Collection[str], other: Posterior
) -> MissingLayers | None:
    """The cause, if a model lacks tensors of which it has others of the same kind.

    All missing tensors are judged together, since one alone may look like another case: layers
    that are all behind the last one may be another model's, and a hole among them is a loss. What
    a model should have is what its own config counts.

    Args:
        missing: The tensors that the model lacks.
        model: The model.
        names: The tensors that it has, as the model that has all calls them.
        other: The model that has all.

    Returns:
        The cause; None if numbers do not explain it.
    """
    lists, kinds = _numbers_by_list(names), {_kind(name) for name in names}
    absent: dict[_List, set[int]] = {}
    alike: set[_List] = set()  # the lists of which the model has tensors of the same kind
    are_all_numbered = True
    for name in missing:
        place = _first_absent(name, lists)
        if place is not None:
            absent.setdefault(place[0], set()).add(place[1])
            if _kind(name) in kinds:
                alike.add(place[0])
        elif _kind(name) in kinds:
            cause = f"'{model.ref}' has '{_kind(name)}' of other layers, so that its files are"
            return MissingLayers(f"{cause} incomplete. {_FETCH}.")
        else:
            are_all_numbered = False
    are_all_numbered &= absent.keys() == alike
    verdicts = [_judge(path, lists[path], absent[path], model, other) for path in sorted(alike)]
    if not verdicts:
        return None
    # What is lost is told first, and what may be absent only if it is all that is missing.
    verdict, text = min(verdicts)
    if verdict is not _Verdict.NOT_NEEDED:
        return MissingLayers(text)
    return MissingLayers(text, may_be_absent=True) if are_all_numbered else None


class _Verdict(IntEnum):
    """Why numbers of a list are missing, in the order in which one is told rather than another."""

    LOST = 0
    OTHER_SIZE = 1
    UNKNOWN = 2
    NOT_NEEDED = 3


def _judge(
    path: _List, numbers: set[int], absent: set[int], model: Posterior, other: Posterior
) -> tuple[_Verdict, str]:
    """Why a model has some numbers of a list only, and the sentence that says so.

    Args:
        path: The list.
        numbers: The numbers that the model has.
        absent: The numbers that only the other model has.
        model: The model.
        other: The other model.
    """
    config, other_config = _read_config(model), _read_config(other)
    stored, total, name = max(numbers) + 1, max(absent) + 1, ".".join(path)
    expected, others_expected = (_expected_count(c, path) for c in (config, other_config))
    # The upper ones may be another model's; a hole between those that are there is a loss.
    if min(absent) < stored or (expected is not None and expected > stored):
        counted = f", and its config.json counts {expected}" if expected else ""
        return _Verdict.LOST, (
            f"'{model.ref}' has {len(numbers)} of the {max(stored, total)} '{name}.*'{counted}, so "
            f"that its files are incomplete. {_FETCH}."
        )
    counts = f"There are {stored} '{name}.*' in '{model.ref}' and {total} in '{other.ref}'"
    if expected is None:
        return _Verdict.UNKNOWN, (
            f"{counts}. Either '{model.ref}' has lost the others and its files are incomplete "
            f"({_FETCH[0].lower()}{_FETCH[1:]}), or these are models of different "
            "size, which cannot be merged. No config.json says how many it should have."
        )
    further = max(first_count(text_config(c), _FURTHER_TOKENS) or 0 for c in (config, other_config))
    has_others_depth = others_expected is None or others_expected == stored
    if has_others_depth and not _is_inner(path) and total - stored <= further:
        return _Verdict.NOT_NEEDED, (
            f"'{model.ref}' has all {stored} '{name}.*' that its config.json counts; those "
            "behind them predict further tokens, and many fine-tunes are saved without."
        )
    return _Verdict.OTHER_SIZE, f"{counts}: models of different size cannot be merged."


def _kind(name: str) -> str:
    """A name without its numbers; layers differ in these only."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _numbers_by_list(names: Collection[str]) -> dict[_List, set[int]]:
    """The numbers that stand behind the same words and numbers."""
    lists: dict[_List, set[int]] = {}
    for name in names:
        parts = tuple(name.split("."))
        for i, part in enumerate(parts):
            if part.isdecimal():
                lists.setdefault(parts[:i], set()).add(int(part))
    return lists


def _first_absent(name: str, lists: Mapping[_List, set[int]]) -> tuple[_List, int] | None:
    """The list of which a tensor's number is missing, and the number; None if there is none."""
    parts = tuple(name.split("."))
    for i, part in enumerate(parts):
        if part.isdecimal():
            numbers = lists.get(parts[:i])
            if numbers is None:
                return None
            if int(part) not in numbers:
                return parts[:i], int(part)
    return None


def _is_inner(path: _List) -> bool:
    """Whether a list is in a numbered layer."""
    return any(part.isdecimal() for part in path)


def _read_config(model: Posterior) -> dict[str, Any]:
    """The config of a model, of BASE+ADAPTER that of the base."""
    return read_model_config(model.parts[0].path if model.parts else model.path)


def _expected_count(config: Mapping[str, Any], path: _List) -> int | None:
    """How many layers or experts a config counts in a list; None if it does not say."""
    words = ".".join(path)
    section: object = text_config(config)
    for key, pattern in _TOWERS:
        if pattern.search(words):
            section = config.get(key, config)
    if not isinstance(section, Mapping):
        return None
    if path and "expert" in path[-1]:
        return first_count(section, _EXPERTS)
    if _is_inner(path):
        return None
    decoder = _DECODER_DEPTHS if "decoder" in words else ()
    encoder = _ENCODER_DEPTHS if "encoder" in words else ()
    return first_count(section, (*decoder, *encoder, *DEPTH_KEYS))
