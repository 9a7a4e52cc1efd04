"""Compare the tokenizers of two model folders without loading them."""

import json
from collections.abc import Iterable
from pathlib import Path

from mergekit_bayes.checkpoint.identity import content_hash


def tokenizer_identity(folder: Path) -> str | None:
    """SHA-256 of a folder's `tokenizer.json`; None if it has none."""
    file = folder / "tokenizer.json"
    return content_hash(file) if file.exists() else None


def tokens_apart(one: Path, other: Path) -> list[tuple[int, str, str]]:
    """Ids to which the tokenizers of two folders give different tokens.

    Returns:
        The id and both tokens of each, by id; empty if one of the folders has no tokenizer.
    """
    identities = (tokenizer_identity(one), tokenizer_identity(other))
    if None in identities or identities[0] == identities[1]:
        return []
    tokens, others = _tokens(one), _tokens(other)
    common = sorted(tokens.keys() & others.keys())
    return [(i, tokens[i], others[i]) for i in common if tokens[i] != others[i]]


def _tokens(folder: Path) -> dict[int, str]:
    """Token by id, as far as `tokenizer.json` lists them; empty if it does not."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        pairs: Iterable[tuple[object, int]]
        if isinstance(vocabulary, dict):
            pairs = vocabulary.items()
        else:  # Unigram: a list of [token, score]
            pairs = ((entry[0], i) for i, entry in enumerate(vocabulary))
        tokens = {int(i): str(token) for token, i in pairs}
        return tokens | {int(t["id"]): str(t["content"]) for t in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}
