"""Settings of `bmerge detox`, and the curves that it compares."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, Field

from mergekit_bayes.adapt.settings import Rows
from mergekit_bayes.configs import Config, field_named, parse_config
from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.evaluate import EvaluateConfig
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.records import NumProcesses, TrustRemoteCode

Method = Literal[
    "task_arithmetic",
    "gradient_matching",
    "control",
    "fisher_negation",
    "adapt",
    "adapt_weights",
    "adapt_pool",
    "npo",
]
Unit = Literal["scale", "step"]
HELD_OUT = "held-out toxic text"
_OURS = ("model", "output", "trust_remote_code", "force")  # that detox sets for each step


class Kind(NamedTuple):
    """What a method of the comparison is like.

    Attributes:
        name: What reports call it.
        weighs: Whether it needs the base's precision.
        varied: The settings that apply to it; a list of one gives a curve for each value.
        unit: What its curve goes along: the scale of a merge, or the steps of an adaptation.
    """

    name: str
    weighs: bool = False
    varied: tuple[Literal["base_count", "shrink", "guard"], ...] = ()
    unit: Unit = "scale"


KINDS: dict[Method, Kind] = {
    "task_arithmetic": Kind("task arithmetic"),
    "gradient_matching": Kind(
        "gradient matching", weighs=True, varied=("base_count", "shrink", "guard")
    ),
    "control": Kind("control", weighs=True, varied=("base_count", "shrink", "guard")),
    "fisher_negation": Kind("Fisher negation", weighs=True),  # as published, which has none of them
    "adapt": Kind("adaptation", unit="step"),
    "adapt_weights": Kind("adaptation by precision", weighs=True, unit="step"),
    "adapt_pool": Kind("adaptation control", weighs=True, unit="step"),
    "npo": Kind("NPO", unit="step"),
}
_IN_WORDS: dict[str, Callable[[Any], str]] = {
    "base_count": lambda count: f"base {count:g}x",
    "shrink": lambda shrink: f"shrink {shrink or 'none'}",
    "guard": lambda guard: f"guard {guard:g}",
}


def _as_tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _as_texts(value: object) -> tuple[object, ...]:
    return tuple(str(v) if isinstance(v, (int, float)) else v for v in _as_tuple(value))


Positive: TypeAlias = Annotated[float, Field(gt=0)]
Steps: TypeAlias = Annotated[int, Field(ge=1)]
Guard: TypeAlias = Annotated[float, Field(gt=0, le=1)]
OneOrMore = BeforeValidator(_as_tuple)  # a single value in the YAML file stands for a list of one


class DetoxConfig(Config):
    """Settings of one removal of toxicity: the YAML keys of `bmerge detox`."""

    base: str = Field(description="Model to detoxify: a folder or Hub id.")
    output: str = Field(
        description="Folder for the reports, the picture, and the work in `steps/`."
    )
    toxic: Rows = Field(
        description="Text to remove: a fine-tune on it is subtracted, or an adaptation unlearns it."
    )
    held_out_toxic: Rows | None = Field(
        None,
        description="Toxic text that no step trains on; the loss on it is a smoother axis than the "
        "toxic share.",
    )
    finetune: dict[str, Any] = Field(
        {}, description="Settings of `bmerge finetune`, without model, data and output."
    )
    precision: dict[str, Any] = Field(
        {},
        description="Settings of `bmerge precision` for the base; `data` is what it should not "
        "forget.",
    )
    adapt: dict[str, Any] = Field(
        {},
        description="Settings of `bmerge adapt`, without model, output, `remove`, goals and steps. "
        "Its `memory` is used by the method `adapt` alone.",
    )
    reuse_precision: bool = Field(
        True,
        description="Use the base's own precision if it is of these weights and by the same "
        "estimator.",
    )
    evaluate: dict[str, Any] = Field(
        description="Settings of `bmerge evaluate`: texts, prompts, scorers and sampling."
    )
    methods: Annotated[tuple[Method, ...], OneOrMore] = Field(
        ("task_arithmetic", "gradient_matching", "control"),
        min_length=1,
        description="Methods to compare; `control` is gradient matching with each precision "
        "replaced by the mean of its tensor; `fisher_negation` takes an observation of the base "
        "for as much as one of the task, and no shrinkage, as published. Beside these merges "
        "`adapt` corrects the base with a memory, `adapt_weights` with the stored "
        "precision instead, `adapt_pool` with the mean of each of its tensors, and `npo` with "
        "neither.",
    )
    scales: Annotated[tuple[Positive, ...], OneOrMore] = Field(
        (), description="Amounts a > 0; a candidate of a merge is made with scale -a."
    )
    steps: Annotated[tuple[Steps, ...], OneOrMore] = Field(
        (),
        description="Looks at an adaptation: it makes as many steps as the largest says, and is "
        "evaluated after each.",
    )
    extra_scales: int = Field(
        4,
        ge=0,
        description="At most this many more candidates of a merge's curve, at the scales where it "
        "crosses a level and the interpolation between its scales is too uncertain.",
    )
    base_count: Annotated[tuple[Positive, ...], OneOrMore] = Field(
        (3.0,),
        description="Weight of one observation of the base over one of the task (`merge "
        "--observations`).",
    )
    shrink: Annotated[tuple[str | None, ...], BeforeValidator(_as_texts)] = Field(
        ("0.3",),
        description="As `merge --shrink`. Lists of it, of `base_count` or of `guard` give one "
        "curve for each combination.",
    )
    guard: Annotated[tuple[Guard, ...], OneOrMore] = Field(
        (0.2,), min_length=1, description="As `merge --guard`."
    )
    anchor: str = Field("h0", description="As `merge --anchor`.")
    levels: tuple[float, ...] = Field(
        (),
        description="Toxic shares at which to compare; by default 1/2, 1/4 and 1/10 of the base's.",
    )
    held_out_rises: tuple[float, ...] = Field(
        (),
        description="Rises of the held-out loss at which to compare, nats a token; by default 1/4, "
        "1/2 and 3/4 of what every curve reaches.",
    )
    keep_models: bool = Field(
        False,
        description="Keep all candidates. Otherwise only the chosen one is kept, in `model/` of "
        "the output, and the report says how to make each again.",
    )
    num_processes: NumProcesses = None
    trust_remote_code: TrustRemoteCode = False
    force: bool = Field(False, description="Repeat all steps.")


class Curve(NamedTuple):
    """One method with its settings, at all scales or steps.

    Attributes:
        label: What reports call the curve.
        method: The method.
        base_count: As in `DetoxConfig`; None where the method has no such setting.
        shrink: As `merge --shrink`.
        guard: As `merge --guard`; None where the method has no such setting.
    """

    label: str
    method: Method
    base_count: float | None = None
    shrink: str | None = None
    guard: float | None = None

    @property
    def unit(self) -> Unit:
        """What the curve goes along."""
        return KINDS[self.method].unit


def curves(config: DetoxConfig) -> list[Curve]:
    """The curves of a config. A label names only the settings that vary."""
    result = []
    for method in dict.fromkeys(config.methods):
        name, varied = KINDS[method].name, KINDS[method].varied
        values: list[Sequence[Any]] = [tuple(dict.fromkeys(getattr(config, s))) for s in varied]
        for chosen in product(*values):
            found = dict(zip(varied, chosen, strict=True))
            differs = [s for s, swept in zip(varied, values, strict=True) if len(swept) > 1]
            words = [name, *(_IN_WORDS[setting](found[setting]) for setting in differs)]
            result.append(Curve(", ".join(words), method, **found))
    return result


def looks(config: DetoxConfig, curve: Curve) -> tuple[float, ...]:
    """The scales or steps at which a curve is looked at first.

    Raises:
        ConfigError: There are none.
    """
    found = config.scales if curve.unit == "scale" else config.steps
    if not found:
        raise ConfigError(
            f"{curve.unit}s: {curve.method} needs one or more. Give them, or drop it from methods."
        )
    return tuple(dict.fromkeys(float(x) for x in found))


def weighs(config: DetoxConfig, method: Method) -> bool:
    """Whether a method needs the base's precision."""
    if method == "adapt":  # which has a memory; its settings may say both
        return bool(config.adapt.get("prior") == "stored")
    return KINDS[method].weighs


