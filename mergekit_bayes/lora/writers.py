"""Which library wrote an adapter that is not read here, and how to make it readable.

The names of the tensors tell the libraries and the methods apart, the config does where there is
one.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import BmergeError, MismatchError
from mergekit_bayes.posterior import Posterior

# A sum of changes, by whole models; without the base named once more it would be their average.
FOLD_ALL = "`bmerge merge BASE+A BASE+B --base BASE -o OUT`"
FOLD = "Fold it into its base with `PeftModel.merge_and_unload()` and merge the result."
_FOLDER = "Name its folder, with its adapter_config.json, after the base: BASE+FOLDER."
_DIFFUSERS = (
    "Fold it into its pipeline with diffusers (`load_lora_weights`, `fuse_lora`, "
    "`save_pretrained`) and merge the parts of the result."
)
_MLX = (
    "MLX",
    "Fold it with `mlx_lm.fuse --model BASE --adapter-path ADAPTER --save-path FUSED` and merge "
    "the result.",
)
_ADAPTERHUB = (
    "the library `adapters` of AdapterHub",
    "Fold its LoRA with `model.merge_adapter(NAME)`, save the model and merge that; other kinds "
    "of its adapters add layers, which no merge of weights can take in.",
)
NO_CHANGE = "It adds virtual tokens and changes no weight, so that there is nothing to merge."

# A pattern of a tensor's name, who writes it or what it is, and what to do; the first match counts.
_NAMES = (
    (
        r"^(lora|lycoris)_(unet|te\d?|prior|transformer)_|\.lora_(down|up)\.weight$",
        "kohya-ss's sd-scripts, for a diffusion model",
        _DIFFUSERS,
    ),
    (
        r"^(unet|text_encoder(_2)?|transformer\.(single_)?transformer_blocks)\..*lora"
        r"|(\.|_)lora\.(down|up)\.weight$",
        "diffusers",
        _DIFFUSERS,
    ),
    (r"\.lora_[ab]$", *_MLX),
    (
        r"\.lora_[ab]\.weight$",
        "torchtune",
        "Its checkpointer FullModelHFCheckpointer writes the adapter in PEFT's form and the "
        "model with the adapter folded in; merge one of these.",
    ),
    (
        r"\.lora_[AB]$",
        "loralib or LitGPT",
        "Fold it with `litgpt merge_lora`, or save the model of loralib after `model.eval()`, "
        "and merge the result.",
    ),
    (
        r"\.adapter\.linear_(in|out)\.weight$|\.adapter_layer\.",
        "NeMo",
        "Fold it with NeMo's script merge_lora_weights, export the model to Hugging Face's "
        "form, and merge the result.",
    ),
    (r"\.adapters?\..*\.adapter_(down|up)\.", *_ADAPTERHUB),
    (r"\.lora_embedding_[AB](\.|$)", "PEFT, as a factor of an embedding", _FOLDER),
    (r"\.dora_scale$", "LyCORIS, as a magnitude of DoRA", FOLD),
    (r"\.lora_magnitude_vector", "PEFT, as a magnitude of DoRA", _FOLDER),
    (r"\.vera_(lambda|[AB])", "PEFT, as a part of VeRA", FOLD),
    (r"\.ia3_l(\.|$)", "PEFT, as a factor of IA3", FOLD),
    (r"\.hada_[wt]", "PEFT or LyCORIS, as a factor of LoHa", FOLD),
    (r"\.lokr_[wt]", "PEFT or LyCORIS, as a factor of LoKr", FOLD),
    (r"\.b?oft_", "PEFT, as a rotation of OFT", FOLD),
    (r"\.lora_E(\.|$)|\.ranknum(\.|$)", "PEFT, as a part of AdaLoRA", FOLD),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "PEFT, as a bias of a factor (lora_bias)", _FOLDER),
    (r"trainable_tokens_delta", "PEFT, as rows of trained tokens", _FOLDER),
    (
        r"\.(hra|fourierft|vblora|randlora|shira|c3a|road|bone|miss|waveft|delora|psoft)_",
        "PEFT, by a method other than LoRA",
        FOLD,
    ),
    (r"prompt_embeddings|prompt_encoder|prefix_encoder", "PEFT, for its prompts", NO_CHANGE),
    (
        r"\.base_layer\.(?!(.+\.)?lora_)",
        "PEFT, as a weight of the base below an adapter",
        "The file is a whole PeftModel: save the adapter alone with "
        f"`model.save_pretrained`. Or: {FOLD[0].lower()}{FOLD[1:]}",
    ),
)
_FACTOR = re.compile(r"(^|[._])(lora|hada|lokr|ia3|vera|lycoris)_|\.lora\.(down|up)\.")
_COMPANION = re.compile(r"\.(alpha|dora_scale)$")
_PEFT_MODEL = "base_model.model."
PROMPTS = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
)


def explain_name(name: str) -> str | None:
    """Who writes a tensor of this name, and what to do; None if the name is unknown."""
    for pattern, writer, way_out in _NAMES:
        if re.search(pattern, name):
            return f"'{name}' is written by {writer}. {way_out}"
    return None


def explain_config(config: Mapping[str, object]) -> str | None:
    """Who writes an `adapter_config.json` that is not PEFT's, and what to do; None if it may be."""
    writer = None
    if "peft_type" not in config:
        if "lora_parameters" in config or "fine_tune_type" in config:
            writer = _MLX
        elif isinstance(config.get("config"), dict | str) and "hidden_size" in config:
            writer = _ADAPTERHUB
    return None if writer is None else f"it is written by {writer[0]}. {writer[1]}"


def explain_files(path: Path) -> str | None:
    """Who wrote the tensors of a file or a folder without `adapter_config.json`, and what to do."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with SafetensorsSource([file]) as source:
                names = list(source.specs)
        except BmergeError:
            continue
        reason = next((r for name in names if (r := explain_name(name)) is not None), None)
        if reason is not None:
            return f"{file}: {reason}"
        if is_adapter_only(names):
            return (
                f"{file} holds factors, whose scale is in the adapter_config.json that PEFT wrote "
                "beside them. Fetch that file, too, and name the folder of both."
            )
    return None


def refuse_factors(model: Posterior) -> None:
    """Refuse a file that holds an adapter's factors, given as a whole model.

    Raises:
        MismatchError: An average of its tensors would be one of factors, which is not the average
            of the changes that they make.
    """
    names = model.mean.specs
    factor = next((n for n in names if n.startswith(_PEFT_MODEL) and _FACTOR.search(n)), None)
    if factor is not None and not is_adapter_only(names):
        raise MismatchError(
            f"'{model.ref}' is a PeftModel that was saved whole: it holds '{factor}' beside the "
            f"base's weights, and factors are not merged one by one. {FOLD}"
        )
    if is_adapter_only(names):
        reason = explain_name(next(iter(names))) or (
            "Name the folder that PEFT wrote, with its adapter_config.json, after the base: "
            "BASE+FOLDER."
        )
        raise MismatchError(
            f"'{model.ref}' holds the factors of an adapter, and no model: factors are not merged "
            f"one by one, since their product is what counts. {reason}"
        )


def is_adapter_only(names: Collection[str]) -> bool:
    """Whether all tensors are an adapter's, so that the file is no model by itself."""
    factors = [name for name in names if _FACTOR.search(name)]
    others = (name for name in names if not _FACTOR.search(name))
    return bool(factors) and all(_COMPANION.search(name) for name in others)
