"""Continuations of prompts, drawn in batches of prompts of equal length."""

from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.generation.nucleus import Keys, pick
from mergekit_bayes.libraries import call_tokenizers, outputs_of, token_ids
from mergekit_bayes.ranks import spread, world
from mergekit_bayes.records import Progress, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sampling(Record):
    """How continuations are drawn. These settings move the numbers more than most methods do.

    Attributes:
        continuations: Number of continuations of each prompt.
        new_tokens: Largest number of tokens of a continuation; EOS ends it earlier.
        top_p: The nucleus: the fewest tokens whose probabilities reach this sum are kept.
        temperature: Divides the logits.
        seed: Seed of the noise.
    """

    continuations: int = Field(default=25, ge=1)
    new_tokens: int = Field(default=20, ge=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**64)


class Samples(NamedTuple):
    """Continuations by prompt, without the prompt's text."""

    texts: list[list[str]]
    tokens: list[list[int]]  # the number of tokens drawn, EOS not counted
    shortened: int  # prompts whose front did not fit into the model's context
    ids: Sequence[list[list[int]]] = ()  # the tokens drawn


def sample_continuations(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    start: int,
    context: int,
    sampling: Sampling,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Samples:
    """Draw continuations from the nucleus by the Gumbel-max trick, with separate noise per token.

    The noise of a token depends on the seed, the prompt's and the continuation's number, the
    position and the token, never on the model or the batch. Where two models nearly agree about the
    next token, they nearly always draw the same one. The noise belongs to the place of a prompt in
    the list, so that equal prompts differ; the same prompts in another order are drawn anew.

    Args:
        model: A causal language model in eval mode, with a key-value cache.
        tokenizer: Its tokenizer.
        prompts: Each is the beginning of a document, so `start` comes before it.
        start: The token that a document starts from.
        context: The model's context in tokens. A prompt that does not leave room for `new_tokens`
            loses its front.
        sampling: How to draw.
        batch_size: Sequences drawn together. It does not change what is drawn, up to rounding of
            the logits.
        progress: Called with (continuations drawn, continuations in all).

    Several ranks (`ranks.spread`) share the batches, and each gets all continuations.

    Raises:
        ConfigError: There is no prompt, or the context has no room for the new tokens.
        CheckpointError: The model's probabilities are not numbers.
    """
    room = room_for_prompts(context, sampling.new_tokens)
    if not prompts:
        raise ConfigError("there is no prompt to continue.")
    options = {"add_special_tokens": False, "verbose": False}
    encoded = token_ids(
        model, lambda: [[start, *tokenizer(p, **options)["input_ids"]] for p in prompts]
    )
    shortened = sum(len(ids) > room for ids in encoded)
    encoded = [ids[-room:] for ids in encoded]
    stops = torch.tensor(sorted(_stops(model, tokenizer)), dtype=torch.long)

    total = len(prompts) * sampling.continuations
    done = 0

    def draw(group: list[_Rows]) -> list[Tensor]:
        nonlocal done
        ids = torch.tensor([encoded[rows.prompt] for rows in group])
        keys = np.concatenate([_keys(rows, sampling) for rows in group])
        counts = [rows.last - rows.first for rows in group]
        tokens = _draw(model, ids, torch.tensor(counts), keys, sampling, stops)
        done += len(tokens)
        if progress is not None:
            progress(min(done * world(), total), total)
        return list(torch.split(tokens, counts))

    groups = list(_groups(encoded, sampling.continuations, batch_size))
    drawn: list[list[Tensor]] = [[] for _ in prompts]
    for group, tokens in zip(groups, spread(groups, draw), strict=True):
        for rows, block in zip(group, tokens, strict=True):
            drawn[rows.prompt].append(block)

    texts, lengths, ids = [], [], []
    for blocks in drawn:
        continuations = [row[row >= 0].tolist() for row in torch.cat(blocks)]
        texts.append(
            call_tokenizers(
                "the tokenizer cannot decode",
                partial(tokenizer.batch_decode, continuations, skip_special_tokens=True),
            )
        )
        lengths.append([len(row) for row in continuations])
        ids.append(continuations)
    return Samples(texts, lengths, shortened, ids)


def write_texts(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    *,
    start: int,
    context: int,
    new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[str]:
    """Texts that a causal language model writes from its start token alone.

    Where nothing is known of the data of a model, its own text stands in for them. That holds for
    its own distribution only, which temperature 1 and the whole of it (`top_p` 1) give: a mean
    over such texts is then without bias the expectation under the model, of a KL divergence or of
    a curvature. A nucleus or a low temperature would leave out rare text, which a memory would
    then not hold. The model may write whatever it can, so filter the texts where that matters.

    The noise is that of `sample_continuations` for one empty prompt, so that a text depends on the
    seed, its number and the model: more texts, or longer ones, extend what fewer begin with.

    Args:
        model: A causal language model in eval mode, with a key-value cache.
        tokenizer: Its tokenizer.
        count: Number of texts, at least 1.
        start: The token that a document starts from.
        context: The model's context in tokens, which holds `start` and `new_tokens`.
        new_tokens: Tokens of a text at most; EOS ends it earlier, perhaps at once.
        temperature: Divides the logits.
        top_p: The nucleus, as in `Sampling`.
        seed: Seed of the noise.
        batch_size: Texts written together. It does not change them, up to rounding of the logits.
        progress: Called with (texts written, texts in all).

    Raises:
        ConfigError: The context has no room for the new tokens.
        CheckpointError: As `sample_continuations`.
    """
    sampling = Sampling(
        continuations=count,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    samples = sample_continuations(
        model,
        tokenizer,
        [""],
        start=start,
        context=context,
        sampling=sampling,
        batch_size=batch_size,
        progress=progress,
    )
    return samples.texts[0]


def room_for_prompts(context: int, new_tokens: int) -> int:
    """Tokens of the context that are left for a prompt.

    Raises:
        ConfigError: There are none.
    """
    room = context - new_tokens
    if room < 1:
        raise ConfigError(
            f"{new_tokens} new tokens do not fit into the model's context of {context}."
        )
    return room


class _Rows(NamedTuple):
    """Continuations `first` to `last` of one prompt."""

    prompt: int
    first: int
    last: int


def _groups(encoded: list[list[int]], continuations: int, batch_size: int) -> Iterator[list[_Rows]]:
    """Prompts of equal length together, so that nothing is padded.

    A prompt is split if it fills a batch alone.
    """
    group: list[_Rows] = []
    size = 0
    for prompt in sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i)):
        first = 0
        while first < continuations:
            if group and (
                size == batch_size or len(encoded[group[0].prompt]) != len(encoded[prompt])
            ):
                yield group
                group, size = [], 0
            last = min(continuations, first + batch_size - size)
            group.append(_Rows(prompt, first, last))
            size, first = size + last - first, last
    if group:
        yield group


def _keys(rows: _Rows, sampling: Sampling) -> Keys:
    """(continuations, new_tokens) random integers from seed, prompt, continuation and position."""
    counters = [(rows.prompt << 32) | i for i in range(rows.first, rows.last)]
    streams = [np.random.Philox(key=np.array([sampling.seed, c], np.uint64)) for c in counters]
    return np.stack([s.random_raw(sampling.new_tokens) for s in streams])


def _stops(model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that end a continuation, by the tokenizer and by the model's own settings."""
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        return stops
    named = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and 0 <= token < 2**31 for token in named):
        raise CheckpointError(
            f"the model's generation config: eos_token_id is {shown(eos)}, expected a token's "
            "number, or a list of them."
        )
    return stops | set(named)


def _last_only(model: torch.nn.Module) -> dict[str, int]:
    """The argument for logits of the last position alone, where a model takes it."""
    takes = "logits_to_keep" in signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


@torch.inference_mode()
def _draw(
    model: torch.nn.Module,
    ids: Tensor,
    counts: Tensor,
    keys: Keys,
    sampling: Sampling,
    stops: Tensor,
) -> Tensor:  # (sum of counts, new_tokens), -1 from the end of a continuation on
    device = next(model.parameters()).device
    result = torch.full(keys.shape, -1, dtype=torch.long)
    alive = torch.arange(len(keys))  # rows of `result` that are still in the cache
    # A prompt is read once; its continuations share its part of the cache.
    # All ones: nothing is padded, but a prompt may contain the padding token (which is often EOS).
    output = outputs_of(
        model,
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids, device=device),
        use_cache=True,
        **_last_only(model),
    )
    cache: Any = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_select_indices"):
        raise CheckpointError(
            "the model gives no key-value cache, without which no continuations are drawn here."
        )
    owners = torch.repeat_interleave(torch.arange(len(ids)), counts).to(device)
    cache.batch_select_indices(owners)
    logits = output.logits[:, -1].index_select(0, owners)
    for step in range(keys.shape[1]):
        tokens = pick(
            logits.float() / sampling.temperature, keys[alive.numpy(), step], sampling.top_p
        )
        going = ~torch.isin(tokens, stops)
        result[alive[going], step] = tokens[going]
        if not going.all():
            keep = going.nonzero().flatten()
            alive, tokens = alive[keep], tokens[keep]
            cache.batch_select_indices(keep.to(device))
        if step + 1 == keys.shape[1] or not len(alive):
            break
        seen = torch.ones((len(alive), ids.shape[1] + step + 1), dtype=torch.long, device=device)
        output = outputs_of(
            model,
            input_ids=tokens[:, None].to(device),
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
    return result
