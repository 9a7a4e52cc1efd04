"""Compare the tokenizers of two model folders without loading them."""

import hashlib
import json
from pathlib import Path


def tokenizer_identity(folder: Path) -> str | None:
    """SHA-256 of `tokenizer.json`; None for a tokenizer without one."""
    file = folder / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def tokens_apart(one: Path, other: Path) -> list[tuple[int, str, str]]:
    """Numbers that two folders' tokenizers give to different tokens, with both; empty where one has
    no tokenizer.
    """
    if (
        tokenizer_identity(one) in (None, tokenizer_identity(other))
        or tokenizer_identity(other) is None
    ):
        return []
    here, there = _tokens(one), _tokens(other)
    return [
        (n, here[n], there[n]) for n in sorted(here.keys() & there.keys()) if here[n] != there[n]
    ]


def _tokens(folder: Path) -> dict[int, str]:
    """Token by number, as far as `tokenizer.json` says it plainly."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        pairs = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((v[0], i) for i, v in enumerate(vocabulary))
        )
        found = {int(number): str(token) for token, number in pairs}
        return found | {int(t["id"]): str(t["content"]) for t in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}