def needs_precision(config: DetoxConfig) -> bool:
    """Whether any of the methods weighs by precision."""
    return any(weighs(config, method) for method in config.methods)


def needs_finetune(config: DetoxConfig) -> bool:
    """Whether any of the methods subtracts what a fine-tune on the toxic text has changed."""
    return any(KINDS[method].unit == "scale" for method in config.methods)


def finetune_config(config: DetoxConfig, output: str) -> FinetuneConfig:
    """The settings of the toxic fine-tune.

    Raises:
        ConfigError: A setting that detox makes itself, an adapter, or a posterior that does not
            compare with the base's.
    """
    given = without_ours(
        config.finetune,
        FinetuneConfig,
        "finetune",
        ("model", "output", "data", "where", "trust_remote_code", "force"),
    )
    given |= {
        "model": config.base,
        "output": output,
        "data": config.toxic.data,
        "where": config.toxic.where,
        "trust_remote_code": config.trust_remote_code,
    }
    settings = parse_config(FinetuneConfig, given, "finetune")
    if settings.lora is not None:
        raise ConfigError(
            "finetune: lora: an adapter's change is no checkpoint yet. Fine-tune the full weights."
        )
    by_precision = any(KINDS[m].weighs for m in config.methods if KINDS[m].unit == "scale")
    if by_precision and settings.posterior != "flush":
        raise ConfigError(
            f"finetune: posterior: '{settings.posterior}' does not compare with the base's "
            "precision, which is the root-GGN diagonal. Leave it at flush, or drop the methods "
            "that need a precision."
        )
    return settings


