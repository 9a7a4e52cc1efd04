"""Rows of an embedding or a head that were trained (`trainable_token_indices`).

PEFT trains a copy of these rows and stores it as `trainable_tokens_delta`, which replaces rows and
is no difference, whatever its name says.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from mergekit_bayes.checkpoint.specs import MERGEABLE
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora.config import CONFIG, LoraConfig
from mergekit_bayes.posterior import Posterior

_KEY = "trainable_token_indices"


class TrainedRows(NamedTuple):
    """Rows of a table that an adapter holds.

    Attributes:
        disk: Name of the rows on disk, shape (rows, columns of the table).
        indices: The row of the table that each one replaces.
    """

    disk: str
    indices: tuple[int, ...]


def read_rows(
    posterior: Posterior, config: LoraConfig, names: Mapping[str, str]
) -> dict[str, TrainedRows]:
    """Match stored rows with the tokens that the config names.

    Args:
        posterior: The adapter's tensors.
        config: Its config.
        names: By module, the name of its rows on disk.

    Returns:
        The rows by the name of the tensor in the model.

    Raises:
        CheckpointError: The config names tokens and the file holds no rows, or rows of which the
            config names no tokens, or rows that are not numbers.
        ConfigError: A token is negative or named twice.
        MismatchError: There are more or fewer rows than tokens.
    """
    if config.get(_KEY) and not names:
        raise CheckpointError(
            f"{posterior.mean.files[0]}: holds no trained rows, and {CONFIG} names some "
            f"({_KEY}). The two files do not belong together."
        )
    return {f"{m}.weight": _read(posterior, config, m, disk) for m, disk in names.items()}


def _read(posterior: Posterior, config: LoraConfig, module: str, disk: str) -> TrainedRows:
    where, spec = posterior.mean.where(disk), posterior.mean.specs[disk]
    indices = _indices(config, module)
    if indices is None:
        raise CheckpointError(
            f"{where}: '{disk}' holds rows, and {CONFIG} does not say of which tokens ({_KEY}). "
            "The two files do not belong together."
        )
    if len(spec.shape) != 2 or spec.dtype not in MERGEABLE:
        raise CheckpointError(
            f"{where}: '{disk}' is {spec.dtype} of {list(spec.shape)}, where rows are a matrix of "
            f"{', '.join(MERGEABLE)}. Save the adapter again."
        )
    if len(indices) != spec.shape[0]:
        raise MismatchError(
            f"{where}: '{disk}' holds {spec.shape[0]} rows, and {CONFIG} names {len(indices)} "
            f"tokens ({_KEY}). The two files do not belong together."
        )
    wrong = next((i for i, times in Counter(indices).items() if i < 0 or times > 1), None)
    if wrong is not None:
        said = (
            "negative, and PEFT has no row of that number"
            if wrong < 0
            else "named twice, so that it is not known which row counts"
        )
        raise ConfigError(
            f"'{posterior.ref}': the token {wrong} in {_KEY} of '{module}' is {said}. Train it "
            "again with each token named once, from 0 on."
        )
    return TrainedRows(disk, tuple(indices))


def _indices(config: LoraConfig, module: str) -> list[int] | None:
    """The tokens of a module. A mapping names modules by the end of their names, as in PEFT."""
    indices = config.get("trainable_token_indices")
    if not isinstance(indices, dict):
        return indices
    exact = (key for key in indices if f".{module}".endswith(f".{key}"))
    key = next(exact, None) or next((key for key in indices if module.endswith(key)), None)
    return None if key is None else indices[key]
