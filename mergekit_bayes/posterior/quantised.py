"""Refuse quantised models, whose stored numbers are not the weights themselves."""

import json
import re

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.posterior.posterior import Posterior

# Suffixes, to a tensor's name, of the scale by which its stored values are multiplied.
_SCALES = ("_scale", "_scale_inv", ".weight_scale")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|SCB|absmax|quant_map|nested_absmax)$"
    r"|\.quant_state\.|_blocks$"
)
_WAY_OUT = (
    "Save the model dequantised first (from_pretrained with dtype=torch.bfloat16, "
    "model.dequantize(), then save_pretrained)."
)


def refuse_quantised(model: Posterior) -> None:
    """Refuse a model whose tensors or config say that it is quantised.

    Raises:
        MismatchError: The model is quantised; the message names the tensor or the config.
    """
    for name, spec in model.mean.specs.items():
        scale = (
            next((name + s for s in _SCALES if name + s in model.mean.specs), None)
            if spec.size > 1
            else None
        )
        if scale is not None:
            raise MismatchError(
                f"'{name}' of '{model.ref}' is quantised: its values count times '{scale}'. "
                f"{_WAY_OUT}"
            )
        if _QUANTISED.search(name):
            raise MismatchError(
                f"'{model.ref}' is quantised: it holds '{name}' ({spec.dtype}). {_WAY_OUT}"
            )
    try:
        config = json.loads((model.path / "config.json").read_text())
    except (OSError, ValueError):
        return  # no readable config.json: nothing to check
    if isinstance(config, dict) and config.get("quantization_config"):
        raise MismatchError(
            f"'{model.ref}' is quantised: its config.json has a quantization_config. {_WAY_OUT}"
        )
