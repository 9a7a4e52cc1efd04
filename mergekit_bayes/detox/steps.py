"""The work folder: each step's output lies under a name made of what went in, so it is done once.

A step is done when its folder is there, since every verb writes beside its target and renames at
the end.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.identity import files_identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, resolve
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity


def step_folder(work: Path, name: str, *inputs: Any) -> Path:
    """Where the step called `name` writes, given everything that its result depends on."""
    text = json.dumps([__version__, name, *inputs], sort_keys=True, default=str)
    return work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def data_identity(refs: str | Sequence[str]) -> dict[str, str]:
    """SHA-256 of each local file or of all files of a folder; a Hub data set is known by its name
    only.
    """
    return {
        ref: _content(Path(ref).expanduser()) for ref in ([refs] if isinstance(refs, str) else refs)
    }


def model_identity(ref: str) -> dict[str, str | None]:
    """Weights by sampled blocks, tokenizer and config by content."""
    path = resolve(ref, CHECKPOINT)
    config = path / "config.json"
    return {
        "weights": files_identity(checkpoint_files(path, ref)),
        "tokenizer": tokenizer_identity(path),
        "config": _content(config) if config.exists() else None,
    }


def precision_identity(ref: str) -> str:
    """The precision in a folder of its own or in a model's, by sampled blocks."""
    folder = resolve(ref, CHECKPOINT + POSTERIOR)
    return files_identity(sorted(folder.glob("precision*.safetensors")) or precision_files(folder))


def without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Settings less what does not change the result, or is an input of its own."""
    return {k: v for k, v in settings.items() if k not in names}


def _content(path: Path) -> str:
    if path.is_dir():
        parts = [
            (str(f.relative_to(path)), _content(f)) for f in sorted(path.rglob("*")) if f.is_file()
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if not path.exists():
        return "by name"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
