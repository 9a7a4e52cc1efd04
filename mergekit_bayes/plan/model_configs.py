"""Compare the configs of the models of a merge: what else decides what their weights mean.

Tensors of the same names and shapes compute different functions under different configs. A key that
changes what each number means (how rows are divided among attention heads, the activation between
two layers) makes their average meaningless and is an error. A key that shifts the function a little
or is commonly changed between models that are merged (rotary base, epsilon of a norm, window) is a
note, because the output can have only one value of it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.model_config import read_model_config
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.side_files import config_input
from mergekit_bayes.plan.steps import Step

# Keys whose last component decides what each number of a tensor means, by what they are.
_MEANINGS = {
    "attention heads": r"n_head|(?!pruned)(\w+_)?(heads|head_dim)|d_kv|multi_query|mamba_d_head",
    "activation": r"(\w+_)?(act|activation|activation_function|act_fn)|afn|feed_forward_proj",
    "positions": r"position_embeddings?_type|(use_)?alibi|relative_attention|pos_att_type"
    r"|position_biased_input|rope_interleave|no_rope_layers",
    "order of layers": r"(do_|\w+_)?(normalize|layer_norm)_before|pre_norm|norm_type"
    r"|do_stable_layer_norm|apply_residual_connection_post_layernorm|use_parallel_residual"
    r"|parallel_attn|is_decoder",
    "scale factors": r"\w+_multiplier|scale_emb|scale_embedding|scale_depth|logits?_scal(e|ing)"
    r"|residual_scale|scale_attn_weights|scale_attn_by_inverse_layer_idx|query_pre_attn_scalar"
    r"|routed_scaling_factor|dim_model_base|norm_topk_prob|scoring_func",
}
_DRIFTS = (
    r"(\w+_)?(eps|epsilon)|layer_types|(use_)?sliding_window(_pattern)?|attention_window|max_window_layers"
    r"|max_position_embeddings|n_positions|\w+_softcap(ping)?|\w*experts_per_tok(en)?|n_group"
    r"|topk_group|is_causal|use_bidirectional_attention|problem_type|model_type"
)
_SWITCHES = r"\w+_window|\w+_softcap(ping)?"  # whose null says that there is none
# Two names of one function, and approximations of it that differ in the fourth digit.
_SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}
_NEAR_ACTIVATIONS = {"gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_10"}
# The rotary base where a config gives none, and the architectures for which that is so. Others have
# defaults of their own.
_THETA = 10_000.0
_THETA_TYPES = (
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "phi",
    "phi3",
    "gpt_neox",
    "qwen2",
)
_BY_ARCHITECTURE = ("rope_theta", "partial_rotary_factor")  # whose defaults differ
_UNSCALED = ("default", "mrope", "axial")  # positions in several dimensions, with plain frequencies


class Difference(NamedTuple):
    """A key that two configs give other values.

    Attributes:
        key: The key, with the names of nested configs before it.
        donors: The value of the model whose config is written; None if it gives none.
        other: The other model's value.
        meaning: What the key decides, if the weights mean other things under it; else None.
    """

    key: str
    donors: object
    other: object
    meaning: str | None


def compare_configs(
    config: MergeConfig, inputs: Inputs, steps: Sequence[Step], notes: list[str]
) -> None:
    """Compare the config of each model that is merged with the one that is written.

    Where none is written, or it says nothing, the first config of the others takes its place.

    Args:
        config: The settings.
        inputs: The models.
        steps: The tensors of the output.
        notes: Differences that are no error are appended here.

    Raises:
        MismatchError: The weights mean other things under another config, and `--on-config` is
            `error`.
    """
    merging = {model for step in steps if step.copied is None for model in step.contributors}
    stored = {model: read_model_config(model.posterior.path) for model in inputs}
    candidates = [config_input(inputs), inputs.donor, *(m for m in inputs if m in merging)]
    reference = next((model for model in candidates if model and stored[model]), None)
    for model, others in stored.items():  # of BASE+ADAPTER the base's
        if reference is None or model is reference or model not in merging or not others:
            continue
        differences = find_differences(stored[reference], others)
        meant = [difference for difference in differences if difference.meaning is not None]
        if meant and config.on_config == "error":
            raise _conflict(meant, model, reference)
        if differences:
            notes.append(
                f"config.json of '{model.ref}' has {_listed(differences)}: its weights were "
                f"trained with these, and the output has those of '{reference.ref}'"
            )


def find_differences(donors: Mapping[str, Any], others: Mapping[str, Any]) -> list[Difference]:
    """The keys that decide what weights mean and have other values in two configs.

    A key that one config lacks is compared only where its absence has a known meaning.
    """
    is_nested = all(isinstance(config.get("text_config"), dict) for config in (donors, others))
    left, right = (_plain(dict(_flat(c, text=is_nested))) for c in (donors, others))
    differences = [
        difference
        for key in left
        if key in right and (difference := _compare(key, left[key], right[key])) is not None
    ]
    for place in sorted({_place(key) for key in left} & {_place(key) for key in right}):
        differences += _rope_differences(
            place, _rope(_section(left, place)), _rope(_section(right, place))
        )
    return differences


def _plain(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config in the words in which transformers saves it.

    A config that its authors wrote by hand and the one that is saved with a fine-tune of the model
    say the same in other words.
    """
    plain = {}
    for key, value in flat.items():
        name = key.rpartition(".")[2]
        place = key.removesuffix(name)
        is_off = flat.get(f"{place}use_sliding_window") is False
        if name in ("sliding_window", "max_window_layers") and is_off:
            continue  # the size of a window that is switched off is saved as null
        if name == "pos_att_type" and isinstance(value, str):
            value = value.lower().split("|")
        if name == "pos_att_type" and isinstance(value, list):
            value = sorted(str(kind).strip() for kind in value)
        if value in ([], "auto") or (name == "layer_types" and value is None):
            continue  # made from other keys or by the architecture when the model is built
        if name == "head_dim" and f"{place}qk_rope_head_dim" in flat:
            continue  # of latent attention, whose heads have sizes by other names
        if name == "hidden_act" and f"{place}hidden_activation" in flat:
            continue  # of Gemma, which reads the latter
        if name == "model_type":
            value = str(value).removesuffix("_text")
        plain[key] = value
    return plain


