"""What a pass of gradients cannot do, as one message each that says what would help."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.libraries import reason


def refuse_offloaded(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that lie on no device while the model does not use them.

    Raises:
        ConfigError: There is one; its gradient would be thrown away with its values.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ConfigError(
                f"'{name}' is offloaded: the devices had no room for it, and gradients of what is "
                "offloaded are not kept. Take more or larger devices, a smaller --dtype "
                "(bfloat16), or --device cpu."
            )


@contextmanager
def explained() -> Iterator[None]:
    """Say what would help where a device has too little memory, or gradients come in parts.

    Raises:
        ConfigError: The memory does not suffice, or the model recomputes its activations by
            reentrant checkpointing, under which a tied parameter has more than one gradient.
    """
    try:
        yield
    except (RuntimeError, CheckpointError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, torch.OutOfMemoryError) or "can't allocate memory" in str(cause):
            raise ConfigError(
                f"the device has too little memory ({reason(cause)}). Smaller batches and shorter "
                "rows take less (--batch-size, --max-length), and so do fewer sums (--pool row; "
                "--blocks N of matrices), sums elsewhere (--sums cpu), and narrower parameters "
                "(--dtype bfloat16)."
            ) from None
        if "use_reentrant" in str(cause):
            raise ConfigError(
                "the model recomputes its activations by reentrant checkpointing, under which "
                "gradients come in parts. Switch it off, or give it use_reentrant=False "
                "(gradient_checkpointing_kwargs)."
            ) from None
        raise
