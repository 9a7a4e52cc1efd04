"""To which modules of a model PEFT can give factors, and by which names it knows them."""

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.layers import linear_axes
from mergekit_bayes.checkpoint.names import is_token_embedding, is_vocabulary, output_layer
from mergekit_bayes.checkpoint.specs import TensorSpec

# Prefixes of the model below its head in transformers, where they are not the model type.
_PREFIXES = {
    "transformer": "bloom codegen ctrl dbrx falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj mpt "
    "openai-gpt trocr xlm xlnet",
    "roberta": "camembert roberta xlm-roberta xlm-roberta-xl xmod",
    "bert": "bert bert-generation big_bird megatron-bert",
    "backbone": "falcon_mamba mamba mamba2 xlstm",
    "deberta": "deberta deberta-v2",
}
_PREFIX_OF = {kind: prefix for prefix, kinds in _PREFIXES.items() for kind in kinds.split()}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_HEADED = re.compile(r"(For[A-Z]\w*|LMHeadModel|LMHead)$")
# Ends of the names of modules that PEFT stores whole for a task, whatever else is adapted.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_EXPERT = re.compile(r"(^|\.)experts\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|router\.classifier|router\.layer)\.(weight|bias)$")
# Tables that every architecture looks up by a plain nn.Embedding; others are looked up in ways of
# their own (OPT's positions, DeBERTa's relative ones), which factors of PEFT do not take part in.
_TABLE = re.compile(r"(^|\.)(wpe|position_embeddings|token_type_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")  # other heads have other names in transformers 5
# Kernels of state-space layers read these weights themselves, past factors; PEFT refuses some.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_IN_MAMBA = re.compile(r"(^|\.)(out_proj|conv1d)\.")
_STATE_SPACE = re.compile(r"(^|\.)(mixer|mamba)\.(out_proj|conv1d|x_proj|dt_proj)\.")


class Kind(Enum):
    """What becomes of a changed tensor."""

    LINEAR = "linear layer"
    EMBEDDING = "embedding"
    HEAD = "head"
    WHOLE = "stored whole"
    EXPERT = "part of the experts"
    FOREIGN = "a table or head that PEFT does not adapt"
    REST = "other"


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        module: The module as PEFT names it.
        tensor: The tensor's name in the module.
        kind: What becomes of it.
        transposed: Whether its matrix is stored as (d_in, d_out).
    """

    module: str
    tensor: str
    kind: Kind
    transposed: bool = False


class Modules(NamedTuple):
    """The modules of a model.

    Attributes:
        task: PEFT's name of the task; None where the architecture does not say it plainly.
        places: Where each tensor belongs, by the base's name.
        prefix: What PEFT's names have before the base's.
    """

    task: str | None
    places: Mapping[str, Place]
    prefix: str


def find_modules(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Modules:
    """Sort the tensors of a base.

    Args:
        specs: Its tensors.
        config: Its `config.json`.
    """
    architecture = _architecture(config)
    prefix = _missing_prefix(specs, config, architecture)
    named = {name: name if output_layer(name) else f"{prefix}{name}" for name in specs}
    modules = {name.rpartition(".")[0] for name in named.values()}
    task = next((t for end, t in _TASKS.items() if architecture.endswith(end)), None)
    if architecture.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        task = "SEQ_2_SEQ_LM"
    ends = _HEADS.get(task or "", ())
    if ends and not any(_is_below(module, ends) for module in modules):
        task, ends = None, ()  # the base has no head, and PEFT would look for it
    linear = linear_axes(specs)
    has_experts = any(map(_EXPERT.search, specs))
    is_mamba = config.get("model_type") in _MAMBA
    places = {}
    for name, spec in specs.items():
        module, _, tensor = named[name].rpartition(".")
        kind = _kind(name, spec, linear, specs, has_experts=has_experts)
        if _STATE_SPACE.search(name) or (is_mamba and _IN_MAMBA.search(name)):
            kind = Kind.FOREIGN
        if _is_below(module, ends):
            kind = Kind.WHOLE
        places[name] = Place(module, tensor, kind, linear.get(name) == -2)
    return Modules(task, places, prefix)


def whole_modules(modules: Modules) -> list[str]:
    """The modules that PEFT stores whole for the task."""
    ends = _HEADS.get(modules.task or "", ())
    found = {
        path
        for place in modules.places.values()
        for path in _paths(place.module)
        if path.endswith(ends)
    }
    return sorted(found) if ends else []


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    is_one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    return names[0] if is_one else ""  # type: ignore[index]


def _missing_prefix(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], architecture: str
) -> str:
    """What a checkpoint of the model below the head leaves out of its names, as GPT-2's does."""
    if not _HEADED.search(architecture) or config.get("is_encoder_decoder"):
        return ""
    tops = {name.partition(".")[0] for name in specs if not output_layer(name)}
    kind = str(config.get("model_type", ""))
    prefix = _PREFIX_OF.get(kind, "model" if "embed_tokens" in tops else kind.replace("-", "_"))
    is_below = any(name.startswith(f"{prefix}.") for name in specs)
    has_layers = any(re.match(r"(h|layers?|encoder|blocks?|embeddings)\.", name) for name in specs)
    return f"{prefix}." if has_layers and prefix and not is_below else ""


def _kind(
    name: str,
    spec: TensorSpec,
    linear: Mapping[str, int],
    specs: Mapping[str, TensorSpec],
    *,
    has_experts: bool,
) -> Kind:
    if _EXPERT.search(name) or (has_experts and _ROUTER.search(name)):
        return Kind.EXPERT
    if len(spec.shape) != 2 or not name.endswith(".weight"):
        return Kind.REST
    if f"{name.removesuffix('.out_proj.weight')}.in_proj_weight" in specs:
        return Kind.REST  # of nn.MultiheadAttention, which does not call its output layer
    if name in linear:
        return Kind.LINEAR
    if _HEAD.search(name):
        return Kind.HEAD
    if is_token_embedding(name) or _TABLE.search(name):
        return Kind.EMBEDDING
    return Kind.FOREIGN if is_vocabulary(name) else Kind.REST


def _is_below(module: str, ends: tuple[str, ...]) -> bool:
    return bool(ends) and any(path.endswith(ends) for path in _paths(module))


def _paths(module: str) -> Iterable[str]:
    """A module and those that it is in, by their full names."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
