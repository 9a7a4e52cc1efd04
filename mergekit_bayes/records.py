"""Frozen pydantic bases of configs and reports, and the small types that rooms share."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configs: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Array = NDArray[np.float64]
Progress = Callable[[int, int], None]  # (done, of)


class Record(BaseModel):
    """Base of all reports: frozen, and strict about its keys."""

    # A ruined model's perplexity may be infinite, for which JSON has no number.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
