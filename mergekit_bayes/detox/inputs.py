"""What a removal reads: refused before the first step where it cannot work, and hashed.

The name of each step's folder is made of these hashes.
"""

from dataclasses import dataclass, field
from pathlib import Path

from mergekit_bayes.detox.adaptations import adapt_config, adaptation_key, refuse_adaptation
from mergekit_bayes.detox.candidates import Made, merge_config
from mergekit_bayes.detox.settings import (
    Curve,
    DetoxConfig,
    Method,
    evaluate_config,
    finetune_config,
    looks,
    needs_finetune,
    needs_precision,
    precision_config,
    weighs,
)
from mergekit_bayes.detox.steps import (
    data_identity,
    model_identity,
    precision_identity,
    scorer_identity,
    without,
)
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.evaluate.inputs import read_inputs as read_inputs_of
from mergekit_bayes.evaluate.refusals import refuse_settings
from mergekit_bayes.evaluate.scorers import Scorer
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.sources import refuse_source

NO_RESULT = ("force", "trust_remote_code")  # settings that change no result
# Of an evaluation: where it lies, and how its work is cut up.
_PLACES = ("model", "output", "batch_size", "sampling_batch", "num_processes")


@dataclass(frozen=True)
class Inputs:
    """Hashes of all that a removal reads.

    Attributes:
        config: The removal.
        base: Of the model to detoxify.
        identities: Of the base and of all data, for the report.
        evaluation: What an evaluation depends on, beside its model.
        finetune: What the toxic fine-tune depends on; empty if there is none.
        precision: What the precision of the base depends on; empty if no method needs it.
        adaptations: What each adaptation depends on, beside the base and its precision.
    """

    config: DetoxConfig
    base: dict[str, object]
    identities: dict[str, object]
    evaluation: list[object]
    finetune: list[object] = field(default_factory=list)
    precision: list[object] = field(default_factory=list)
    adaptations: dict[Method, list[object]] = field(default_factory=dict)

    def candidate(self, curve: Curve, place: float, made: Made) -> list[object]:
        """All that decides the bits of a candidate.

        Args:
            curve: The method and its settings.
            place: The scale of a merge, or the steps of an adaptation.
            made: What it is made of, beside the base.
        """
        if curve.unit == "step":
            return [*self.adaptation(curve, made), int(place)]
        settings = merge_config(self.config, curve, place, made).model_dump(mode="json")
        return [
            without(settings, "models", "base", "precision", "observations"),
            curve.base_count,
            self.finetune,
            *self._precision_of(curve, made),
        ]

    def adaptation(self, curve: Curve, made: Made) -> list[object]:
        """All that decides the bits of an adaptation after any step."""
        return [*self.adaptations[curve.method], self.base, *self._precision_of(curve, made)]

    def _precision_of(self, curve: Curve, made: Made) -> list[object]:
        if made.precision is None or not weighs(self.config, curve.method):
            return []
        return [precision_identity(made.precision)]


def read_inputs(config: DetoxConfig, curves: list[Curve]) -> Inputs:
    """Read and hash everything that a config names.

    Raises:
        BmergeError: One of its children, for settings, data and scorers with which a step would
            fail.
    """
    for curve in curves:
        looks(config, curve)
    finetune = finetune_config(config, "") if needs_finetune(config) else None
    precision = precision_config(config, "") if needs_precision(config) else None
    adaptations = {
        curve.method: adapt_config(config, curve, "", 1, None)
        for curve in curves
        if curve.unit == "step"
    }
    if precision is not None:
        _refuse_precision(precision)
    for adaptation in adaptations.values():
        refuse_adaptation(adaptation)
    evaluate = evaluate_config(config, config.base, "")
    with quiet_libraries(bars=False):
        scorers = _refuse_evaluation(evaluate)
        keys = {method: adaptation_key(adapt) for method, adapt in adaptations.items()}
    base = model_identity(config.base)
    identities: dict[str, object] = {
        "base": base,
        "toxic": data_identity(config.toxic.data),
        "texts": {name: data_identity(ref) for name, ref in evaluate.perplexity.items()},
        "prompts": data_identity(evaluate.toxicity or ""),
    }
    if precision is not None:
        identities["precision"] = data_identity(precision.data or ())
    if adaptations:
        identities["adaptations"] = {method: key[1] for method, key in keys.items()}
    settings = evaluate.model_dump(mode="json")
    return Inputs(
        config=config,
        base=base,
        identities=identities,
        evaluation=[
            without(settings, *_PLACES, *NO_RESULT),
            identities["texts"],
            identities["prompts"],
            {scorer.spec: scorer_identity(scorer) for scorer in scorers},
            model_identity(evaluate.judge) if evaluate.judge is not None else None,
        ],
        finetune=[
            without(finetune.model_dump(mode="json"), "output", "model", *NO_RESULT),
            base,
            identities["toxic"],
        ]
        if finetune is not None
        else [],
        precision=[
            without(precision.model_dump(mode="json"), "model", "output", *NO_RESULT),
            base,
            identities["precision"],
        ]
        if precision is not None
        else [],
        adaptations=keys,
    )


def _refuse_evaluation(config: EvaluateConfig) -> list[Scorer]:
    """Refuse settings, data and scorers that the evaluations would refuse; the open scorers."""
    refuse_settings(config.model_copy(update={"output": None}))
    return read_inputs_of(config).scorers


def _refuse_precision(config: PrecisionConfig) -> None:
    """Refuse a device and a source that the estimate of the base's precision would refuse."""
    choose_device(config.device)
    try:
        refuse_source(config, Path(config.output) if config.output else None)
    except BmergeError as error:
        raise type(error)(f"precision: {error}") from None
    if config.data is not None:
        load_rows(config.data, where=config.where, text=config.text_column)
