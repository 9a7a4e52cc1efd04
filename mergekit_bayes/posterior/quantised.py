"""Refuse quantised models."""

import json
import re

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.posterior.posterior import Posterior


def refuse_quantised(model: Posterior) -> None:
    """Raise `MismatchError` for weights whose numbers are not the weights themselves."""
    way_out = (
        "Save the model dequantised first (from_pretrained with dtype=torch.bfloat16, "
        "model.dequantize(), then "
        "save_pretrained)."
    )
    for name, spec in model.mean.specs.items():
        scale = (
            next((name + s for s in _SCALES if name + s in model.mean.specs), None)
            if spec.size > 1
            else None
        )
        if scale is not None:
            raise MismatchError(
                f"'{name}' of '{model.ref}' is quantised: its values count times '{scale}'. "
                f"{way_out}"
            )
        if _QUANTISED.search(name):
            raise MismatchError(
                f"'{model.ref}' is quantised: it holds '{name}' ({spec.dtype}). {way_out}"
            )
    try:
        config = json.loads((model.path / "config.json").read_text())
    except (OSError, ValueError):
        return  # a file, or a folder whose config is none of a merge's business
    if isinstance(config, dict) and config.get("quantization_config"):
        raise MismatchError(
            f"'{model.ref}' is quantised: its config.json has a quantization_config. {way_out}"
        )


_SCALES = ("_scale", "_scale_inv", ".weight_scale")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|SCB|absmax|quant_map|nested_absmax)$|\.quant_state\.|_blocks$"
)
