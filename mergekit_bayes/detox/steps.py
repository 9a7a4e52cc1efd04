"""The work folder: the name of each step's output is a hash of its inputs, so it is made once.

A step is done when its folder exists, since every verb writes beside its target and renames at the
end.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.identity import content_hash, files_identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files, precision_set
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, is_hub_id, resolve
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.evaluate.scorers import Scorer
from mergekit_bayes.posterior import open_posterior


def step_folder(work: Path, name: str, *inputs: object) -> Path:
    """The folder that a step writes.

    Args:
        work: The folder of all steps.
        name: The step.
        inputs: Everything that the result depends on, as JSON.
    """
    text = json.dumps([__version__, name, *inputs], sort_keys=True, default=str)
    return work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def data_identity(refs: str | Sequence[str]) -> dict[str, str]:
    """SHA-256 of each local file, or of all files of a folder.

    A Hub data set is identified by its name only.
    """
    names = [refs] if isinstance(refs, str) else refs
    return {ref: _content(Path(os.path.expanduser(ref))) for ref in names}


def model_identity(ref: str, adapters: tuple[Path, ...] = ()) -> dict[str, object]:
    """Content hashes of a model: weights by sampled blocks, tokenizer and config in full.

    Those of an adapter contain its settings and its base's identity.

    Args:
        ref: Path or Hub id.
        adapters: The adapters whose base the model is.

    Raises:
        CheckpointError: A file cannot be read, or an adapter is named as its own base.
    """
    path = resolve(ref, CHECKPOINT)
    if path.resolve() in adapters:
        raise CheckpointError(
            f"{path / 'adapter_config.json'}: leads back to this adapter as its own base. Correct "
            "base_model_name_or_path there."
        )
    config, adapter = path / "config.json", path / "adapter_config.json"
    found: dict[str, object] = {
        "weights": files_identity(checkpoint_files(path, ref)),
        "tokenizer": tokenizer_identity(path),
        "config": content_hash(config) if config.exists() else None,
    }
    if adapter.exists():
        settings = read_mapping(adapter, "Save the adapter again.")
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{adapter}: base_model_name_or_path is {shown(base)}, and what the adapter is to "
                "be put on must be known. Write the path or Hub id of its base there."
            )
        pinned = f"{base}@{revision}" if revision and is_hub_id(base) else base
        found |= {
            "adapter": content_hash(adapter),
            "base": model_identity(pinned, (*adapters, path.resolve())),
        }
    return found


def scorer_identity(scorer: Scorer) -> dict[str, object]:
    """All that a scorer's scores depend on: how it reads, and the contents of its files.

    Weights alone do not say which output is the label, nor how outputs are read and texts cut into
    tokens.
    """
    found: dict[str, object] = dict(scorer.info.model_dump(mode="json", exclude={"commit"}))
    if scorer.folder is not None:
        found["model"] = model_identity(str(scorer.folder))
    return found


def precision_identity(ref: str) -> str:
    """Content hash, by sampled blocks, of the precision in its own folder or in a model's."""
    folder = resolve(ref, CHECKPOINT + POSTERIOR)
    return files_identity(precision_set(folder) or precision_files(folder))


def has_own_precision(base: str, weights: object, toxic: Path | None) -> bool:
    """Whether a base has a precision of its weights, by the estimator of the fine-tune.

    Args:
        base: Path or Hub id.
        weights: Content hash of its weights, by `model_identity`.
        toxic: The fine-tune, if there is one.
    """
    with ExitStack() as stack:
        own = stack.enter_context(open_posterior(base)).info
        if own is None or own.mean is None:
            return False
        if toxic is not None:
            task = stack.enter_context(open_posterior(str(toxic))).info
            if task is None or (own.estimator, own.unit) != (task.estimator, task.unit):
                return False
        return bool(own.mean.blocks == weights)


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def without(settings: Mapping[str, object], *names: str) -> dict[str, object]:
    """The settings without those that do not change the result, or are hashed by content."""
    return {name: value for name, value in settings.items() if name not in names}


def _content(path: Path) -> str:
    return content_hash(path) if os.path.exists(path) else "by name"
