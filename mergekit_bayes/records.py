"""Frozen pydantic bases of settings, reports and stored records, and types that rooms share."""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

FloatArray: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[int, int], None]  # (done, of)

FORCE = "Replace an existing output; of a folder, everything in it."
Force: TypeAlias = Annotated[bool, Field(description=FORCE)]
TRUST_REMOTE_CODE = (
    "Run Python code that lies in the folder of a model, of its base or of a scorer and that "
    "transformers needs to load it. Such code can do everything that you can; by default none is "
    "run."
)
TrustRemoteCode: TypeAlias = Annotated[bool, Field(description=TRUST_REMOTE_CODE)]
NUM_PROCESSES = (
    "Number of processes, which share the evaluations, on a GPU each, or on the CPU's cores. Under "
    "a launcher there must be this number."
)
NumProcesses: TypeAlias = Annotated[int | None, Field(ge=1, description=NUM_PROCESSES)]


class Frozen(BaseModel):
    """Base of everything that is read from or written to YAML or JSON: frozen, no unknown keys."""

    # Validators are built on first use, which keeps the start of the command line short.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Record(Frozen):
    """Base of measurements that may be infinite, which is written as the string "Infinity".

    The perplexity of a broken model may be infinite, for which JSON has no number.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")
