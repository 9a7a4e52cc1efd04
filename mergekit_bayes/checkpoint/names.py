"""Which tensors are buffers and which have one row a token, judged by their names."""

import re

# Constants that some checkpoints store (masks, position ids, rotary tables), which are not merged.
_BUFFER = re.compile(
    r"(^|\.)(position_ids|token_type_ids|masked_bias|inv_freq|original_inv_freq|num_batches_tracked)$"
    r"|(^|\.)attn\.bias$"
)
# Rows are tokens: embeddings, heads and their biases, as the field's architectures call them.
_VOCABULARY = re.compile(
    r"(^|\.)(wte|embed_tokens|embed_tokens_per_layer|embed_in|word_embeddings|shared|tok_embeddings"
    r"|lm_head|embed_out|output_layer|proj_out|generator_lm_head|predictions"
    r"|(predictions|lm_head)\.decoder)\.(weight|bias)$"
    r"|^((backbone|model)\.)?(embeddings|output)\.weight$"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that no optimizer moves, judged by its name."""
    return bool(_BUFFER.search(name))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token, judged by its name."""
    return bool(_VOCABULARY.search(name))
