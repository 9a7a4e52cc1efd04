"""The second moments in `optimizer.pt`: the state of an optimizer, as `torch.save` writes it."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.libraries import call
from mergekit_bayes.moments.base import (
    FROM_DATA,
    NO_MOMENTS,
    SQUARES,
    Key,
    Moment,
    Moments,
    adds_decay,
    as_beta2,
    as_step,
    refuse_other_layouts,
    refuse_other_numbers,
    refuse_other_states,
)

_FOREIGN = re.compile(r"(?:GLOBAL|global:?|class) (?:GLOBAL )?'?([\w.]+)")
_AGAIN = "Save it with `torch.save(optimizer.state_dict(), ...)`."


def read_state(path: Path) -> Moments:
    """The second moments in the state of an optimizer, by `torch.load` with `weights_only`.

    Raises:
        CheckpointError: The file cannot be read, holds more than tensors and numbers, or is of
            another optimizer than Adam.
    """
    content = call(f"{path}: cannot be read", lambda: _load(path), _AGAIN)
    if isinstance(content, dict) and "state" not in content:
        content = content.get("optimizer", content)  # beside a model and a step
    state = content.get("state") if isinstance(content, dict) else None
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        raise CheckpointError(f"{path}: holds no state and param_groups of an optimizer. {_AGAIN}")
    keys: list[tuple[Key, ...]] = []
    moments: dict[Key, Moment] = {}
    for group in groups:
        numbers, names = parameters_in(path, group)
        keys.append(names)
        for number, name in zip(numbers, names, strict=True):
            slots = state.get(number)
            if slots:
                moments[name] = _moment(path, name, slots, group)
    if not moments:
        raise CheckpointError(f"{path}: {NO_MOMENTS}")
    return Moments(path, moments, tuple(keys), decays=any(map(adds_decay, groups)))


def parameters_in(path: Path, group: object) -> tuple[Sequence[Key], tuple[Key, ...]]:
    """The keys of a group's parameters in the state, and their names where it holds any.

    Raises:
        CheckpointError: It is no group of an optimizer.
    """
    keys = group.get("params") if isinstance(group, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise CheckpointError(
            f"{path}: a group of its optimizer lists no parameters, but {shown(keys)}."
        )
    names = group.get("param_names") if isinstance(group, dict) else None
    if names is None:
        return keys, tuple(keys)
    if (
        not isinstance(names, list)
        or len(names) != len(keys)
        or not all(isinstance(name, str) for name in names)
    ):
        raise CheckpointError(f"{path}: the param_names of a group are not the names of its params")
    return keys, tuple(names)


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = _FOREIGN.search(str(error))
        name = named[1] if named else "something"
        reason = (
            f"keeps its moments in the form of {name}, which is not floating point"
            if "OptimState" in name or "torchao" in name or "bitsandbytes" in name
            else f"holds {name} beside tensors and numbers, which could run code when it is loaded"
        )
        raise CheckpointError(f"{path}: {reason}, so it is refused. {FROM_DATA}") from None


def _moment(path: Path, name: Key, slots: object, group: Mapping[str, object]) -> Moment:
    if not isinstance(slots, dict):
        raise CheckpointError(f"{path}: the state of {shown(name)} is {shown(slots)}. {_AGAIN}")
    refuse_other_states(path, slots)
    squares = refuse_other_layouts(path, name, slots[SQUARES])
    dtype = str(squares.dtype).removeprefix("torch.")
    refuse_other_numbers(path, name, dtype)
    return Moment(
        shape=tuple(squares.shape),
        dtype=dtype,
        step=as_step(path, name, slots.get("step", group.get("step"))),
        beta2=as_beta2(path, group),
        read=lambda: squares,
    )
