"""Load a checkpoint, or an adapter on its base, with its tokenizer.

The task decides what one observation is: one scored token for a causal language model (the first
token of a row is context only), one row for a classifier.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.libraries import call, embedding_rows, longest_text, token_ids
from mergekit_bayes.models.devices import SPREAD, choose_device
from mergekit_bayes.models.limits import ADAPTER_CONFIG
from mergekit_bayes.models.pretrained import (
    base_of,
    load_adapter,
    load_adapter_config,
    load_config,
    load_tokenizer,
    load_weights,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Task = Literal["auto", "causal-lm", "classification"]
Dtype: TypeAlias = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    Field(
        description="Dtype of the parameters while the model runs: float32, bfloat16, float16, or "
        "auto for the file's."
    ),
]
UNIT: dict[str, Literal["token", "example"]] = {"causal-lm": "token", "classification": "example"}
_TRIED = 7  # tokens of the text that a loaded model is tried on
_COUNT_FROM_PAD = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer, and the numbers that running it needs.

    Attributes:
        model: The model, with an adapter around it where the checkpoint is one.
        tokenizer: Its tokenizer; it has a padding token.
        task: `causal-lm` or `classification`, never `auto`.
        path: The local folder that the checkpoint was read from.
    """

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    task: str
    path: Path

    @cached_property
    def start(self) -> int:
        """The token that a document starts from: BOS, or EOS where there is no BOS.

        Raises:
            CheckpointError: The tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise CheckpointError(
            "the tokenizer has neither a BOS nor an EOS token, so a document cannot be started."
        )

    @cached_property
    def context(self) -> int:
        """The largest number of tokens that the model can read at once.

        Raises:
            CheckpointError: The config or the tokenizer gives less than two.
        """
        config, tokens = self.model.config, None
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            positions = getattr(config, name, None)
            if isinstance(positions, int) and positions != -1:  # XLNet's, which has no limit
                # These architectures count positions from the padding index + 1.
                shifted = config.model_type in _COUNT_FROM_PAD
                tokens = positions - (config.pad_token_id + 1 if shifted else 0)
                break
        if tokens is None:
            tokens = longest_text(self.tokenizer, 2048)
        if tokens < 2:
            raise CheckpointError(
                f"'{self.path}': its context is {tokens} tokens, expected at least 2. Take the "
                "config that belongs to the model."
            )
        return tokens

    @cached_property
    def pad(self) -> int:
        """The token that fills the short rows of a batch."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def device(self) -> "torch.device":
        """Where the model's first parameter lies at this moment."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> str:
        """Type of the model's first parameter, by torch's name: `float32`."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def move_to(self, device: str | None) -> None:
        """Move the model to a device, by `devices.choose_device`, and try it there.

        One that was loaded over several devices, for `auto`, stays where it is.

        Raises:
            ConfigError: There is no such device here.
            CheckpointError: As `try_out`.
        """
        if device != SPREAD:
            self.model.to(choose_device(device))
        self.try_out()

    def try_out(self) -> None:
        """Run the model on a few tokens: a config may describe what loads, but does not run.

        Raises:
            CheckpointError: It fails, or its outputs are not those of its task.
        """
        import torch

        if getattr(self.model, "is_loaded_in_4bit", False) and self.device.type == "cpu":
            return  # a pass without gradients packs such weights for ever, and no later one has any
        (ids,) = token_ids(self.model, lambda: [self.tokenizer("a")["input_ids"]])
        tokens = torch.tensor([((ids or [0]) * _TRIED)[: min(_TRIED, self.context)]]).to(
            self.device
        )
        with torch.no_grad():  # what a model keeps of a pass may be trained with
            output = call(
                f"'{self.path}': the model cannot be run",
                lambda: self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)),
                "Take the config that belongs to the model.",
            )
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.ndim != (
            2 if self.task == "classification" else 3
        ):
            raise CheckpointError(
                f"'{self.path}': the model gives no logits for {self.task}. Take the config that "
                "belongs to the model."
            )


def load_model(
    ref: str,
    task: Task = "auto",
    *,
    num_labels: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    is_spread: bool = False,
) -> Loaded:
    """Load a checkpoint, or a PEFT adapter on its base.

    Args:
        ref: A local folder or `org/name[@revision]`.
        task: `auto` reads it off the architecture: a sequence classifier, or else a causal language
            model.
        num_labels: Number of labels, for a classifier whose checkpoint has no head yet.
        dtype: Type of the parameters; `auto` keeps that of the file.
        trust_remote_code: Run Python code of the folder, or of the base's, where it needs any.
        is_spread: Load its layers on all GPUs that there are, by accelerate's `device_map="auto"`.

    Raises:
        CheckpointError: There is no such model, transformers cannot load it, or it needs code of
            its own.
        ConfigError: An encoder is to be run as a causal language model.
    """
    path = resolve(ref, CHECKPOINT)
    if path.is_file():
        raise CheckpointError(
            f"'{ref}' is a file; running a model needs the folder with its config and tokenizer."
        )
    if (path / ADAPTER_CONFIG).exists():
        return _load_adapter(path, task, num_labels, dtype, trust_remote_code, is_spread)
    loaded = _load_checkpoint(ref, path, task, num_labels, dtype, trust_remote_code, is_spread)
    _complete_tokenizer(ref, loaded)
    return loaded


