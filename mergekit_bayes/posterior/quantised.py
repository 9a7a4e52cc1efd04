"""Refuse models whose stored numbers are not the weights: quantised ones, and emptied ones.

The tensors decide. A `quantization_config` beside plain numbers is left over from the model from
which they were made, and a merge drops it.
"""

import re
from collections.abc import Mapping

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.names import is_buffer, is_vocabulary
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.posterior.posterior import Posterior

_KEY = "quantization_config"
# Suffixes, to a tensor's name, of the scale by which its stored values are multiplied.
_SCALES = ("_scale", "_scale_inv", ".weight_scale")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|SCB|absmax|quant_map|nested_absmax"
    r"|W_q|Qidxs|codebooks|trellis|q_weight|weight\._data|_weight_qdata)$"
    r"|\.quant_state\.|_blocks$"
)
_PLAIN = ("F64", "F32", "F16", "BF16")
_CODES = ("I8", "I16", "I32", "U8", "U16", "U32")  # dtypes of packed weights

_ORIGINAL = "Merge the unquantised model that it was made from."
_BY_CONFIG = (
    "Save the model dequantised first: from_pretrained with dtype=torch.bfloat16 and "
    "quantization_config={}(dequantize=True), then save_pretrained."
)
# What to do, by the `quant_method` of the config.
_WAYS_OUT = {
    "bitsandbytes": "Save the model dequantised first (from_pretrained with dtype=torch.bfloat16, "
    "model.dequantize(), then save_pretrained).",
    "mxfp4": _BY_CONFIG.format("Mxfp4Config"),
    "fp8": _BY_CONFIG.format("FineGrainedFP8Config"),
    "compressed-tensors": _BY_CONFIG.format("CompressedTensorsConfig"),
}
# Tensors that only one of these methods writes, for files without a config.
_WRITERS = (
    (re.compile(r"\.(SCB|absmax|quant_map|nested_absmax)$|\.quant_state\."), "bitsandbytes"),
    (re.compile(r"_blocks$"), "mxfp4"),
    (re.compile(r"weight_scale_inv$"), "fp8"),
    (re.compile(r"weight_packed$"), "compressed-tensors"),
)

EMPTIED = (
    "The tensors are empty because DeepSpeed ZeRO-3 kept the weights in shards and they were not "
    "gathered for the saving. Save again with stage3_gather_16bit_weights_on_model_save: true, or "
    "build the weights from the training checkpoint with its zero_to_fp32.py."
)


def refuse_quantised(model: Posterior) -> None:
    """Refuse a model whose tensors are quantised.

    Raises:
        MismatchError: The model is quantised; the message names the tensor.
    """
    specs = model.mean.specs
    for name, spec in specs.items():
        scale = (
            next((name + s for s in _SCALES if name + s in specs), None) if spec.size > 1 else None
        )
        if scale is not None:
            raise MismatchError(
                f"'{name}' of '{model.ref}' is quantised: its values count times '{scale}'. "
                f"{_way_out(model)}"
            )
        if _QUANTISED.search(name) or _is_coded_weight(name, spec):
            raise MismatchError(
                f"'{model.ref}' is quantised: it holds '{name}' ({spec.dtype}). {_way_out(model)}"
            )
    config = read_config(model.path)
    unplain = next((n for n, spec in specs.items() if _is_unplain(n, spec)), None)
    if unplain is not None and _claim(config) is not None:
        raise MismatchError(
            f"'{model.ref}' is quantised: its config.json has a quantization_config, and "
            f"'{unplain}' is {specs[unplain].dtype}. {_ORIGINAL}"
        )


def stale_claims(config: Mapping[str, object]) -> dict[str, object]:
    """The changes to a config that remove a `quantization_config` which is not true of the weights.

    Some configs quantise plain weights again in every forward pass: these are true, and stay.

    Args:
        config: The config of a model that `refuse_quantised` found to be plain numbers.

    Returns:
        New values of the config's keys, None for a key to remove; empty if nothing is stale.
    """
    is_stale = _is_stale(config.get(_KEY)) or _is_stale(text_config(config).get(_KEY))
    return {_KEY: None} if is_stale else {}  # `change_config` removes it in a `text_config`, too


def refuse_emptied(model: Posterior) -> None:
    """Refuse a model whose weights are empty tensors, as ZeRO-3 leaves them.

    An empty tensor by itself is no fault: an embedding that is empty is one, and so are empty
    tensors in the place of half of the weights or more.

    Raises:
        MismatchError: The model holds no weights; the message names a tensor.
    """
    weights = {n: s for n, s in model.mean.specs.items() if n.endswith(".weight")}
    emptied = [name for name, spec in weights.items() if spec.shape == (0,)]
    if 2 * len(emptied) >= max(len(weights), 1) or any(map(is_vocabulary, emptied)):
        raise MismatchError(
            f"{model.mean.where(emptied[0])}: '{emptied[0]}' has the shape [0] ({len(emptied)} "
            f"such). {EMPTIED}"
        )


def _is_coded_weight(name: str, spec: TensorSpec) -> bool:
    """Whether a weight is stored as the integers of some code."""
    return spec.dtype in _CODES and len(spec.shape) > 1 and name.endswith(".weight")


def _is_unplain(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor may be quantised, where the config says that some are."""
    return spec.dtype not in _PLAIN and len(spec.shape) > 1 and not is_buffer(name)


def _claim(config: Mapping[str, object]) -> object:
    """The part of a config that says how the weights are quantised."""
    return config.get(_KEY) or text_config(config).get(_KEY)


def _is_stale(claim: object) -> bool:
    """Whether a part of a config says that plain weights are quantised on disk."""
    if not isinstance(claim, dict) or not claim:
        return False
    is_online = claim.get("quantization_mode") == "online"
    return not (is_online or claim.get("keep_master_weights") or claim.get("store_master_weights"))


def _way_out(model: Posterior) -> str:
    """What to do with a quantised model, by the library that quantised it."""
    claim = _claim(read_config(model.path))
    method = claim.get("quant_method") if isinstance(claim, dict) else None
    if method is None:
        writers = (m for pattern, m in _WRITERS if any(map(pattern.search, model.mean.specs)))
        method = next(writers, None)
    return _WAYS_OUT.get(str(method), _ORIGINAL)