def _compare(key: str, donors: object, other: object) -> Difference | None:
    """The difference in one key; None if there is none, or the key does not matter."""
    name = key.rpartition(".")[2]
    meaning = next((m for m, names in _MEANINGS.items() if re.fullmatch(names, name)), None)
    if meaning is None and not re.fullmatch(_DRIFTS, name):
        return None
    if meaning == "activation":
        functions = {_SAME_ACTIVATION.get(str(v), str(v)) for v in (donors, other)}
        if len(functions) == 1:
            return None
        if functions <= _NEAR_ACTIVATIONS:
            meaning = None
    if donors == other or (_is_neutral(donors) and _is_neutral(other)):
        return None
    if (donors is None or other is None) and (meaning or not re.fullmatch(_SWITCHES, name)):
        return None  # the default of an architecture, decided by the shapes or unknown here
    return Difference(key, donors, other, meaning)


def _is_neutral(value: object) -> bool:
    """Whether a value says what its absence means as well."""
    return (
        value in (None, "absolute", "default")
        or value is False
        or (value == 1 and value is not True)
    )


def _conflict(differences: Sequence[Difference], model: Input, reference: Input) -> MismatchError:
    meanings = " and ".join(dict.fromkeys(str(d.meaning) for d in differences))
    return MismatchError(
        f"config.json of '{model.ref}' has {_listed(differences)}: the same weights mean other "
        f"things under other {meanings}, so that they cannot be averaged or added. If the models "
        "are of one architecture after all, correct the config that is wrong, or pass --on-config "
        f"base to take that of '{reference.ref}' as true of all."
    )


