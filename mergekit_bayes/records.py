"""Frozen pydantic bases of settings, reports and stored records, and types that rooms share."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]  # (done, of)


class Frozen(BaseModel):
    """Base of everything that is read from or written to YAML or JSON: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Config = Frozen  # the name under which the settings of a verb use it


class Record(Frozen):
    """Base of measurements that may be infinite, which is written as the string "Infinity".

    The perplexity of a ruined model may be infinite, and JSON has no such number.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")
