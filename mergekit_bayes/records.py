"""Frozen pydantic bases of settings and reports, and the small types that rooms share."""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Base of all settings: frozen, and strict about its keys."""

    # Validators are built on first use, which keeps the start of the command line short.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Record(BaseModel):
    """Base of all measurements: frozen, and strict about its keys."""

    # The perplexity of a broken model may be infinite, for which JSON has no number.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


Array: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[int, int], None]  # (done, of)

FORCE = "Replace an existing output; of a folder, everything in it."
Force: TypeAlias = Annotated[bool, Field(description=FORCE)]
