"""The `config.json` of a model folder, as far as a merge reads it.

transformers is not imported: a merge of tensors starts without it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.documents import read_object

# What transformers appends to the name of an architecture for its heads, the longer ones first.
_HEAD_SUFFIX = re.compile(
    r"(ForSequenceClassification|ForTokenClassification|ForConditionalGeneration|ForQuestionAnswering"
    r"|ForMultipleChoice|ForPreTraining|ForMaskedLM|ForCausalLM|WithLMHeadModel|DoubleHeadsModel"
    r"|LMHeadModel|ModelWithLMHead|ForTextEncoding|EncoderModel|BaseModel|Model)(Simple)?$"
)
# Architectures whose plain head for question answering has a longer name.
_SIMPLE_ANSWERS = ("XLM", "XLNet", "Flaubert")
# Keys that count the layers of a model, as the field's architectures call them.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_GENERIC_LABEL = re.compile(r"LABEL_\d+")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`; empty if there is none that can be read.

    A model may be a bare file, and a merge of tensors needs no config.
    """
    return read_object(folder / "config.json")


def read_model_config(path: Path) -> dict[str, Any]:
    """The config of a model; of a file that has a model's name, the one beside it."""
    if path.is_dir():
        return read_config(path)
    return read_config(path.parent) if path.stem == "model" else {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model.

    Models with several modalities nest it as `text_config`; for others it is the config itself.
    """
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def first_count(config: Mapping[str, Any], keys: Collection[str]) -> int | None:
    """The first of some keys of a config that is a whole number; None if none is."""
    values = (config.get(key) for key in keys)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the language model of a config has; None if it does not say."""
    return first_count(text_config(config), DEPTH_KEYS)


def change_config(config: dict[str, Any], changes: Mapping[str, object]) -> None:
    """Set keys of a config in place, each where the config has it; None removes a key.

    A config with a nested `text_config` may have a key in both places, and then it is set in both.
    A key that is in neither is set in the outer config.
    """
    nested = config.get("text_config")
    for key, value in changes.items():
        places: list[dict[str, Any]] = []
        if isinstance(nested, dict) and key in nested:
            places.append(nested)
        if key in config or not places:
            places.append(config)
        for place in places:
            if value is None:
                place.pop(key, None)
            else:
                place[key] = value


def labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a classifier's classes by number; None if the config does not give them."""
    given, inverse = config.get("id2label"), config.get("label2id")
    if isinstance(given, dict):
        pairs = list(given.items())
    elif isinstance(inverse, dict):
        pairs = [(number, name) for name, number in inverse.items()]
    else:
        return None
    try:
        by_number = {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError, OverflowError):
        return None
    if sorted(by_number) != list(range(len(by_number))):
        return None
    return tuple(by_number[number] for number in range(len(by_number)))


def are_generic(names: Sequence[str]) -> bool:
    """Whether all labels are those that transformers makes up: `LABEL_0`, `LABEL_1`, ..."""
    return all(_GENERIC_LABEL.fullmatch(name) for name in names)


def label_keys(names: Sequence[str]) -> dict[str, object]:
    """The keys of a config that name a classifier's classes."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def architecture_for(config: Mapping[str, Any], task: str) -> str | None:
    """The class of transformers that puts a head for `task` on the model of a config.

    The name of the class is that of the stored one with another ending, which holds for all
    architectures but those whose text model has a name of its own.

    Args:
        config: A config with `architectures`.
        task: The ending, such as `ForSequenceClassification`.

    Returns:
        The name; None if the config names no class or one whose ending is unknown.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return None
    ending = _HEAD_SUFFIX.search(names[0])
    if ending is None:
        return None
    stem = names[0][: ending.start()]
    if str(config.get("model_type", "")).endswith("_text") and not stem.endswith("Text"):
        stem += "Text"
    simple = "Simple" if task == "ForQuestionAnswering" and stem in _SIMPLE_ANSWERS else ""
    return f"{stem}{task}{simple}"
