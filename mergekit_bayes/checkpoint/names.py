"""What a tensor is, judged by its name: a buffer, rows of tokens, an output layer, a label head.

This is the only list of the field's names. Sources: the modules of the architectures in
transformers 5 and their `_tied_weights_keys`, ChatGLM, and Llama's own names.
"""

import re
from functools import lru_cache

_KEPT = 1 << 16  # names whose answer is kept: a plan asks for each of them again and again

# Constants that some checkpoints store (masks, position ids, rotary tables), which are not merged.
USUAL_HEAD = "lm_head.weight"  # of a model for causal language modelling
_BUFFER = re.compile(
    r"(^|\.)(position_ids|token_type_ids|masked_bias|inv_freq|original_inv_freq|num_batches_tracked)$"
    r"|(^|\.)attn\.bias$"
)

# Input embeddings with one row a token, wherever they are in a model.
_TOKEN_EMBEDDINGS = r"wte|embed_tokens|embed_in|word_embeddings?|shared|tok_embeddings|tokens_embed"
# Input embeddings whose name may also mean other things: only with these words before it.
_NAMED_EMBEDDINGS = r"((backbone|model|transformer|rwkv)\.)?embeddings|transformer\.w"
# Layers that score every token, and those of which the last layer does.
_TOKEN_HEADS = r"lm_head|embed_out|generator_lm_head|vocab_projector|lm_loss|pred_layer\.proj"
_DEEP_TOKEN_HEADS = (
    r"(lm_head|predictions|mlm_score|mlm_head|mmm_text_head|head)\.decoder|lm_head\.out_proj"
)
# The same, whose name means other things elsewhere: only at the beginning, or outside of layers.
_TOKEN_HEADS_AT_START = r"proj_out|decoder"
_TOKEN_HEADS_OUTSIDE = r"output_projection"
_OUTSIDE = r"^(?!(.*\.)?\d+\.)(.*\.)?"  # no number stands before the name

_TOKEN_EMBEDDING = re.compile(rf"(^|\.)({_TOKEN_EMBEDDINGS})\.weight$")
_OTHER_EMBEDDING = re.compile(r"(^|\.)embeddings\.weight$")
_TIED_HEAD = re.compile(
    rf"(^|\.)({_TOKEN_HEADS}|{_DEEP_TOKEN_HEADS})\.weight$"
    rf"|^({_TOKEN_HEADS_AT_START}|head)\.weight$"
    rf"|{_OUTSIDE}({_TOKEN_HEADS_OUTSIDE})\.weight$"
)
_VOCABULARY = re.compile(
    rf"(^|\.)({_TOKEN_EMBEDDINGS}|embed_tokens_per_layer|{_TOKEN_HEADS}|{_DEEP_TOKEN_HEADS}"
    r"|output_layer|shared_head\.head|predictions|mlm_head|mmm_text_head)\.(weight|bias)$"
    rf"|^({_NAMED_EMBEDDINGS}|(model\.)?output)\.weight$"
    rf"|^({_TOKEN_HEADS_AT_START})\.(weight|bias)$"
    rf"|{_OUTSIDE}({_TOKEN_HEADS_OUTSIDE})\.(weight|bias)$"
)
# Output layers, of which two models of one architecture may have different ones.
_OUTPUT_LAYER = re.compile(
    rf"(^|\.)({_TOKEN_HEADS}|{_TOKEN_HEADS_OUTSIDE}|generator_predictions|pred_layer|output_layer"
    r"|cls|predictions|mlm_score|mlm_head|mmm_text_head|head\.decoder|vocab_\w+|pooler|classifier"
    r"|pre_classifier|classification_head|score|qa_outputs|summary|sequence_summary|logits_proj"
    r"|v_head|value_head|reward_head|regression_head|multiple_choice_head)(?=\.|$)"
    rf"|^({_TOKEN_HEADS_AT_START}|head|output)(?=\.(weight|bias)$)"
)
# The last layer of a classifier, with one row a label.
_LABEL_HEAD = re.compile(
    r"(^|\.)(score|classifier|cls_classifier|classifier\.out_proj|classifier\.linear_out"
    r"|classification_head\.out_proj|logits_proj|sequence_summary\.summary)\.weight$"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that no optimizer moves, judged by its name."""
    return bool(_BUFFER.search(name))


@lru_cache(_KEPT)
def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token, judged by its name."""
    return bool(_VOCABULARY.search(name))


def is_token_embedding(name: str) -> bool:
    """Whether a tensor is an input embedding of tokens, by a name that means nothing else."""
    return bool(_TOKEN_EMBEDDING.search(name))


def may_be_token_embedding(name: str) -> bool:
    """Whether a tensor is an input embedding of tokens if a model has no other one."""
    return bool(_OTHER_EMBEDDING.search(name))


@lru_cache(_KEPT)
def may_be_tied_head(name: str) -> bool:
    """Whether a tensor is the weight of an output layer that may be the input embedding."""
    return bool(_TIED_HEAD.search(name))


def output_layer(name: str) -> str | None:
    """The name of the output layer that a tensor is of; None if it is of no output layer.

    What is in a numbered layer of a model is not at its output.
    """
    match = _OUTPUT_LAYER.search(name)
    if match is None or re.search(r"(^|\.)\d+(\.|$)", name):
        return None
    return name[: match.end()]


def is_label_head(name: str) -> bool:
    """Whether a tensor has one row per label of a classifier, judged by its name."""
    return bool(_LABEL_HEAD.search(name))
