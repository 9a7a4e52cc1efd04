"""From a path or Hub id to a model, and from files of text to batches of it.

What one observation is follows from the task: one scored token of a causal language model (the first token of a
row is context only), one row of a classifier.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.sources import CHECKPOINT, is_hub_id, resolve

Task = Literal["auto", "causal-lm", "classification"]
UNIT: dict[str, Literal["token", "example"]] = {"causal-lm": "token", "classification": "example"}
T = TypeVar("T")
IGNORED = -100  # a label that no loss counts, transformers' convention


class Loaded(NamedTuple):
    """A model in eval mode with its tokenizer; `task` is never `auto`, `path` the local folder."""

    model: Any
    tokenizer: Any
    task: str
    path: Path


def load_model(ref: str, task: Task = "auto", *, num_labels: int | None = None, dtype: str = "float32") -> Loaded:
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
        raise CheckpointError(f"'{ref}' is a file; running a model needs the folder with its config and tokenizer.")
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
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes where there are no files
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
    labels = transformers.AutoConfig.from_pretrained(path) if (path / "config.json").exists() else None
    if num_labels is None and labels is not None:
        num_labels = labels.num_labels
    config = PeftConfig.from_pretrained(path)
    found: Task = "classification" if config.task_type == "SEQ_CLS" else "causal-lm"
    name = str(config.base_model_name_or_path)
    if config.revision and is_hub_id(name):
        name = f"{name}@{config.revision}"
    base = load_model(name, found if task == "auto" else task, num_labels=num_labels,
                      dtype=dtype)  # fmt: skip
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
        raise CheckpointError(f"'{ref}': its config cannot be read ({str(error).splitlines()[0]}).") from None


def _classifies(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def other_head(loaded: Loaded) -> str | None:
    """The outputs and problem of a classifier that does not tell one label out of two or more; None for others."""
    if loaded.task != "classification":
        return None
    kind, outputs = getattr(loaded.model.config, "problem_type", None), loaded.model.config.num_labels
    if kind in (None, "single_label_classification") and outputs >= 2:
        return None
    return f"{outputs} output(s) for {kind or 'regression'}"


def _refuse_masked(config: Any, ref: str) -> None:
    for name in config.architectures or ():
        if name.endswith("ForMaskedLM"):
            raise ConfigError(
                f"'{ref}' is a masked language model ({name}), which sees the token that it predicts when it is run as "
                "a causal one. Name the task: classification (with a number of labels, for a new head) or causal-lm."
            )


def start_token(tokenizer: Any) -> int:
    """The token from which a document starts: BOS, else EOS.

    Raises `CheckpointError` if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CheckpointError("the tokenizer has neither a BOS nor an EOS token, so a document cannot be started.")


def checkpoint_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in memory to the same by the names that `save_pretrained` gives them.

    PEFT drops the adapter's name; mixture-of-experts models stack on loading what the file holds apart, which is
    fine for diagonal precisions, since it only splits and permutes.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, state_dict=dict(tensors)))
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def load_rows(
    refs: str | Sequence[str],
    *,
    where: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    columns: Sequence[str] = (),
) -> Any:
    """Rows of text as one `datasets.Dataset`.

    Args:
        refs: JSONL or JSON (`.gz` too), CSV, Parquet or plain text files, a folder that `datasets` can load, or
            Hub data sets (their `train` split). A file named twice counts twice.
        where: Keeps rows whose columns equal these values (or are in a list of them).
        max_rows: At most so many, from the front.
        columns: Columns that must be there; the others are dropped.

    Raises:
        CheckpointError: A file that cannot be read.
        MismatchError: A column that is not there, or no row left.
    """
    from datasets import concatenate_datasets

    names = [refs] if isinstance(refs, str) else list(refs)
    if not names:
        raise ConfigError("no data was named.")
    parts = []
    for name in names:
        part = _load_one(name)
        wanted = [*columns, *(where or {})]
        for column in wanted:
            if column not in part.column_names:
                raise MismatchError(f"'{name}' has no column '{column}'; it has {', '.join(part.column_names)}.")
        if where:
            keep = [i for i, row in enumerate(part.select_columns(list(where))) if _matches(row, where)]
            part = part.select(keep)
        parts.append(part.select_columns(list(columns)) if columns else part)
    rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if not len(rows):
        raise MismatchError(f"no row of {', '.join(names)} is left{f' where {dict(where)}' if where else ''}.")
    return rows


def _matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(row[k] in v if isinstance(v, (list, tuple)) else row[k] == v for k, v in where.items())


