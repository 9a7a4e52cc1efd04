"""A folder's model card (README.md): our front matter and section, beside the text of a user.

A card depends on the files of its folder alone: it has no date, and the same folder gives the same
card. What we write stands between two HTML comments, and the text around them is kept. The first
comment lists a digest of each field that we put into the front matter, so that the next card renews
a field of ours and keeps one that a user has changed since. A card that PEFT wrote is replaced if
no user has edited it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.hub.facts import read_facts
from mergekit_bayes.hub.folder import CARD, read_card
from mergekit_bayes.hub.front_matter import Fields, front_matter, join_card, split_card
from mergekit_bayes.hub.licenses import License, agreed_license
from mergekit_bayes.hub.markdown import one_line
from mergekit_bayes.hub.markdown import text as text_of
from mergekit_bayes.hub.parents import Parent
from mergekit_bayes.hub.sections import card_section
from mergekit_bayes.posterior.pooling import PosteriorForm

# What PEFT writes into the card beside an adapter, on top of the Hub client's template.
_PEFT_VERSION = re.compile(r"^- PEFT \S+$", re.MULTILINE)
_PEFT_FIELDS = {"base_model", "library_name", "pipeline_tag", "tags"}
_PEFT_LINE = re.compile(
    r"### Framework versions|- PEFT \S+|## Training procedure"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (?:quant_method|_?load_in_[48]bit|llm_int8_\w+|bnb_4bit_\w+): .*"
)
_END = "<!-- bmerge: end -->"
_BEGIN, _BEGUN = "<!-- bmerge: begin", " -->\n"


class Card(NamedTuple):
    """A model card.

    Attributes:
        text: The file's content.
        notes: What the user should know before publishing it.
    """

    text: str
    notes: tuple[str, ...]


class CardOptions(TypedDict, total=False):
    """The keywords of `make_card`."""

    repo: str | None
    existing: str | None
    licenses: Mapping[Parent, License | None] | None
    posterior: bool
    posterior_only: bool
    posterior_form: PosteriorForm


def model_card(folder: Path, **options: Unpack[CardOptions]) -> str:
    """The text of `make_card`, which documents the options."""
    return make_card(folder, **options).text


def make_card(
    folder: Path,
    *,
    repo: str | None = None,
    existing: str | None = None,
    licenses: Mapping[Parent, License | None] | None = None,
    posterior: bool = True,
    posterior_only: bool = False,
    posterior_form: PosteriorForm = "entries",
) -> Card:
    """Make the card of a model folder, of an adapter's, or of a folder with only a posterior.

    Args:
        folder: The folder. Nothing outside of it is read.
        repo: `org/name`, for the lines that say how to load the model (default: the folder's name).
        existing: The card whose other text is kept (default: the folder's README.md).
        licenses: Licence of each parent, as far as it is known.
        posterior: Describe the posterior too (default True).
        posterior_only: Describe only the posterior, without its model.
        posterior_form: The form in which the posterior is pushed.

    Raises:
        CheckpointError: The folder holds neither a model nor a precision, or a file of it cannot be
            read.
        ConfigError: The front matter of the existing card is not YAML.
    """
    name = repo or folder.resolve().name
    facts = read_facts(
        folder, name, posterior=posterior, only_posterior=posterior_only, form=posterior_form
    )
    user_fields, text, section = _user_part(folder, existing)
    if section is not None:
        digests = section.digests
        user_fields = {k: v for k, v in user_fields.items() if f"{k}={_digest(v)}" not in digests}
    fields, notes = front_matter(facts)
    if "license" not in user_fields:
        license_fields, license_notes = agreed_license(facts.parents, licenses or {})
        fields |= license_fields
        notes += license_notes
    our_fields = {k: v for k, v in fields.items() if k not in user_fields}
    digests_now = "".join(f" {k}={_digest(v)}" for k, v in our_fields.items())
    ours = f"<!-- bmerge: begin{digests_now} -->\n{card_section(facts)}\n{_END}"
    if section is not None:
        text = text[: section.start] + ours + text[section.end :]
    elif text.strip():
        text = f"{text.rstrip()}\n\n{ours}\n"
    else:
        text = f"# {text_of(facts.repo.rpartition('/')[2])}\n\n{ours}\n"
    return Card(join_card(user_fields | our_fields, text.lstrip()), (*facts.notes, *notes))


def is_generated(card: str) -> bool:
    """Whether a card is the one that PEFT writes beside an adapter, and no user has edited it.

    Each line is then of PEFT's template, and each field one that PEFT writes.
    """
    if not _PEFT_VERSION.search(card):
        return False
    try:
        fields, text = split_card(card)
    except ValueError:
        return False
    if not set(fields) <= _PEFT_FIELDS:
        return False
    template = _template_lines()
    lines = (line.strip() for line in text.splitlines())
    return all(not line or line in template or _PEFT_LINE.fullmatch(line) for line in lines)


class _Section(NamedTuple):
    """Where our section stands in a card, and the digests of our fields."""

    start: int
    end: int
    digests: tuple[str, ...]


def _find_section(text: str) -> _Section | None:
    """Our section in the text of a card; searched by plain text, in linear time."""
    start = text.find(_BEGIN)
    begun = text.find(_BEGUN, start)
    end = text.find(_END, begun)
    if min(start, begun, end) < 0:
        return None
    digests = text[start + len(_BEGIN) : begun]
    return _Section(start, end + len(_END), tuple(digests.split())) if ">" not in digests else None


def _user_part(folder: Path, existing: str | None) -> tuple[Fields, str, _Section | None]:
    """Fields and text of an existing card, and the place of our section in the text."""
    if existing is None and (folder / CARD).exists():
        contained(folder, CARD)
        existing = read_card(folder / CARD)
    if existing is None or is_generated(existing):
        return {}, "", None
    try:
        fields, text = split_card(existing)
    except ValueError as error:
        reason = one_line(" ".join(str(error).split()), 300)
        raise ConfigError(
            f"{folder / CARD}: its front matter is not YAML ({reason}). Correct what stands "
            "between the two '---'."
        ) from None
    return fields, text, _find_section(text)


def _template_lines() -> set[str]:
    """The lines of the Hub client's empty model card, which PEFT fills in and extends."""
    from huggingface_hub import ModelCard

    text = read_card(Path(ModelCard.default_template_path))
    filled = re.sub(r'\{\{ \w+ \| default\("([^"]*)", true\) ?\}\}', r"\1", text)
    return {line.strip() for line in filled.splitlines()}


def _digest(value: object) -> str:
    try:
        written = json.dumps(value, sort_keys=True, default=str)
    except TypeError:  # YAML has keys that JSON has not
        written = repr(value)
    return hashlib.sha256(written.encode(errors="surrogatepass")).hexdigest()[:12]
