"""From a path or Hub id to a model, and from files of text to batches of it.

What one observation is follows from the task: one scored token of a causal language model (the
first token of a row is context only), one row of a classifier.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from mergekit_bayes.checkpoint.sources import CHECKPOINT, is_hub_id, resolve
from mergekit_bayes.errors import CheckpointError, ConfigError

Task = Literal["auto", "causal-lm", "classification"]
UNIT: dict[str, Literal["token", "example"]] = {"causal-lm": "token", "classification": "example"}


class Loaded(NamedTuple):
    """A model in eval mode with its tokenizer; `task` is never `auto`, `path` the local folder."""

    model: Any
    tokenizer: Any
    task: str
    path: Path


def load_model(
    ref: str, task: Task = "auto", *, num_labels: int | None = None, dtype: str = "float32"
) -> Loaded:
    """Load a checkpoint, or a PEFT adapter on its base, without remote code.

    Args:
        ref: A local folder or `org/name[@revision]`.
        task: `auto` reads the architecture: a sequence classifier, else a causal language model.
        num_labels: For a classifier whose checkpoint has no head yet.
        dtype: Of the parameters, or `auto` for the file's own.

    Raises:
        CheckpointError: There is no such model, or transformers cannot load it.
        ConfigError: A masked language model, and no task.
    """
    import transformers
    from safetensors import SafetensorError

    path = resolve(ref, CHECKPOINT)
    if path.is_file():
        raise CheckpointError(
            f"'{ref}' is a file; running a model needs the folder with its config and tokenizer."
        )
    try:
        if (path / "adapter_config.json").exists():
            return _load_adapter(path, task, num_labels, dtype)
        config = transformers.AutoConfig.from_pretrained(path)
        if task == "auto":
            task = "classification" if _classifies(config) else "causal-lm"
            _refuse_masked(config, ref)
        options: dict[str, Any] = {"dtype": dtype}
        if num_labels is not None:
            options["num_labels"] = num_labels
        kind = (
            transformers.AutoModelForSequenceClassification
            if task == "classification"
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"'{ref}': transformers cannot load it ({reason}).") from None
    if len(tokenizer) <= len(
        set(tokenizer.all_special_ids)
    ):  # what transformers makes where there are no files
        raise CheckpointError(
            f"'{ref}' has no tokenizer, or an empty one. Save that of its base there: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Loaded(model.eval(), tokenizer, task, path)


def _load_adapter(path: Path, task: Task, num_labels: int | None, dtype: str) -> Loaded:
    import transformers
    from peft import PeftConfig, PeftModel

    # A classifier's labels lie in the config that a fine-tune leaves beside its adapter.
    labels = (
        transformers.AutoConfig.from_pretrained(path) if (path / "config.json").exists() else None
    )
    if num_labels is None and labels is not None:
        num_labels = labels.num_labels
    config = PeftConfig.from_pretrained(path)
    found: Task = "classification" if config.task_type == "SEQ_CLS" else "causal-lm"
    name = str(config.base_model_name_or_path)
    if config.revision and is_hub_id(name):
        name = f"{name}@{config.revision}"
    base = load_model(name, found if task == "auto" else task, num_labels=num_labels, dtype=dtype)
    if labels is not None:
        base.model.config.id2label, base.model.config.label2id = labels.id2label, labels.label2id
    # Trainable, so that a precision can be estimated for the adapter's parameters.
    model = PeftModel.from_pretrained(base.model, path, is_trainable=True)
    return Loaded(model.eval(), base.tokenizer, base.task, path)


def is_classifier(ref: str) -> bool:
    """True if a checkpoint already has a classification head, or is an adapter for one.

    Raises `CheckpointError` if there is no such model or its config cannot be read.
    """
    import transformers
    from peft import PeftConfig

    path = resolve(ref, CHECKPOINT)
    try:
        if (path / "adapter_config.json").exists():
            return bool(PeftConfig.from_pretrained(path).task_type == "SEQ_CLS")
        return _classifies(transformers.AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"'{ref}': its config cannot be read ({str(error).splitlines()[0]})."
        ) from None


def _classifies(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def other_head(loaded: Loaded) -> str | None:
    """The outputs and problem of a classifier that does not tell one label out of two or more; None
    for others.
    """
    if loaded.task != "classification":
        return None
    kind, outputs = (
        getattr(loaded.model.config, "problem_type", None),
        loaded.model.config.num_labels,
    )
    if kind in (None, "single_label_classification") and outputs >= 2:
        return None
    return f"{outputs} output(s) for {kind or 'regression'}"


def _refuse_masked(config: Any, ref: str) -> None:
    for name in config.architectures or ():
        if name.endswith("ForMaskedLM"):
            raise ConfigError(
                f"'{ref}' is a masked language model ({name}), which sees the token that it "
                "predicts when it is run as "
                "a causal one. Name the task: classification (with a number of labels, for a new "
                "head) or causal-lm."
            )
