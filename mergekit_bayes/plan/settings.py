"""What a person may ask of a merge, and which requests contradict each other."""

import difflib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods import METHODS, choose, settings_of
from mergekit_bayes.methods.base import Method
from mergekit_bayes.records import Config


class MergeConfig(Config):
    """Settings of one merge. The fields are the flags of `bmerge merge`, whose help explains them.

    Attributes:
        models: The tasks: `.safetensors` files, folders, or Hub ids.
        base: What the tasks were fine-tuned from; with it the merge adds changes, without it it
            averages.
        method: By name, with its settings in `param`; `weights` is the short form for the four of
            the two-by-two table.
        param: The method's settings, such as `density: 0.2`.
        scale: One for all tasks, or one per task; dimensionless, negative removes (needs a base).
            `MODEL:REGEX=X` sets it for the tensors whose name matches; later ones win.
        precision: Another place for a model's precision, by the model's path as given.
        isotropic: One number as a model's precision, 1/weight^2.
        anchor: What training is taken to have pulled towards: `h0` (the base posterior, the
            published form), `none`, `zero-decay`, a number (1/weight^2), or `recorded`.
        guard: rho of the guard on removal, in (0, 1].
        counts: `equal` counts every likelihood precision per observation times one common count,
            the base's own (without one, the smallest on record); `recorded` as often as its data
            had observations.
        observations: `3x` multiplies a model's count, `1000` sets it; never touches its prior.
        shrink: `X` adds X times the tensor's mean to each likelihood precision, `row:X` X times its
            row's.
        pool: Replaces each precision by its tensor's (or row's) mean: the control of every claim
            for entries.
        only: Merge only the tensors whose name matches; the others are the base's (else the first
            model's).
        on_missing: A tensor that some model lacks: `error`, `base` (the task changed nothing there,
            needs a base), or `skip` (leave it out).
        vocab: Embeddings and heads of different length: `error`, `base` (the base's, else the first
            model's), or `common` (merge the rows that all have, keep the base's others).
        on_bad: Entries that are not finite, or precisions that are negative: `error`, or `base`
            (the task changed nothing there, needs a base).
        dtype: What merged tensors are written in; otherwise as the base (else the first model) has
            them.
        max_shard_size: Such as `5GB`; otherwise the shards of the base (else of the first model).
        space: Adapters alone: `product` of the factors, `concat` (their exact sum) or `factor` by
            factor.
        rank: Adapters alone: of the merged one in product space; by default the largest of theirs.
        identities, precision_identities: What each model and precision must be (`bmerge inspect`
            shows it); a recipe records what it was made with.
        verify: Compare all bytes of each mean with its posterior's record, not only sampled blocks.
    """

    models: tuple[str, ...]
    base: str | None = None
    weights: Literal["uniform", "precision"] = "uniform"
    method: str | None = None
    param: dict[str, float | str] = {}
    scale: tuple[float | str, ...] = (1.0,)
    out: str | None = None
    only: str | None = None
    on_missing: Literal["error", "base", "skip"] = "error"
    vocab: Literal["error", "base", "common"] = "error"
    on_bad: Literal["error", "base"] = "error"
    dtype: Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"] | None = None
    max_shard_size: str | None = None
    precision: dict[str, str] = {}
    isotropic: dict[str, float] = {}
    anchor: str = "h0"
    guard: float = Field(0.2, gt=0, le=1)
    counts: Literal["equal", "recorded"] = "equal"
    observations: dict[str, str] = {}
    shrink: str | None = None
    pool: Literal["tensor", "row"] | None = None
    space: Literal["product", "concat", "factor"] = "product"
    rank: int | None = None
    identities: dict[str, str] = {}
    precision_identities: dict[str, str] = {}
    posterior: bool = True
    force: bool = False
    verify: bool = False


class Shrink(NamedTuple):
    amount: float
    by_row: bool


class ScaleRule(NamedTuple):
    """The scale of one task in the tensors whose name matches."""

    tasks: tuple[int, ...]  # more than one where a model is named twice
    pattern: re.Pattern[str]
    scale: float
    text: str


def check_scales(config: MergeConfig) -> tuple[tuple[float, ...], tuple[ScaleRule, ...]]:
    """One scale per task, and the rules that change it tensor by tensor."""
    n = len(config.models)
    if n == 0 or (n == 1 and config.base is None):
        raise ConfigError("a merge needs two models, or one and a --base.")
    plain = tuple(s for s in config.scale if not isinstance(s, str)) or (1.0,)
    rules = tuple(_scale_rule(s, config) for s in config.scale if isinstance(s, str))
    if len(plain) not in (1, n):
        raise ConfigError(
            f"--scale: {len(plain)} given for {n} models. Give one for all, or one per model by "
            "repeating "
            "the flag in the models' order: --scale 1 --scale -0.5."
        )
    return (plain * n if len(plain) == 1 else plain), rules


