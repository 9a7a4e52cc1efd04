"""On which device a model runs."""

import re
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from mergekit_bayes.errors import ConfigError

if TYPE_CHECKING:
    import torch

Device: TypeAlias = Annotated[
    str | None,
    Field(description="cpu, cuda, cuda:N or mps; by default a GPU where there is one."),
]
SPREAD = "auto"  # in place of a device: all GPUs


def choose_device(name: str | None) -> "torch.device":
    """The device of this name, or without a name the first GPU, else the CPU.

    Raises:
        ConfigError: The name is none of a device, or there is no such device here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"--device: '{name}' is not cpu, cuda, cuda:N or mps.")
    if name.startswith("cuda") and int(match[1] or 0) >= gpus:
        there = f"{gpus} GPU{'s' * (gpus > 1)}, cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU"
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees {there}. Choose another, or cpu."
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device mps: torch {torch.__version__} sees no Metal GPU. Use cpu.")
    return torch.device(name)