def is_classifier(ref: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint already has a classification head, or is an adapter for one.

    Raises:
        CheckpointError: There is no such model, or its config cannot be read.
    """
    path = resolve(ref, CHECKPOINT)
    if (path / ADAPTER_CONFIG).exists():
        return bool(load_adapter_config(path).task_type == "SEQ_CLS")
    return _has_classification_head(load_config(path, trust_remote_code=trust_remote_code))


def other_head(loaded: Loaded) -> str | None:
    """The outputs and the problem of a classifier that does not choose one label of two or more.

    None for a classifier that does, and for a language model.
    """
    if loaded.task != "classification":
        return None
    config = loaded.model.config
    problem = getattr(config, "problem_type", None)
    if problem in (None, "single_label_classification") and config.num_labels >= 2:
        return None
    return f"{config.num_labels} output(s) for {problem or 'regression'}"


def _load_checkpoint(
    ref: str,
    path: Path,
    task: Task,
    num_labels: int | None,
    dtype: str,
    trust_remote_code: bool,
    is_spread: bool,
) -> Loaded:
    import transformers

    config = load_config(path, trust_remote_code=trust_remote_code)
    if task == "auto":
        task = "classification" if _has_classification_head(config) else "causal-lm"
    if task == "classification":
        _refuse_other_labels(config, ref, num_labels)
        auto = transformers.AutoModelForSequenceClassification
    else:
        _refuse_encoder_decoder(config, ref)
        _refuse_encoder(config, ref)
        auto = transformers.AutoModelForCausalLM
    model, missing = load_weights(
        auto,
        path,
        dtype=dtype,
        num_labels=num_labels,
        trust_remote_code=trust_remote_code,
        is_spread=is_spread,
    )
    if task != "classification" or _has_classification_head(config):  # else a new head is meant
        _warn_of_missing(ref, missing)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return Loaded(model.eval(), tokenizer, task, path)


def _refuse_encoder_decoder(config: "PretrainedConfig", ref: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"'{ref}' is an encoder-decoder ({config.model_type}). It can be merged, inspected and "
            "pushed; training, precisions and evaluation are for causal language models and "
            "sequence classifiers."
        )


def _refuse_other_labels(config: "PretrainedConfig", ref: str, num_labels: int | None) -> None:
    """Refuse another number of labels than the trained head has; a new head is no accident."""
    if num_labels is None or not _has_classification_head(config):
        return
    if config.num_labels != num_labels:
        raise ConfigError(
            f"num_labels {num_labels}: '{ref}' has a head for {config.num_labels} labels already. "
            "Leave num_labels out, or name a model without a head."
        )


def _load_adapter(
    path: Path,
    task: Task,
    num_labels: int | None,
    dtype: str,
    trust_remote_code: bool,
    is_spread: bool,
) -> Loaded:
    # The labels of a classifier, and how they are read, are in the config that a fine-tune leaves
    # beside its adapter.
    labels = None
    if (path / "config.json").exists():
        labels = load_config(path, trust_remote_code=trust_remote_code)
        if num_labels is None:
            num_labels = labels.num_labels
    config = load_adapter_config(path)
    if task == "auto":
        task = "classification" if config.task_type == "SEQ_CLS" else "causal-lm"
    base = load_model(
        base_of(path, config),
        task,
        num_labels=num_labels,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        is_spread=is_spread,
    )
    if labels is not None:
        base.model.config.id2label, base.model.config.label2id = labels.id2label, labels.label2id
        if labels.problem_type is not None:
            base.model.config.problem_type = labels.problem_type
    model = load_adapter(base.model, path, config)
    return Loaded(model.eval(), base.tokenizer, base.task, path)


def _has_classification_head(config: "PretrainedConfig") -> bool:
    return any(name.endswith("ForSequenceClassification") for name in _architectures(config))


def _architectures(config: "PretrainedConfig") -> list[str]:
    """The names of a config's architectures; none where it holds something else."""
    names = config.architectures
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _warn_of_missing(ref: str, missing: Sequence[str]) -> None:
    """Say which parameters a checkpoint lacks: they are random, and the model is another one."""
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        logger.warning(
            "'%s' does not hold %s%s: the values were made up on loading",
            ref,
            ", ".join(missing[:3]),
            more,
        )


def _refuse_encoder(config: "PretrainedConfig", ref: str) -> None:
    """Refuse a model that looks both ways; transformers runs BERT's family as it was asked to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # XLM has a name of its own for it. Models that only look back have neither and need none.
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return
    names = _architectures(config)
    is_masked = any(name.endswith("ForMaskedLM") for name in names)
    if is_masked or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ConfigError(
            f"'{ref}' is an encoder ({names[0] if names else config.model_type}), which sees the "
            "token that it predicts when it is run as a causal language model. Fine-tuning, "
            "precisions and evaluation of an encoder are those of a classifier on it: name one "
            "that has its head, or make one with `bmerge finetune` (task: classification)."
        )


def _complete_tokenizer(ref: str, loaded: Loaded) -> None:
    """Give the tokenizer and the config a padding token; refuse an empty tokenizer."""
    tokenizer, config = loaded.tokenizer, loaded.model.config
    # Where there are no files, transformers makes a tokenizer of special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise CheckpointError(
            f"'{ref}' has no tokenizer, or an empty one. Save that of its base there: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)."
        )
    rows = embedding_rows(loaded.model)
    pad = tokenizer.pad_token_id
    if pad is None or (rows is not None and pad >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(tokenizer, f"{name}_id")
        if rows is not None and number is not None and number >= rows:
            raise CheckpointError(
                f"'{ref}': the tokenizer's {name} is {shown(getattr(tokenizer, name))}, token "
                f"{number:,}, but the model's embedding has {rows:,} rows (tokens 0 to "
                f"{rows - 1:,}). Use the tokenizer that belongs to the model."
            )
    if getattr(config, "pad_token_id", None) is None:  # some configs have no such key
        config.pad_token_id = tokenizer.pad_token_id
