"""Rows to batches of token ids, with labels and observation counts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.models.load import Loaded

IGNORED = -100  # a label that no loss counts, transformers' convention


def start_token(tokenizer: Any) -> int:
    """The token from which a document starts: BOS, else EOS.

    Raises `CheckpointError` if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CheckpointError(
        "the tokenizer has neither a BOS nor an EOS token, so a document cannot be started."
    )


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

    A language model's row is its start token, the text and EOS, cut at `max_length`; with `pack`,
    rows joined by EOS are cut into blocks of `max_length`, so that nothing is lost. A classifier's
    row is what its tokenizer makes of it, with an integer `labels` if `label` names a column.
    """
    tokenizer, texts = loaded.tokenizer, [str(t) for t in rows[text]]
    max_length = min(max_length, context_length(loaded))
    if loaded.task == "classification":
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        examples = [{"input_ids": ids} for ids in encoded["input_ids"]]
        if label is not None:
            for example, value in zip(
                examples, label_ids(rows[label], loaded.model, label), strict=True
            ):
                example["labels"] = value
        return examples
    start, end = start_token(tokenizer), tokenizer.eos_token_id
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ending = [] if end is None else [end]
    if not pack:
        documents = [([start, *i, *ending])[:max_length] for i in ids]
        return [{"input_ids": d, "labels": d} for d in documents if len(d) > 1]
    stream = [t for i in ids for t in (*i, *ending)]
    step = (
        max_length - 1
    )  # a block starts with the token before it, so that every token is scored once
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
                f"label {value!r} in column '{column}': the model knows "
                f"{', '.join(known) or 'none'} "
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
            shift = (
                config.pad_token_id + 1
                if config.model_type in ("roberta", "xlm-roberta", "camembert")
                else 0
            )
            return value - shift
    return int(min(loaded.tokenizer.model_max_length, 2048))


def observations(examples: Sequence[Mapping[str, Any]], task: str) -> int:
    """How many observations a set of examples holds: scored tokens, or rows."""
    if task == "classification":
        return len(examples)
    return sum(len(e["input_ids"]) - 1 for e in examples)


class Collate:
    """Pad examples on the right into a batch of tensors; padding is neither attended to nor scored.

    Nor is a row's first token, which nothing predicts: the Trainer would count it for GPT-2 and
    others whose class names tell transformers no loss, and the loss would be divided by too many.
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


def batches(
    examples: Sequence[Mapping[str, Any]], size: int, collate: Collate, *, device: Any = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Consecutive batches of `size` examples on a device."""
    for i in range(0, len(examples), size):
        yield {k: v.to(device) for k, v in collate(examples[i : i + size]).items()}
