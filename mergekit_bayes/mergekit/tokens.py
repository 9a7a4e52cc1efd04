"""What a recipe says of the output's tokens: `tokenizer_source` and `tokenizer`.

Source: mergekit's README, section "Tokenizer Configuration" (version 0.1.5).
"""

from collections.abc import Mapping

from mergekit_bayes.errors import ConfigError, did_you_mean, shown
from mergekit_bayes.plan.unions import RowChoice, TokenChoice

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_ROW_KEYS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
_LARGEST = 1 << 20  # of what rows are rounded up to


def read_token_choice(content: Mapping[str, object]) -> TokenChoice | None:
    """The choice of tokens in a recipe; None if it makes none.

        tokenizer_source: base | union | MODEL | model:MODEL
        tokenizer:
          source: base | union | MODEL | model:MODEL         (default union)
          tokens:
            TOKEN: {source: MODEL | zero | {kind: zero} | {kind: model_token, model: MODEL,
                    token: TOKEN | token_id: NUMBER}, force: true | false}
          pad_to_multiple_of: NUMBER

    Args:
        content: The recipe, of which the keys `tokenizer_source` and `tokenizer` are read.

    Raises:
        ConfigError: Both keys are there, or a value is none of these; the message names its key.
    """
    source, modern = content.get("tokenizer_source"), content.get("tokenizer")
    if source is not None and modern is not None:
        raise ConfigError(
            "tokenizer and tokenizer_source are both given, and say the same. Keep one of them."
        )
    if source is not None:
        return TokenChoice(_source(source, "tokenizer_source"))
    if modern is None:
        return None
    if not isinstance(modern, Mapping):
        raise ConfigError(
            f"tokenizer: {shown(modern)}, expected a mapping with {', '.join(_KEYS)}. For a source "
            "alone write tokenizer_source."
        )
    _refuse_unknown(modern, _KEYS, "tokenizer")
    return TokenChoice(
        _source(modern.get("source", "union"), "tokenizer.source"),
        _rows(modern.get("tokens")),
        _multiple(modern.get("pad_to_multiple_of")),
    )


def _source(value: object, key: str) -> str:
    if isinstance(value, Mapping):  # a model written out, as {model: {path: ...}}
        value = _model(value, key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: {shown(value)}, expected base, union or a model.")
    return value.removeprefix("model:")


def _model(value: object, key: str) -> str:
    """A model, which is named by its path or by a mapping that holds it."""
    inner = value
    while isinstance(inner, Mapping) and len(inner) == 1 and next(iter(inner)) in ("model", "path"):
        (inner,) = inner.values()
    if not isinstance(inner, str) or not inner:
        raise ConfigError(f"{key}: {shown(value)}, expected a model as the recipe names it.")
    return inner


def _rows(value: object) -> dict[str, RowChoice]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"tokenizer.tokens: {shown(value)}, expected a mapping by token.")
    rows = {}
    for token, setting in value.items():
        key = f"tokenizer.tokens: {shown(token)}"
        if not isinstance(token, str) or not token:
            raise ConfigError(f"{key} is no token: write it in quotes.")
        if not isinstance(setting, Mapping):
            raise ConfigError(f"{key}: {shown(setting)}, expected a mapping with source and force.")
        _refuse_unknown(setting, _TOKEN_KEYS, key)
        force = setting.get("force", False)
        if not isinstance(force, bool):
            raise ConfigError(f"{key}: force is {shown(force)}, expected true or false.")
        if setting.get("source") is None:
            raise ConfigError(
                f"{key} has no source, which says whose row it gets: a model, zero, or a mapping "
                "with kind, model and token."
            )
        rows[token] = _row(setting["source"], key, is_forced=force)
    return rows


def _row(source: object, key: str, *, is_forced: bool) -> RowChoice:
    if source == "zero":
        return RowChoice(None, is_forced=is_forced)
    if not isinstance(source, Mapping) or "kind" not in source:
        return RowChoice(_model(source, f"{key}: source"), is_forced=is_forced)
    kind = source["kind"]
    if not isinstance(kind, str) or kind not in _ROW_KEYS:
        raise ConfigError(f"{key}: kind is {shown(kind)}, expected {' or '.join(_ROW_KEYS)}.")
    _refuse_unknown(source, _ROW_KEYS[kind], f"{key}: source")
    if kind == "zero":
        return RowChoice(None, is_forced=is_forced)
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise ConfigError(f"{key}: source needs either token or token_id, and not both.")
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"{key}: token is {shown(token)}, expected text: write it in quotes.")
    if number is not None and (type(number) is not int or number < 0):
        raise ConfigError(f"{key}: token_id is {shown(number)}, expected a number from 0 on.")
    model = _model(source.get("model"), f"{key}: model")
    return RowChoice(model, token, number if isinstance(number, int) else None, is_forced)


def _multiple(value: object) -> int:
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ConfigError(
            f"tokenizer.pad_to_multiple_of: {shown(value)}, expected a number from 1 to "
            f"{_LARGEST:,}."
        )
    return value


def _refuse_unknown(content: Mapping[str, object], keys: tuple[str, ...], place: str) -> None:
    for key in content:
        if key not in keys:
            hint = did_you_mean(str(key), keys)
            raise ConfigError(
                f"{place}: there is no key {shown(key)}, only {', '.join(keys)}. {hint}".strip()
            )
