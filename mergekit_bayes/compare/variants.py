"""What of a model is measured: the model as it is, and what becomes of it."""

from collections.abc import Generator

from mergekit_bayes.compare.relearn import refuse_relearning, refuse_rows, relearn
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.evaluate.report import Variant
from mergekit_bayes.evaluate.run import Change
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.merged import refuse_fixed, refuse_fixed_weights
from mergekit_bayes.models.rounding import refuse_unroundable, round_to_four_bits

# A posterior describes the stored weights only, so a variant is measured at its own.
_OF_THE_POSTERIOR = ("samples", "prior", "posterior_temperature", "precision")


def variants_of(
    config: CompareConfig, model: str, *, drawn: bool = True
) -> Generator[tuple[Variant, EvaluateConfig, Change | None]]:
    """What is measured of one model, one after the other.

    All are read from the model that the config names, whose name their reports have, and nothing
    is left on the disk in between. Variants are measured at their weights only, not over draws
    from a posterior, which is that of the stored weights.

    Args:
        config: The settings of all models; checked by `refuse_variants` and `refuse_models`.
        model: One of them, as the config names it.
        drawn: Whether it has a posterior, so that it is measured over draws if these are asked for.

    Yields:
        The variant, its evaluation, and what to change in the loaded model first, if anything. The
        model as it is refuses there, before it is measured, what its variants would refuse.
    """
    as_it_is = config.evaluation(model) if drawn else _at_mean(config.evaluation(model))
    has_variants = config.four_bits or config.relearn is not None
    check = Change("as it is", lambda loaded: _refuse_loaded(config, loaded))
    yield "as it is", as_it_is, check if has_variants else None
    own = _at_mean(as_it_is)
    if config.four_bits:
        yield "in 4 bits", own, Change("in 4 bits", round_to_four_bits)
    if config.relearn is not None:
        yield (
            "relearnt",
            own,
            Change("relearnt", lambda loaded: relearn(config, model, loaded)),
        )


def _at_mean(settings: EvaluateConfig) -> EvaluateConfig:
    """The evaluation without draws, in the dtype that the models with draws have."""
    fields = EvaluateConfig.model_fields
    update = {name: fields[name].default for name in _OF_THE_POSTERIOR}
    if settings.samples is not None and settings.dtype == "auto":
        update["dtype"] = "float32"
    return settings.model_copy(update=update)


def refuse_variants(config: CompareConfig) -> None:
    """Refuse what cannot be measured of any model, before the first one is loaded.

    Raises:
        BmergeError: As `refuse_relearning`.
    """
    refuse_relearning(config)


def refuse_models(config: CompareConfig) -> None:
    """Refuse models of which a variant cannot be made, by their files alone.

    Raises:
        BmergeError: As `models.merged.refuse_fixed`.
    """
    if config.four_bits or config.relearn is not None:
        for model in config.models:
            refuse_fixed(model)


def _refuse_loaded(config: CompareConfig, loaded: Loaded) -> None:
    refuse_fixed_weights(loaded)
    if config.four_bits:
        refuse_unroundable(loaded)
    refuse_rows(config, loaded)
