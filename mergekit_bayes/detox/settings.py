"""What a removal asks for, and the curves that it compares."""

from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate import EvaluateConfig
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.records import Config

Method = Literal["task_arithmetic", "gradient_matching", "control"]
HELD_OUT = "held-out toxic text"
_NAMES = {
    "task_arithmetic": "task arithmetic",
    "gradient_matching": "gradient matching",
    "control": "control",
}


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _texts(value: Any) -> Any:
    return tuple(v if v is None else str(v) for v in _listed(value))


class Rows(Config):
    """Rows of text: files, folders or Hub data sets; `where` keeps those with these values."""

    data: str | tuple[str, ...]
    where: dict[str, Any] | None = None


class DetoxConfig(Config):
    """Settings of `bmerge detox`; the fields are the YAML keys.

    Attributes:
        base: The model to detoxify, a folder or Hub id.
        output: Folder for the reports, the picture and the work in `steps/`.
        toxic: What the fine-tune reads, so what is subtracted.
        held_out_toxic: Toxic text that no step trains on; the loss on it is a smoother axis than
            the toxic share.
        finetune: `FinetuneConfig` keys, less the model, the data and the output.
        precision: `PrecisionConfig` keys for the base: the data that it should not forget, `data`
            above all.
        reuse_precision: Take the base's own precision if it has one of the same estimator and of
            these weights.
        evaluate: `EvaluateConfig` keys: texts, prompts, scorers, sampling.
        methods: `control` is gradient matching with each precision replaced by its tensor's mean.
        scales: Amounts a > 0; each candidate is merged with scale -a.
        base_count: How often the base's data counts for each observation of the task's (`merge
            --observations`).
        shrink: As `merge --shrink`; a list of it or of `base_count` gives one curve for each
            combination.
        levels: Toxic shares at which to compare; empty: 1/2, 1/4 and 1/10 of the base's.
        held_out_rises: Rises of the held-out loss at which to compare, nats a token; empty: 1/4,
            1/2 and 3/4 of what every curve reaches.
        keep_models: Keep the candidates; otherwise the report says how to make one again.
        force: Do all steps again.
    """

    base: str
    output: str
    toxic: Rows
    held_out_toxic: Rows | None = None
    finetune: dict[str, Any] = {}
    precision: dict[str, Any] = {}
    reuse_precision: bool = True
    evaluate: dict[str, Any]
    methods: Annotated[tuple[Method, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        "task_arithmetic",
        "gradient_matching",
        "control",
    )
    scales: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed), Field(min_length=1)
    ]
    base_count: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)] = (
        3.0,
    )
    shrink: Annotated[tuple[str | None, ...], BeforeValidator(_texts)] = ("0.3",)
    guard: float = Field(0.2, gt=0, le=1)
    anchor: str = "h0"
    levels: tuple[float, ...] = ()
    held_out_rises: tuple[float, ...] = ()
    keep_models: bool = False
    force: bool = False


class Curve(NamedTuple):
    """One method with its settings, at all scales."""

    label: str
    method: Method
    base_count: float | None = None
    shrink: str | None = None


def curves(config: DetoxConfig) -> list[Curve]:
    """The curves of a config; labels name only what is swept."""
    found = []
    for method in dict.fromkeys(config.methods):
        if method == "task_arithmetic":
            found.append(Curve(_NAMES[method], method))
            continue
        for count, shrink in product(
            dict.fromkeys(config.base_count), dict.fromkeys(config.shrink)
        ):
            swept = [f"base {count:g}x"] if len(config.base_count) > 1 else []
            swept += [f"shrink {shrink or 'none'}"] if len(config.shrink) > 1 else []
            found.append(Curve(", ".join([_NAMES[method], *swept]), method, count, shrink))
    return found


def needs_precision(config: DetoxConfig) -> bool:
    return any(m != "task_arithmetic" for m in config.methods)


def finetune_config(config: DetoxConfig, output: str) -> FinetuneConfig:
    """The settings of the toxic fine-tune."""
    given = _without(config.finetune, "finetune", ("model", "output", "data", "where", "force"))
    settings = parse_config(
        FinetuneConfig,
        {
            **given,
            "model": config.base,
            "output": output,
            "data": config.toxic.data,
            "where": config.toxic.where,
        },
        "finetune",
    )
    if settings.lora is not None:
        raise ConfigError(
            "finetune: lora: an adapter's change is no checkpoint yet. Fine-tune the full weights."
        )
    if needs_precision(config) and settings.posterior != "flush":
        raise ConfigError(
            f"finetune: posterior: '{settings.posterior}' does not compare with the base's "
            "precision, which is the "
            "root-GGN diagonal. Leave it at flush, or drop the methods that need a precision."
        )
    return settings


def precision_config(config: DetoxConfig, output: str) -> PrecisionConfig:
    """The settings of the base's precision."""
    given = _without(config.precision, "precision", ("model", "output", "force"))
    return parse_config(
        PrecisionConfig, {**given, "model": config.base, "output": output}, "precision"
    )


def evaluate_config(config: DetoxConfig, model: str, output: str) -> EvaluateConfig:
    """The settings of one evaluation; the held-out toxic text is one more set of texts."""
    given = _without(config.evaluate, "evaluate", ("model", "output", "force"))
    given = {**given, "model": model, "output": output}
    if config.held_out_toxic is not None:
        texts, where = dict(given.get("perplexity", {})), dict(given.get("where", {}))
        if where and not all(isinstance(v, dict) for v in where.values()):
            where = dict.fromkeys(texts, where)
        texts[HELD_OUT] = config.held_out_toxic.data
        if config.held_out_toxic.where:
            where[HELD_OUT] = config.held_out_toxic.where
        given |= {"perplexity": texts, "where": where}
    settings = parse_config(EvaluateConfig, given, "evaluate")
    if settings.toxicity is None or not settings.scorer:
        raise ConfigError("evaluate: name the prompts (toxicity) and one or more scorers (scorer).")
    if not set(settings.perplexity) - {HELD_OUT}:
        raise ConfigError(
            "evaluate: name texts (perplexity): what the removal costs is measured on them."
        )
    return settings


def _without(given: dict[str, Any], section: str, own: tuple[str, ...]) -> dict[str, Any]:
    for key in own:
        if key in given:
            raise ConfigError(f"{section}: {key}: detox sets this itself. Drop it.")
    return dict(given)