def _scale_rule(text: str, config: MergeConfig) -> ScaleRule:
    front, separator, number = text.rpartition("=")
    model = next(
        (m for m in sorted(config.models, key=len, reverse=True) if front.startswith(m + ":")), None
    )
    if not separator or model is None:
        raise ConfigError(
            f"--scale '{text}': expected a number, or MODEL:REGEX=X with a model as given: "
            f"{', '.join(config.models)}."
        )
    try:
        tasks = tuple(i for i, m in enumerate(config.models) if m == model)
        return ScaleRule(tasks, re.compile(front[len(model) + 1 :]), float(number), text)
    except ValueError:
        raise ConfigError(f"--scale '{text}': '{number}' is not a number.") from None
    except re.error as error:
        raise ConfigError(
            f"--scale '{text}': '{front[len(model) + 1 :]}' is no regular expression ({error})."
        ) from None


def choose_method(config: MergeConfig) -> tuple[Method, dict[str, float | str]]:
    """The method by name or by the two questions of the table, and its settings."""
    if config.method is None:
        method = choose(
            with_base=config.base is not None, by_precision=config.weights == "precision"
        )
        return method, settings_of(method, config.param)
    if config.method not in METHODS:
        close = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(
            f"--method {config.method}: no such method.{hint} `bmerge methods` lists them."
        )
    method = METHODS[config.method]
    if config.weights == "precision" and not method.needs_precision:
        raise ConfigError(
            f"--method {method.name} does not weigh by precision. Drop --weights or --method."
        )
    if method.needs_base and config.base is None:
        raise ConfigError(
            f"--method {method.name} adds what each task changed: name what they came from with "
            "--base."
        )
    if not method.needs_base and config.base is not None:
        raise ConfigError(
            f"--method {method.name} takes no base. Drop --base, or name it among the models."
        )
    if method.tasks is not None and len(config.models) != method.tasks:
        raise ConfigError(
            f"--method {method.name} merges {method.tasks} models, not {len(config.models)}."
        )
    if method.tasks is not None and any(s != 1.0 for s in config.scale):
        raise ConfigError(
            f"--method {method.name} takes no --scale; its settings are --param (`bmerge methods`)."
        )
    return method, settings_of(method, config.param)


def parse_size(text: str) -> int:
    """Bytes of `5GB` (powers of 1,000, as transformers counts) or `512MiB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--max-shard-size '{text}': expected a size such as 5GB or 512MiB.")
    return int(
        float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    )


def check_options(
    config: MergeConfig, method: Method, scales: Sequence[float], rules: Sequence[ScaleRule]
) -> None:
    given = (*scales, *(r.scale for r in rules))
    if any(not abs(s) < float("inf") for s in given):
        raise ConfigError(f"--scale: {list(given)} must be finite.")
    if config.base is None:
        if any(s < 0 for s in given):
            raise ConfigError(
                "a negative scale removes a task from something: name it with --base."
            )
        if sum(scales) <= 0:
            raise ConfigError(
                "without --base the scales are shares and must sum to more than zero."
            )
        if config.anchor != "h0":
            raise ConfigError(
                "--anchor says how tasks were pulled to the base: name it with --base."
            )
        for rule, choice in (("on-missing", config.on_missing), ("on-bad", config.on_bad)):
            if choice == "base":
                raise ConfigError(f"--{rule} base takes the base's values: name it with --base.")
    if config.max_shard_size is not None:
        parse_size(config.max_shard_size)
    if not method.needs_precision:
        for flag in (
            "precision",
            "isotropic",
            "observations",
            "shrink",
            "pool",
            "anchor",
            "counts",
            "guard",
        ):
            if getattr(config, flag) != MergeConfig.model_fields[flag].default:
                raise ConfigError(
                    f"--{flag} only matters where precisions weigh. Add --weights precision, or "
                    "drop it."
                )
    elif config.base is not None and config.base in config.models:
        raise ConfigError(
            f"'{config.base}' is both --base and a model; what it changed would be nothing."
        )
    for ref in set(config.precision) & set(config.isotropic):
        raise ConfigError(f"'{ref}' has both --precision and --isotropic. Give one of them.")
    known = {*config.models, config.base}
    for flag in ("precision", "isotropic", "observations"):
        for ref in getattr(config, flag):
            if ref not in known:
                raise ConfigError(
                    f"--{flag} {ref}=...: no such model here. Name it as given: "
                    f"{', '.join(m for m in (*config.models, config.base) if m is not None)}."
                )
    for ref, value in config.isotropic.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"--isotropic {ref}={value}: a precision is a positive number.")
    if config.anchor not in ("h0", "none", "zero-decay", "recorded"):
        try:
            valid = 0 <= float(config.anchor) < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(
                f"--anchor '{config.anchor}': expected h0, none, zero-decay, recorded or a number "
                ">= 0."
            )
    parse_shrink(config.shrink)
    if config.only is not None:
        try:
            re.compile(config.only)
        except re.error as error:
            raise ConfigError(
                f"--only '{config.only}' is not a regular expression ({error})."
            ) from None


def parse_shrink(text: str | None) -> Shrink | None:
    if text is None:
        return None
    amount = text.removeprefix("row:")
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--shrink '{text}': expected X or row:X with a number X >= 0.")
    return Shrink(value, text.startswith("row:"))
