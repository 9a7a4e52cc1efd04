"""Load the model and encode the training examples."""

import logging
from typing import Any

from mergekit_bayes.checkpoint.sources import commit_in, is_hub_id
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.ranks import is_main
from mergekit_bayes.finetune.refusals import refuse_other_heads
from mergekit_bayes.finetune.settings import FinetuneConfig, LoraSettings
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import Loaded, is_classifier, load_model
from mergekit_bayes.models.rows import load_rows

logger = logging.getLogger(__name__)


def load_data_and_model(config: FinetuneConfig) -> tuple[Loaded, list[dict[str, Any]]]:
    loaded = _load(config)
    refuse_other_heads(loaded, config.model)
    return loaded, _examples(config, loaded)


def _load(config: FinetuneConfig) -> Loaded:
    """The model; a checkpoint without a classification head gets one for the labels that the data
    holds.
    """
    if (
        config.task != "classification"
        or config.num_labels is not None
        or is_classifier(config.model)
    ):
        return load_model(
            config.model, config.task, num_labels=config.num_labels, dtype=config.dtype
        )
    rows = load_rows(
        config.data, where=config.where, max_rows=config.max_rows, columns=[config.label_column]
    )
    values = sorted(set(rows[config.label_column]), key=lambda v: (str(type(v)), v))
    named = not all(isinstance(v, int) for v in values)
    loaded = load_model(
        config.model,
        config.task,
        num_labels=len(values) if named else max(1, *values) + 1,
        dtype=config.dtype,
    )
    if named:
        loaded.model.config.id2label = {i: str(v) for i, v in enumerate(values)}
        loaded.model.config.label2id = {str(v): i for i, v in enumerate(values)}
    return loaded


def _examples(config: FinetuneConfig, loaded: Loaded) -> list[dict[str, Any]]:
    label = config.label_column if loaded.task == "classification" else None
    if (
        "max_length" in config.model_fields_set
        and config.max_length > (most := loaded.context)
        and is_main()
    ):
        logger.warning(
            "max_length: the model sees %d tokens, so rows are cut there and not at %d",
            most,
            config.max_length,
        )
    columns = [config.text_column, *([label] if label else [])]
    rows = load_rows(config.data, where=config.where, max_rows=config.max_rows, columns=columns)
    return encode_rows(
        rows,
        loaded,
        text=config.text_column,
        label=label,
        max_length=config.max_length,
        pack=config.pack,
    )


def with_lora(loaded: Loaded, lora: LoraSettings, name: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    modules = lora.target_modules
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
        task_type=TaskType.SEQ_CLS if loaded.task == "classification" else TaskType.CAUSAL_LM,
        fan_in_fan_out=loaded.model.config.model_type
        == "gpt2",  # its layers store weights transposed
    )
    try:
        model = get_peft_model(loaded.model, settings)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    # What the adapter will be loaded on: the Hub id as given, or a folder from wherever one stands.
    settings, (repo, _, revision) = model.peft_config["default"], name.partition("@")
    settings.base_model_name_or_path = repo if is_hub_id(name) else str(loaded.path.resolve())
    settings.revision = (
        commit_in(name, loaded.path) or (revision if is_hub_id(name) else None) or None
    )
    return model
