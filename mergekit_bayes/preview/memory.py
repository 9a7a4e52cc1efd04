"""Whether the inputs of a preview, and its model, fit into memory."""

from pathlib import Path

from mergekit_bayes.documents import DocumentError, read_text
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.plan import MergePlan
from mergekit_bayes.preview.held import held_bytes

_FREE = Path("/proc/meminfo")  # of Linux
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def needed_bytes(plan: MergePlan, dtype: str) -> int:
    """Bytes of the inputs, as they are kept, and of the model that is formed.

    Args:
        plan: The merge.
        dtype: That of the model's parameters; `auto` for the dtype as written.
    """
    specs = [step.spec for step in plan.steps if step.tied_to is None]
    model = sum(s.size * _ITEM[dtype] if dtype in _ITEM else s.nbytes for s in specs)
    return held_bytes(plan) + model


def refuse_too_large(plan: MergePlan, dtype: str) -> None:
    """Refuse a merge whose inputs and model do not fit into the memory that is free.

    Where the system does not tell how much is free, nothing is refused.

    Raises:
        ConfigError: They do not.
    """
    needed, free = needed_bytes(plan, dtype), _free_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            f"a preview keeps its inputs and one model in memory, here {needed / 2**30:,.1f} GiB, "
            f"and {free / 2**30:,.1f} GiB are free. Take a machine with more, preview fewer models "
            "of the recipe at a time, or merge at a few scales and evaluate the results."
        )


def _free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = read_text(_FREE).splitlines()
    except (OSError, DocumentError):
        return None
    sizes = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in sizes if len(words) > 1), None)
