"""What is known of an adaptation before the merge that it starts from is made."""

from mergekit_bayes.adapt.data import training_config
from mergekit_bayes.adapt.refusals import refuse_settings
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.finetune.session import refuse_output
from mergekit_bayes.models.rows import load_rows


def refuse_before_merge(config: AdaptConfig, *, has_precision: bool) -> None:
    """Refuse an adaptation of a merge that is not there yet.

    Args:
        config: Its settings.
        has_precision: Whether the merge will have a precision of numbers.

    Raises:
        CheckpointError: The output exists, or rows cannot be read.
        ConfigError: Settings that contradict each other.
        MismatchError: Rows without the named column.
        PrecisionError: The stored precision is to be the prior, and the merge will have none.
    """
    training = training_config(config)
    refuse_before(training)
    refuse_settings(config)
    refuse_output(training)
    if config.prior == "stored" and not has_precision:
        raise PrecisionError(
            "prior: stored asks for a precision with one number an entry, row or tensor, and this "
            "merge writes none: it is one by uniform weights, or has matrices for its layers. "
            "Merge by --weights precision with the precisions of ggn, or leave prior out."
        )
    for rows in (config.remove, config.add, config.memory, config.contrast):
        if rows is not None:
            load_rows(rows.sources, where=rows.where, max_rows=1, text=config.text_column)
