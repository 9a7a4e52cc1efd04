"""From what a person types to a local file or folder: a path, or `org/name[@revision]` of the Hub."""

import re
from pathlib import Path

from mergekit_bayes.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
CHECKPOINT = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", "adapter*.safetensors")
POSTERIOR = ("posterior/*",)


def is_hub_id(ref: str) -> bool:
    """True if `ref` is no local path and has the form `org/name[@revision]`."""
    return not Path(ref).exists() and not ref.startswith(("/", ".", "~")) and bool(_HUB_ID.fullmatch(ref))


def resolve(ref: str, patterns: tuple[str, ...] = CHECKPOINT, repo_type: str = "model") -> Path:
    """The local file or folder of `ref`; a Hub id is fetched into huggingface_hub's cache.

    Raises `CheckpointError` when there is neither such a path nor such a repository.
    """
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if not is_hub_id(ref) or ref.endswith((".safetensors", ".json", ".jsonl", ".yaml")):
        raise CheckpointError(f"'{ref}': no such file or folder, and not a Hub id (org/name or org/name@revision).")
    from huggingface_hub import snapshot_download

    repo, _, revision = ref.partition("@")
    try:
        folder = snapshot_download(
            repo, repo_type=repo_type, revision=revision or None, allow_patterns=list(patterns) or None
        )
    except Exception as error:  # the client's many errors: missing, gated, offline, wrong token
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"'{ref}': no such local path, and the Hub did not give it ({type(error).__name__}: {reason}). "
            "Check the name, log in with `hf auth login`, or download it first."
        ) from None
    return Path(folder)
