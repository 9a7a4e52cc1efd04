"""Which files of a model folder are pushed, which stay behind, and which are deleted on the Hub."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_FOLDER,
    PRECISION_INDEX,
    checkpoint_files,
    precision_files,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import MEMORY, PUBLISHED, RECORDS
from mergekit_bayes.documents import read_object
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError, shown
from mergekit_bayes.hub.folder import CARD, lone_precision_files, mapping, precision_info
from mergekit_bayes.hub.local_paths import holds_token, names_paths
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.posterior.pooling import PosteriorForm, is_written, write_pooled
from mergekit_bayes.posterior.stored import StoredPrecisions

_INNER_FILES = (
    "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",  # of sentence-transformers
)
_POSTERIOR_FILES = (PRECISION_INDEX, "precision.safetensors.index.json", "posterior.json")
MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER_FILE = re.compile(r"adapter_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_POSTERIOR_PATH = re.compile(  # of today and, with "safetensors", of earlier versions
    r"posterior/(precision[^/]*\.(posterior|safetensors)|precision(\.safetensors)?\.index\.json"
    r"|posterior\.json)"
)


class PushFile(NamedTuple):
    """One file of a push.

    Attributes:
        path: Its path in the repository.
        source: The real path of the local file, which for a posterior in another form is a
            temporary one and gone after the push; None for the card, which is made.
        size: Bytes.
    """

    path: str
    source: Path | None
    size: int


class Choice(NamedTuple):
    """The files of a folder that are pushed, and those that are not.

    Attributes:
        files: The files to push, by path, without the card.
        left_out: Name of each other file, with the reason.
        notes: What the user should know before publishing.
    """

    files: tuple[PushFile, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


def choose_files(
    folder: Path, *, posterior: bool, only_posterior: bool, form: PosteriorForm, scratch: ExitStack
) -> Choice:
    """Choose the files of a push, and check that its posterior is of its weights.

    Args:
        folder: A model, an adapter, or a posterior without a model.
        posterior: Push the posterior too.
        only_posterior: Push nothing but the posterior.
        form: The form in which the posterior is pushed.
        scratch: Removes the temporary folder of a posterior that is stored in another form or
            layout, at its end.

    Raises:
        CheckpointError: Not a folder, or neither a model nor a precision in it; or a file of the
            push is a link out of the folder, is not a regular file, or holds a token.
        ConfigError: The options leave nothing to push.
        PrecisionError: No posterior, one of other weights, or one that does not name its weights.
    """
    if not posterior and only_posterior:
        raise ConfigError("--no-posterior and --posterior-only together leave nothing to push.")
    if not os.path.isdir(folder):  # False, too, for a name that no folder can have
        if os.path.exists(folder):
            raise CheckpointError(
                f"'{folder}' is a file; push takes a folder (merge with -o FOLDER)."
            )
        raise CheckpointError(
            f"'{folder}': no such folder. A push takes a local folder with a model, an adapter or "
            "a posterior."
        )
    lone = lone_precision_files(folder)
    if lone:
        if not only_posterior:
            raise ConfigError(
                f"'{folder}' holds a precision and no model. Push it with --posterior-only."
            )
        chosen = _posterior_files(folder, lone)
        _real_files(folder, chosen)  # before any is opened
        _named_weights(folder, lone, "MODEL", "")
        precision = lone
    else:
        chosen = {} if only_posterior else _model_files(folder)
        precision = precision_files(folder) if posterior else []
        if only_posterior and not precision:
            raise PrecisionError(
                f"'{folder}' holds no posterior. Make one with `bmerge precision {folder} --data "
                "TEXTS`."
            )
        if precision:
            chosen |= _posterior_files(folder / "posterior", precision)
            _real_files(folder, chosen)
            _check_posterior(folder, precision)
    files = tuple(_real_files(folder, chosen))
    for file in files:
        if file.source is not None and holds_token(file.source):
            raise token_found(folder / file.path)
    notes = list(_path_notes(chosen))
    rewritten = _rewritten(precision, form, scratch) if precision else None
    if rewritten:
        own = {path for path in chosen if path.startswith(f"{POSTERIOR_FOLDER}/")}
        if form != "entries":
            stored = sum(file.size for file in files if file.path in own)
            notes.append(_form_note(form, stored, sum(file.size for file in rewritten)))
        files = (*(file for file in files if file.path not in own), *rewritten)
    if precision and (note := _matrix_note(precision)):
        notes.append(note)
    return Choice(
        tuple(sorted(files)),
        _left_out(folder, set(chosen.values()), posterior=posterior, only=only_posterior),
        tuple(notes),
    )


def _rewritten(
    precision: list[Path], form: PosteriorForm, scratch: ExitStack
) -> tuple[PushFile, ...] | None:
    """The files of a posterior in the form of a push; None if it is stored in that already.

    Raises:
        CheckpointError: A temporary folder cannot be made or written to.
    """
    with StoredPrecisions(precision) as source:
        if is_written(source, form):
            return None
        assert source.info is not None  # `_named_weights` made sure of it
        try:
            place = Path(scratch.enter_context(TemporaryDirectory(prefix="bmerge-push-")))
            write_pooled(source, source.info, place, form)
        except OSError as error:
            raise CheckpointError(
                f"the posterior is pushed in another form than it is stored in, and cannot be "
                f"written to a temporary folder ({error.strerror or error}). Name one with room in "
                "TMPDIR."
            ) from None
    return tuple(
        PushFile(f"{POSTERIOR_FOLDER}/{file.name}", file, file.stat().st_size)
        for file in sorted(place.iterdir())
    )


def _matrix_note(precision: list[Path]) -> str | None:
    """What the matrices of a posterior take, which are pushed as they are."""
    with StoredPrecisions(precision) as source:
        size = sum(4 * source.numbers(name) for name in source.matrices)
        count = len(source.matrices)
    if not count:
        return None
    return (
        f"the posterior holds matrices for {count} tensors, {size:,} bytes, which go out as they "
        "are; --no-posterior leaves it here"
    )


def _form_note(form: PosteriorForm, stored: int, pushed: int) -> str:
    numbers = "one number a row" if form == "row" else "two vectors a matrix"
    return (
        f"the posterior goes out with {numbers}, {pushed:,} bytes of {stored:,}; "
        "`--posterior-form entries` pushes all of it"
    )


def token_found(file: Path) -> CheckpointError:
    """The error that a file is not pushed because it holds a token."""
    return CheckpointError(
        f"{file}: holds what looks like a token of the Hub. Nothing was pushed: take the token out "
        "of the file, and withdraw it if others have seen it."
    )


def _real_files(folder: Path, chosen: Mapping[str, Path]) -> list[PushFile]:
    """The files of a push, by path; an error if one leads out of the folder or has an odd name.

    Tensors must lie in the folder, too: a merge only computes with them, a push publishes them.
    """
    files = []
    for path, file in sorted(chosen.items()):
        if not path.isprintable():
            raise CheckpointError(
                f"'{folder}': the name {shown(path)} holds what cannot be printed, and is not "
                "published. Rename the file."
            )
        real = contained(folder, file.relative_to(folder))
        files.append(PushFile(path, real, real.stat().st_size))
    return files


def stale_files(
    listed: Iterable[str], pushed: set[str], *, weights_changed: bool, only_posterior: bool
) -> list[str]:
    """Files on the Hub, under names of ours, that belong to other weights than the pushed ones.

    Args:
        listed: Paths in the repository.
        pushed: Paths of the push, the card included.
        weights_changed: Whether the push changes the weights in the repository.
        only_posterior: Whether the push is of a posterior without a model.

    Returns:
        Shards, a precision, and the records of how the weights were made.
    """

    def is_stale(path: str) -> bool:
        if _POSTERIOR_PATH.fullmatch(path):
            return weights_changed or any(p.startswith(f"{POSTERIOR_FOLDER}/") for p in pushed)
        if only_posterior:
            return False
        if path in RECORDS:
            return weights_changed or not pushed.isdisjoint(RECORDS)
        return bool(MODEL_FILE.fullmatch(path) or ADAPTER_FILE.fullmatch(path))

    return [path for path in listed if path not in pushed and is_stale(path)]


def _posterior_files(folder: Path, precision: list[Path]) -> dict[str, Path]:
    """The files of a precision in `folder`, by their paths in the repository."""
    described = [folder / name for name in _POSTERIOR_FILES]
    files = [*precision, *(file for file in described if os.path.lexists(file))]
    return {f"posterior/{file.name}": file for file in files}


def _model_files(folder: Path) -> dict[str, Path]:
    weights = checkpoint_files(folder)
    stem = "adapter_model" if weights[0].name.startswith("adapter_model") else "model"
    names = {f"{stem}.safetensors.index.json", *_modules(folder)}
    chosen = {file.name: file for file in weights}
    for file in sorted(folder.iterdir()):
        is_side_file = any(fnmatchcase(file.name, pattern) for pattern in PUBLISHED)
        if not os.path.isdir(file) and (file.name in names or is_side_file):
            chosen[file.name] = file
    for pattern in _INNER_FILES:
        chosen |= {f"{file.parent.name}/{file.name}": file for file in sorted(folder.glob(pattern))}
    return chosen


def _modules(folder: Path) -> Iterator[str]:
    """Python files that the model's config or tokenizer says it needs (`auto_map`)."""
    for name in ("config.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            contained(folder, name)
        for value in mapping(read_object(folder / name).get("auto_map")).values():
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and "--" not in place:  # "--": of another repository
                    yield f"{place.partition('.')[0]}.py"


def _left_out(folder: Path, chosen: set[Path], *, posterior: bool, only: bool) -> dict[str, str]:
    reasons = {}
    folders = {file.parent for file in chosen}
    for path in sorted(folder.iterdir()):
        if path in chosen or (path.name == CARD and not only) or path in folders:
            continue
        if only:
            reason = "--posterior-only"
        elif path.name == "posterior":
            reason = "--no-posterior" if not posterior else "no precision in it"
        elif path.name.startswith("checkpoint-") or path.name.endswith(
            (".checkpoints", ".partial")
        ):
            reason = "a checkpoint or an unfinished output"
        elif path.name == MEMORY:
            reason = "text that the model wrote, which may hold anything"
        else:
            reason = "not a file of a model"
        reasons[path.name + "/" * os.path.isdir(path)] = reason
    inner = (path for subfolder in folders - {folder} for path in subfolder.iterdir())
    for path in sorted(path for path in inner if path not in chosen):
        reasons[path.relative_to(folder).as_posix()] = "not a file of a model"
    return reasons


def _path_notes(chosen: Mapping[str, Path]) -> Iterator[str]:
    for name in RECORDS:
        if name in chosen and names_paths(chosen[name]):
            yield f"{name} names paths on this machine, which will be public"
    config = chosen.get("adapter_config.json")
    if config is not None and names_paths(config):
        yield (
            "adapter_config.json names a base on this machine, where others cannot load it; put "
            "its Hub id there"
        )


def _check_posterior(folder: Path, files: list[Path]) -> None:
    """Check that a precision is of the weights beside it, by all bytes where those were hashed."""
    info = _named_weights(
        folder / "posterior", files, str(folder), ", or leave it out with --no-posterior"
    )
    full = info.mean.full is not None
    with SafetensorsSource(checkpoint_files(folder)) as mean:
        if (info.mean.full or info.mean.blocks) != identity(mean, full=full):
            raise PrecisionError(
                f"'{files[0]}' was taken at other weights than those in '{folder}'. Push the "
                "precision that belongs to them, or leave it out with --no-posterior."
            )


def _named_weights(folder: Path, files: list[Path], model: str, otherwise: str) -> PosteriorInfo:
    """What a precision says about itself; an error if it does not say which weights it is of."""
    info = precision_info(files)
    if info is None:
        raise PrecisionError(
            f"'{files[0]}' does not say which weights it is of, so its readers could not check "
            f"it. Make it with `bmerge precision {model} --data TEXTS --out {folder}`{otherwise}."
        )
    return info