_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def _load_one(name: str) -> Any:
    from datasets import load_dataset

    path = Path(name).expanduser()
    try:
        if path.is_file():
            suffix = Path(path.name.removesuffix(".gz")).suffix
            if suffix not in _LOADERS:
                raise CheckpointError(f"'{name}': expected one of {', '.join(_LOADERS)} (.gz too), or a folder.")
            return load_dataset(_LOADERS[suffix], data_files=str(path), split="train")
        if path.is_dir():
            return load_dataset(str(path), split="train")
        if is_hub_id(name) and not name.endswith(tuple(_LOADERS)):
            repo, _, revision = name.partition("@")
            return load_dataset(repo, split="train", revision=revision or None)
    except CheckpointError:
        raise
    except Exception as error:  # datasets wraps whatever its readers raise
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"'{name}': datasets cannot read it ({type(error).__name__}: {reason}).") from None
    raise CheckpointError(f"'{name}': no such file or folder, and not a Hub data set.")


def encode_rows(
    rows: Any,
    loaded: Loaded,
    *,
    text: str = "text",
    label: str | None = None,
    max_length: int = 512,
    pack: bool = False,
) -> list[dict[str, Any]]:
    """Tokenise rows into examples of Python lists, ready for `collate`.

    A language model's row is its start token, the text and EOS, cut at `max_length`; with `pack`, rows joined by
    EOS are cut into blocks of `max_length`, so that nothing is lost. A classifier's row is what its tokenizer
    makes of it, with an integer `labels` if `label` names a column.
    """
    tokenizer, texts = loaded.tokenizer, [str(t) for t in rows[text]]
    max_length = min(max_length, context_length(loaded))
    if loaded.task == "classification":
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        examples = [{"input_ids": ids} for ids in encoded["input_ids"]]
        if label is not None:
            for example, value in zip(examples, label_ids(rows[label], loaded.model, label), strict=True):
                example["labels"] = value
        return examples
    start, end = start_token(tokenizer), tokenizer.eos_token_id
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ending = [] if end is None else [end]
    if not pack:
        documents = [([start, *i, *ending])[:max_length] for i in ids]
        return [{"input_ids": d, "labels": d} for d in documents if len(d) > 1]
    stream = [t for i in ids for t in (*i, *ending)]
    step = max_length - 1  # a block starts with the token before it, so that every token is scored once
    stream = [start, *stream]
    blocks = [stream[i : i + step + 1] for i in range(0, len(stream) - 1, step)]
    return [{"input_ids": b, "labels": b} for b in blocks]


def label_ids(values: Sequence[Any], model: Any, column: str) -> list[int]:
    """Labels as the classifier's own numbers: numbers of its range, or its names.

    Raises `MismatchError` for a label that it does not know; `column` names them in the message.
    """
    known = {str(k): int(v) for k, v in (model.config.label2id or {}).items()}
    result = []
    for value in values:
        found = known.get(str(value), value if isinstance(value, int) else None)
        if found is None or not 0 <= int(found) < model.config.num_labels:
            raise MismatchError(
                f"label {value!r} in column '{column}': the model knows {', '.join(known) or 'none'} "
                f"(or 0 to {model.config.num_labels - 1})."
            )
        result.append(int(found))
    return result


def context_length(loaded: Loaded) -> int:
    """How many tokens the model can see."""
    config = loaded.model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(value := getattr(config, name, None), int):
            # RoBERTa counts positions from its padding index + 1.
            shift = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
            return value - shift
    return int(min(loaded.tokenizer.model_max_length, 2048))


def observations(examples: Sequence[Mapping[str, Any]], task: str) -> int:
    """How many observations a set of examples holds: scored tokens, or rows."""
    if task == "classification":
        return len(examples)
    return sum(len(e["input_ids"]) - 1 for e in examples)


class Collate:
    """Pad examples on the right into a batch of tensors; padding is neither attended to nor scored.

    Nor is a row's first token, which nothing predicts: the Trainer would count it for GPT-2 and others whose class
    names tell transformers no loss, and the loss would be divided by too many.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        length = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), length), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for i, e in enumerate(examples):
            n = len(e["input_ids"])
            ids[i, :n] = torch.tensor(e["input_ids"])
            mask[i, :n] = 1
            if isinstance(e.get("labels"), list):
                labels[i, 1:n] = torch.tensor(e["labels"][1:])
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in examples[0]:
            rows = not isinstance(examples[0]["labels"], list)
            batch["labels"] = torch.tensor([e["labels"] for e in examples]) if rows else labels
        return batch


def with_bar(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The same items under a bar on stderr, unless `hushed`."""
    from transformers.utils.logging import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, total=total)
    return bar


@contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """No progress bars and no warnings of transformers and datasets inside, if `quiet`; errors still show."""
    import datasets
    from transformers.utils import logging

    if not quiet:
        yield
        return
    shown, shown_rows = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled() is False
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
        if shown_rows:
            datasets.enable_progress_bars()


def batches(
    examples: Sequence[Mapping[str, Any]], size: int, collate: Collate, *, device: Any = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Consecutive batches of `size` examples on a device."""
    for i in range(0, len(examples), size):
        yield {k: v.to(device) for k, v in collate(examples[i : i + size]).items()}
