"""Read the options of a merge that are given as text, and refuse contradictions between options."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.methods import check_fit, choose, method_named, settings_of
from mergekit_bayes.methods.base import FactInputs, Method
from mergekit_bayes.patterns import MOST_CHARACTERS, PatternError, compile_pattern
from mergekit_bayes.plan.settings import BY_MODEL, MergeConfig

_PRECISION_ONLY = (
    "precision",
    "isotropic",
    "observations",
    "shrink",
    "pool",
    "anchor",
    "counts",
    "guard",
)
# The arithmetic of a merge is float32: its smallest number of full accuracy, and its largest.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# As the length of the longest name of a tensor: patterns are refused that take long with any name;
# the others are looked at again when the models have been opened.
NOT_KNOWN_YET = 1
_ANCHORS = ("h0", "none", "zero-decay", "recorded")


class ScaleRule(NamedTuple):
    """A scale for the tensors of a task whose name matches: `MODEL:REGEX=X`.

    Attributes:
        tasks: Indices of the tasks; more than one where a model is named twice.
        pattern: Matches the names of tensors.
        scale: Dimensionless; negative removes.
        text: The rule as given, for messages.
    """

    tasks: tuple[int, ...]
    pattern: re.Pattern[str]
    scale: float
    text: str


class Shrink(NamedTuple):
    """How much of a mean precision is added to each entry.

    Attributes:
        amount: Multiple of the mean, at least 0.
        by_row: Whether the mean is that of the row instead of the tensor.
    """

    amount: float
    by_row: bool


def parse_scales(config: MergeConfig) -> tuple[tuple[float, ...], tuple[ScaleRule, ...]]:
    """One scale per task, and the rules that change it tensor by tensor.

    Raises:
        ConfigError: Too few models, a number of scales that does not fit the models, or a rule
            that cannot be read.
    """
    count = len(config.models)
    if count == 0 or (count == 1 and config.base is None):
        raise ConfigError(
            "a merge needs two models, one and a --base, or BASE+ADAPTER and a method that "
            "takes a base."
        )
    scales = tuple(s for s in config.scale if not isinstance(s, str)) or (1.0,)
    texts = [s for s in config.scale if isinstance(s, str)]
    if (length := sum(map(len, texts))) > MOST_CHARACTERS:
        raise ConfigError(
            f"--scale: the rules have {length:,} characters, where at most {MOST_CHARACTERS:,} are "
            "read. Give fewer or shorter ones."
        )
    rules = tuple(_parse_rule(text, config.models) for text in texts)
    if len(scales) not in (1, count):
        raise ConfigError(
            f"--scale: {len(scales)} given for {count} models. Give one for all, or one per model "
            "by repeating the flag in the models' order: --scale 1 --scale -0.5."
        )
    return (scales * count if len(scales) == 1 else scales), rules


def choose_method(config: MergeConfig) -> tuple[Method, dict[str, float | str]]:
    """The method by name, or the one that `weights` and `base` choose, and its parameters.

    Raises:
        ConfigError: There is no such method, or it or its parameters do not fit the base, the
            weights, the scales or the number of models.
    """
    if config.method is None:
        method = choose(
            with_base=config.base is not None, by_precision=config.weights == "precision"
        )
    else:
        method = method_named(config.method or "", with_base=config.base is not None)
        _check_method(config, method)
    settings = settings_of(method, config.param)
    if method.facts is not None and method.reduction is None:  # which may refuse the settings
        counts = (1.0,) * len(config.models)
        method.facts(FactInputs(settings, config.guard, counts, np.zeros(0)))
    return method, settings


def check_options(
    config: MergeConfig, method: Method, scales: Sequence[float], rules: Sequence[ScaleRule]
) -> None:
    """Refuse options that contradict each other or cannot be read.

    Raises:
        ConfigError: The first such option, by its flag.
    """
    given = (*scales, *(r.scale for r in rules))
    if not all(abs(s) <= _LARGEST for s in given):
        raise ConfigError(
            f"--scale: {list(given)} must be finite, at most {_LARGEST:.1e}, the largest that "
            "float32 holds."
        )
    if config.base is None:
        _check_without_base(config, scales, given)
    if config.max_shard_size is not None:
        parse_size(config.max_shard_size)
    if not method.needs_precision:
        for name in _PRECISION_ONLY:
            if getattr(config, name) != MergeConfig.model_fields[name].default:
                mend = "Add --weights precision, or drop it."
                if config.method is not None:
                    mend = f"{method.name} reads none: drop it."
                raise ConfigError(f"--{name} only matters where precisions weigh. {mend}")
    elif config.base is not None and config.base in config.models:
        raise ConfigError(
            f"'{config.base}' is both --base and a model; what it changed would be nothing."
        )
    for name in method.ignores:
        if getattr(config, name) != MergeConfig.model_fields[name].default:
            raise ConfigError(f"--{name}: {method.name} has no use for it. Drop it.")
    _check_models_named(config)
    _check_anchor(config.anchor)
    parse_shrink(config.shrink)
    if config.only is not None:
        try:
            compile_pattern(config.only, anywhere=True, longest=NOT_KNOWN_YET)
        except PatternError as error:
            raise ConfigError(
                f"--only {shown(config.only)} is not used as a regular expression: {error}."
            ) from None


def parse_shrink(text: str | None) -> Shrink | None:
    """Read `X` or `row:X`, with a number X >= 0.

    Raises:
        ConfigError: The text is neither.
    """
    if text is None:
        return None
    try:
        amount = float(text.removeprefix("row:"))
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise ConfigError(f"--shrink '{text}': expected X or row:X with a number X >= 0.")
    return Shrink(amount, text.startswith("row:"))


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (powers of 1,000, as transformers counts) or `512MiB`.

    Raises:
        ConfigError: The text is not a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ConfigError(f"--max-shard-size '{text}': expected a size such as 5GB or 512MiB.")
    unit = 1024 if match[3] else 1000
    exponent = " KMGT".index(match[2].upper() or " ")
    # No file is larger than a signed offset reaches, and a numeral of any length is finite here.
    return int(min(float(match[1]) * unit**exponent, 2.0**62))


def _parse_rule(text: str, models: tuple[str, ...]) -> ScaleRule:
    """Read `MODEL:REGEX=X`; of models that begin alike the longest is meant."""
    front, separator, number = text.rpartition("=")
    by_length = sorted(models, key=len, reverse=True)
    model = next((m for m in by_length if front.startswith(m + ":")), None)
    if not separator or model is None:
        raise ConfigError(
            f"--scale '{text}': expected a number, or MODEL:REGEX=X with a model as given: "
            f"{', '.join(models)}."
        )
    regex = front[len(model) + 1 :]
    tasks = tuple(i for i, m in enumerate(models) if m == model)
    try:
        pattern = compile_pattern(regex, anywhere=True, longest=NOT_KNOWN_YET)
        return ScaleRule(tasks, pattern, float(number), text)
    except PatternError as error:
        raise ConfigError(
            f"--scale {shown(text)}: {shown(regex)} is not used as a regular expression: {error}."
        ) from None
    except ValueError:
        raise ConfigError(f"--scale '{text}': '{number}' is not a number.") from None


def _check_method(config: MergeConfig, method: Method) -> None:
    """Refuse a method that does not fit the rest of the options."""
    if config.weights == "precision" and not method.needs_precision:
        raise ConfigError(
            f"--method {method.name} does not weigh by precision. Drop --weights or --method."
        )
    if method.needs_base and config.base is None:
        raise ConfigError(
            f"--method {method.name} adds what each task changed: name what they came from with "
            "--base."
        )
    if not (method.needs_base or method.takes_base) and config.base is not None:
        raise ConfigError(
            f"--method {method.name} takes no base. Drop --base, or name it among the models."
        )
    check_fit(method, len(config.models), config.scale)


def _check_without_base(
    config: MergeConfig, scales: Sequence[float], given: Sequence[float]
) -> None:
    """Refuse what needs a base; `given` are the scales with those of the rules."""
    if any(s < 0 for s in given):
        raise ConfigError("a negative scale removes a task from something: name it with --base.")
    if sum(scales) <= 0:
        raise ConfigError("without --base the scales are shares and must sum to more than zero.")
    if config.anchor != "h0":
        raise ConfigError("--anchor says how tasks were pulled to the base: name it with --base.")
    for flag, choice in (("on-missing", config.on_missing), ("on-bad", config.on_bad)):
        if choice == "base":
            raise ConfigError(f"--{flag} base takes the base's values: name it with --base.")


def _check_models_named(config: MergeConfig) -> None:
    """Refuse options by model that name an unknown model, or give one precision twice."""
    for ref in set(config.precision) & set(config.isotropic):
        raise ConfigError(f"'{ref}' has both --precision and --isotropic. Give one of them.")
    refs = [m for m in (*config.models, config.base) if m is not None]
    for name in BY_MODEL:
        for ref in getattr(config, name):
            if ref not in refs:
                raise ConfigError(
                    f"--{name} {ref}=...: no such model here. Name it as given: {', '.join(refs)}"
                    f"{', or BASE' if config.base is not None else ''}."
                )
    for ref, value in config.isotropic.items():
        if not _SMALLEST <= value <= _LARGEST:
            raise ConfigError(
                f"--isotropic {ref}={value}: a precision is a positive number that float32 holds, "
                f"from {_SMALLEST:.1e} to {_LARGEST:.1e}."
            )


def _check_anchor(anchor: str) -> None:
    if anchor in _ANCHORS:
        return
    try:
        valid = 0 <= float(anchor) < float("inf")
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"--anchor '{anchor}': expected {', '.join(_ANCHORS)} or a number >= 0.")
