"""Recognise the card that PEFT writes beside an adapter, as long as no user has edited it."""

import re
from pathlib import Path

from mergekit_bayes.hub.front_matter import split_card

_VERSION = re.compile(r"^- PEFT \S+$", re.M)  # in the last section of PEFT's card
_FIELDS = {"base_model", "library_name", "pipeline_tag", "tags"}
_ADDED_LINE = re.compile(
    r"### Framework versions|- PEFT \S+|## Training procedure"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (?:quant_method|_?load_in_[48]bit|llm_int8_\w+|bnb_4bit_\w+): .*"
)


def is_generated(card: str) -> bool:
    """Whether a card is PEFT's own: each line is of its template, each field one that it writes."""
    if not _VERSION.search(card):
        return False
    try:
        fields, text = split_card(card)
    except ValueError:
        return False
    if not set(fields) <= _FIELDS:
        return False
    template = _template_lines()
    lines = (line.strip() for line in text.splitlines())
    return all(not line or line in template or _ADDED_LINE.fullmatch(line) for line in lines)


def _template_lines() -> set[str]:
    """The lines of the Hub client's empty model card, which PEFT fills in and extends."""
    from huggingface_hub import ModelCard

    text = Path(ModelCard.default_template_path).read_text(encoding="utf-8")
    filled = re.sub(r'\{\{ \w+ \| default\("([^"]*)", true\) ?\}\}', r"\1", text)
    return {line.strip() for line in filled.splitlines()}