def _listed(differences: Sequence[Difference]) -> str:
    told = [f"{d.key[:80]} {_shown(d.other)} (there {_shown(d.donors)})" for d in differences[:20]]
    if len(differences) > len(told):
        told.append(f"and {len(differences) - len(told)} more")
    return ", ".join(told)


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(
    config: Mapping[str, Any], place: str = "", *, text: bool = False
) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of the configs in it, each with the place as a prefix.

    That of the text has none, so that it compares with a config that is not nested, unless `text`
    asks for one. It comes last, because its values are those that the text model reads.
    """
    for key, value in sorted(config.items(), key=lambda item: item[0] == "text_config"):
        is_nested = isinstance(value, dict) and (
            key.endswith("_config") or key in ("encoder", "decoder")
        )
        if is_nested and key != "quantization_config":
            inner = place if key == "text_config" and not text else f"{place}{key}."
            yield from _flat(value, inner, text=text)
        elif text or not (key == "model_type" and isinstance(config.get("text_config"), dict)):
            yield f"{place}{key}", value


def _place(key: str) -> str:
    return key.rpartition(".")[0]


def _section(flat: Mapping[str, Any], place: str) -> dict[str, Any]:
    return {key.rpartition(".")[2]: v for key, v in flat.items() if _place(key) == place}


def _rope(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary embedding by type of layer ("" for all), from the old keys or the new ones.

    transformers 5 has one `rope_parameters`; before it were `rope_theta`, `rope_scaling` and keys
    of single architectures.
    """
    given = config.get("rope_parameters")
    if isinstance(given, dict):
        if any(isinstance(value, dict) for value in given.values()):
            return {k: _plain_rope(v) for k, v in given.items() if isinstance(v, dict)}
        return {"": _plain_rope({**_old_rope(config), **given})}
    scaling = config.get("rope_scaling")
    rope = {**_old_rope(config), **(scaling if isinstance(scaling, dict) else {})}
    for key in ("rope_local_base_freq", "local_rope_theta"):
        if config.get(key) is not None:
            rope.setdefault("rope_theta", config.get("global_rope_theta"))
            local = _plain_rope({"rope_theta": config[key]})
            return {"full_attention": _plain_rope(rope), "sliding_attention": local}
    return {"": _plain_rope(rope)}


def _old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    default = {"rope_theta": _THETA} if config.get("model_type") in _THETA_TYPES else {}
    names = {
        "rope_theta": ("rope_theta", "rotary_emb_base", "rotary_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    }
    return default | {
        key: config[spelling]
        for key, spellings in names.items()
        for spelling in spellings
        if config.get(spelling) is not None
    }


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same without keys that say what an absent one means."""
    renamed = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    if renamed.get("rope_type") in _UNSCALED:
        del renamed["rope_type"]
        renamed.pop("factor", None)
    return {
        key: value
        for key, value in renamed.items()
        if value is not None and (key in _BY_ARCHITECTURE or not _is_neutral(value))
    }


def _of_type(rope: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """The rotary embedding of one type of layer, from what a config says of all.

    Where a model has several types, its scaling is that of the layers with full attention.
    """
    is_scaled = layers == "full_attention"
    return {key: value for key, value in rope.items() if is_scaled or key in _BY_ARCHITECTURE}


def _rope_differences(
    place: str, donors: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]
) -> Iterator[Difference]:
    if donors.keys() != others.keys():  # one for all layers against one for each type
        types = (donors.keys() | others.keys()) - {""}
        donors, others = (
            {layers: rope.get(layers, _of_type(rope.get("", {}), layers)) for layers in types}
            for rope in (donors, others)
        )
    for layers in sorted(donors):
        for key in sorted(donors[layers].keys() | others[layers].keys()):
            donors_value, other = (rope[layers].get(key) for rope in (donors, others))
            is_known = key in ("rope_type", "factor") or None not in (donors_value, other)
            if is_known and donors_value != other:
                name = key if key.startswith("rope") else f"rope {key}"
                where = ".".join(part for part in (place, layers) if part)
                yield Difference(f"{where}.{name}" if where else name, donors_value, other, None)
