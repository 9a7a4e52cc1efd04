"""The card of a model folder (README.md), from what its own files record: pure, deterministic and
without a date.

What we write stands between two HTML comments; a person's text around them stays. The first comment
remembers a digest of each value that we put into the front matter, so that later a value of ours is
renewed and a person's kept.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.hub.facts import FRONT_MATTER, Facts, License, Parent
from mergekit_bayes.hub.front_matter import front_matter
from mergekit_bayes.hub.sections import card_section

_END = "<!-- bmerge: end -->"
_SECTION = re.compile(r"<!-- bmerge: begin(?P<ours>[^>]*) -->\n.*?" + re.escape(_END), re.S)
_PEFT = re.compile(r"^- PEFT \S+$", re.M)  # in the last section of a card that PEFT made
_PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}  # of its front matter
_PEFT_LINE = re.compile(
    r"### Framework versions|- PEFT \S+|## Training procedure"
    r"|The following `bitsandbytes` quantization config was used during training:"
    r"|- (?:quant_method|_?load_in_[48]bit|llm_int8_\w+|bnb_4bit_\w+): .*"
)


class Card(NamedTuple):
    text: str
    notes: tuple[str, ...]  # what a person should know before publishing it


def model_card(folder: Path, **options: Any) -> str:
    """The text of `make_card`."""
    return make_card(folder, **options).text


def make_card(
    folder: Path,
    *,
    repo: str | None = None,
    existing: str | None = None,
    licenses: Mapping[Parent, License | None] | None = None,
    posterior: bool = True,
    posterior_only: bool = False,
) -> Card:
    """The card of a model folder, of an adapter's, or of a folder that holds only a posterior.

    Args:
        folder: Nothing outside of it is read.
        repo: `org/name`, for the lines that say how to load it; by default the folder's name.
        existing: The card to keep a person's text of; by default the folder's README.md.
        licenses: Of the parents, as far as they are known.
        posterior: False for a card of the model without its posterior.
        posterior_only: For a card of the posterior without its model.

    Raises:
        CheckpointError: The folder holds neither a model nor a precision, or a file of it cannot be
            read.
        ConfigError: An existing front matter that is not YAML.
    """
    facts = Facts(folder, repo or folder.resolve().name, posterior=posterior, only=posterior_only)
    if existing is None and (folder / "README.md").exists():
        existing = (folder / "README.md").read_text()
    if existing is not None and is_generated(existing):
        existing = None
    theirs, body = _split(existing or "", folder)
    if found := _SECTION.search(body):
        theirs = {
            k: v for k, v in theirs.items() if f"{k}={_digest(v)}" not in found["ours"].split()
        }
    notes = list(facts.notes)
    ours = front_matter(facts, licenses or {}, notes, has_license="license" in theirs)
    kept = {k: v for k, v in ours.items() if k not in theirs}
    marks = "".join(f" {k}={_digest(v)}" for k, v in kept.items())
    section = f"<!-- bmerge: begin{marks} -->\n{card_section(facts)}\n{_END}"
    if found:
        body = body[: found.start()] + section + body[found.end() :]
    elif body.strip():
        body = f"{body.rstrip()}\n\n{section}\n"
    else:
        body = f"# {facts.repo.rpartition('/')[2]}\n\n{section}\n"
    front = yaml.safe_dump(theirs | kept, sort_keys=False, allow_unicode=True, width=10**6)
    return Card(f"---\n{front}---\n\n{body.lstrip()}", tuple(notes))


def is_generated(card: str) -> bool:
    """Whether a card is PEFT's with nobody's word in it: each line is of its template, each field
    of its making.
    """
    if not _PEFT.search(card):
        return False
    match = FRONT_MATTER.match(card)
    try:
        front = yaml.safe_load(match["yaml"]) if match else {}
    except yaml.YAMLError:
        return False
    if front and not (isinstance(front, dict) and set(front) <= _PEFT_KEYS):
        return False
    known = _template_lines()
    lines = (line.strip() for line in card[match.end() if match else 0 :].splitlines())
    return all(not line or line in known or _PEFT_LINE.fullmatch(line) for line in lines)


def _template_lines() -> set[str]:
    """The lines of the Hub client's empty model card, with which PEFT begins."""
    from huggingface_hub import ModelCard

    text = Path(ModelCard.default_template_path).read_text(encoding="utf-8")
    filled = re.sub(r'\{\{ \w+ \| default\("([^"]*)", true\) ?\}\}', r"\1", text)
    return {line.strip() for line in filled.splitlines()}


def _split(text: str, folder: Path) -> tuple[dict[str, Any], str]:
    match = FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    try:
        front = yaml.safe_load(match["yaml"]) or {}
        if not isinstance(front, dict):
            raise ValueError("it is not a mapping")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder / 'README.md'}: its front matter is not YAML ({reason}). Mend it between the "
            "two '---'."
        ) from None
    return front, text[match.end() :]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