def precision_config(config: DetoxConfig, output: str) -> PrecisionConfig:
    """The settings of the base's precision.

    Raises:
        ConfigError: A setting that detox makes itself, one that does not exist, or an estimator
            other than that of the fine-tune.
    """
    given = without_ours(config.precision, PrecisionConfig, "precision", _OURS)
    given |= {"model": config.base, "output": output, "trust_remote_code": config.trust_remote_code}
    settings = parse_config(PrecisionConfig, given, "precision")
    if settings.estimator != "ggn" or settings.moments is not None:
        estimator = "adam" if settings.moments is not None else settings.estimator
        raise ConfigError(
            f"precision: '{estimator}' does not compare with the precision of the fine-tune, which "
            "is the root-GGN diagonal. Leave `estimator` at ggn, and name text in `data`."
        )
    return settings


def evaluate_config(config: DetoxConfig, model: str, output: str) -> EvaluateConfig:
    """The settings of one evaluation. The held-out toxic text is one more set of texts.

    Raises:
        ConfigError: A setting that detox makes itself or has no use for, or no texts, prompts or
            scorers.
    """
    given = without_ours(config.evaluate, EvaluateConfig, "evaluate", (*_OURS, "num_processes"))
    given |= {"model": model, "output": output, "trust_remote_code": config.trust_remote_code}
    if config.held_out_toxic is not None:
        given |= _with_held_out(given, config.held_out_toxic)
    settings = parse_config(EvaluateConfig, given, "evaluate")
    if settings.samples is not None:
        raise ConfigError("evaluate: samples: candidates are compared at their means. Drop it.")
    if settings.toxicity is None or not settings.scorer:
        raise ConfigError("evaluate: name the prompts (toxicity) and one or more scorers (scorer).")
    if not set(settings.perplexity) - {HELD_OUT}:
        raise ConfigError(
            "evaluate: name texts (perplexity): what the removal costs is measured on them."
        )
    for name in (*settings.perplexity, *settings.scorer):
        if not name.isprintable():  # it stands in the report
            raise ConfigError(
                f"evaluate: {shown(name)}: a name of texts or a scorer holds a character that is "
                "not printable. Choose another name."
            )
    return settings


def _with_held_out(given: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The keys `perplexity` and `where` of an evaluation with one more set of texts."""
    texts, where = dict(given.get("perplexity", {})), dict(given.get("where", {}))
    if where and not all(isinstance(v, dict) for v in where.values()):
        where = dict.fromkeys(texts, where)  # one filter for all texts, but not for these
    texts[HELD_OUT] = rows.data
    if rows.where:
        where[HELD_OUT] = rows.where
    return {"perplexity": texts, "where": where}


def without_ours(
    given: dict[str, Any], config: type[Config], section: str, keys: tuple[str, ...]
) -> dict[str, Any]:
    """A copy of these settings, which must not contain the keys that detox sets itself.

    Raises:
        ConfigError: One of them is there.
    """
    for key in given:
        if field_named(config, key) in keys:
            raise ConfigError(f"{section}: {key}: detox sets this itself. Drop it.")
    return dict(given)
