"""Which files of a model folder are pushed, and which are left out."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import PUBLISHED, RECORDS
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.posterior import PosteriorInfo, read_info

CARD = "README.md"
_INNER_FILES = (
    "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",
)  # the second are sentence-transformers'
MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER_FILE = re.compile(r"adapter_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_POSTERIOR = re.compile(
    r"posterior/(precision[^/]*\.safetensors|precision\.safetensors\.index\.json|posterior\.json)"
)


class PushFile(NamedTuple):
    """One file of a push: where it goes, and where it lies (None: the card, which is made)."""

    path: str
    source: Path | None
    size: int


def _is_weight(path: str) -> bool:
    return bool(MODEL_FILE.fullmatch(path) or ADAPTER_FILE.fullmatch(path))


def is_stale(path: str, *, weights: bool, pushed: set[str], only: bool) -> bool:
    """Files under our names that belong to other weights: shards, a precision, the records of how
    they were made.
    """
    if _POSTERIOR.fullmatch(path):
        return weights or any(p.startswith("posterior/") for p in pushed)
    if path in RECORDS:
        return not only and (weights or not pushed.isdisjoint(RECORDS))
    return not only and _is_weight(path)


def choose_files(
    folder: Path, *, posterior: bool, only_posterior: bool
) -> tuple[list[PushFile], dict[str, str], list[str]]:
    """Files that go, files that stay with the reason, and notes; after the hashes have been
    compared.
    """
    if not posterior and only_posterior:
        raise ConfigError("--no-posterior and --posterior-only together leave nothing to push.")
    if not folder.is_dir():
        what = (
            "is a file; push takes a folder (merge with -o FOLDER)"
            if folder.exists()
            else "is no folder"
        )
        raise CheckpointError(f"'{folder}' {what}.")
    bare = sorted(folder.glob("precision*.safetensors"))
    chosen: dict[str, Path] = {}
    if bare:
        if not only_posterior:
            raise ConfigError(
                f"'{folder}' holds a precision and no model. Push it with --posterior-only."
            )
        extra = [folder / n for n in ("precision.safetensors.index.json", "posterior.json")]
        chosen = {f"posterior/{f.name}": f for f in [*bare, *(f for f in extra if f.exists())]}
        _check_alone(folder, bare)
    else:
        if not only_posterior:
            chosen = _model_files(folder)
        found = precision_files(folder) if posterior else []
        if only_posterior and not found:
            raise PrecisionError(
                f"'{folder}' holds no posterior. Make one with `bmerge precision {folder} --data "
                "TEXTS`."
            )
        if found:
            _check_posterior(folder, found)
            extra = [
                folder / "posterior" / n
                for n in ("precision.safetensors.index.json", "posterior.json")
            ]
            chosen |= {
                f"posterior/{f.name}": f for f in [*found, *(f for f in extra if f.exists())]
            }
    left_out = _left_out(folder, set(chosen.values()), posterior=posterior, only=only_posterior)
    files = [
        PushFile(path, source, source.stat().st_size) for path, source in sorted(chosen.items())
    ]
    notes = [
        f"{n} names paths on this machine, which will be public"
        for n in RECORDS
        if _has_paths(chosen.get(n))
    ]
    if _has_paths(chosen.get("adapter_config.json")):
        notes.append(
            "adapter_config.json names a base on this machine, where nobody else can load it; put "
            "its Hub id there"
        )
    return files, left_out, notes


def _model_files(folder: Path) -> dict[str, Path]:
    weights = checkpoint_files(folder)
    chosen = {f.name: f for f in weights}
    stem = "adapter_model" if weights[0].name.startswith("adapter_model") else "model"
    names = [f"{stem}.safetensors.index.json", *_modules(folder)]
    for file in sorted(folder.iterdir()):
        if file.is_file() and (
            file.name in names or any(fnmatchcase(file.name, p) for p in PUBLISHED)
        ):
            chosen[file.name] = file
    for pattern in _INNER_FILES:
        chosen |= {f"{file.parent.name}/{file.name}": file for file in sorted(folder.glob(pattern))}
    return chosen


def _modules(folder: Path) -> set[str]:
    """Python files that the model's config or tokenizer says it needs (`auto_map`)."""
    found = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        for value in (
            (content.get("auto_map") or {}) if isinstance(content, dict) else {}
        ).values():
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and "--" not in place:
                    found.add(f"{place.partition('.')[0]}.py")
    return found


def _left_out(folder: Path, chosen: set[Path], *, posterior: bool, only: bool) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if (
            path in chosen
            or (path.name == CARD and not only)
            or (path.is_dir() and path in {f.parent for f in chosen})
        ):
            continue
        if only:
            reason = "--posterior-only"
        elif path.name == "posterior":
            reason = "--no-posterior" if not posterior else "no precision in it"
        elif path.name.startswith("checkpoint-") or path.name.endswith(
            (".checkpoints", ".partial")
        ):
            reason = "a checkpoint or an unfinished output"
        else:
            reason = "not a file of a model"
        found[path.name + "/" * path.is_dir()] = reason
    strays = {f.parent for f in chosen if f.parent != folder}
    for path in sorted(p for parent in strays for p in parent.iterdir() if p not in chosen):
        found[path.relative_to(folder).as_posix()] = "not a file of a model"
    return found


def _check_posterior(folder: Path, files: list[Path]) -> None:
    """A precision must be of the weights beside it, by all bytes where they were recorded."""
    info = _check_alone(
        folder / "posterior", files, str(folder), " or leave it at home with --no-posterior."
    )
    mean = SafetensorsSource(checkpoint_files(folder))
    try:
        full = info.mean.full is not None
        if (info.mean.full or info.mean.blocks) != identity(mean, full=full):
            raise PrecisionError(
                f"'{files[0]}' was taken at other weights than those in '{folder}'. Push the "
                "precision that belongs to "
                "them, or leave it at home with --no-posterior."
            )
    finally:
        mean.close()


def _check_alone(
    folder: Path, files: list[Path], model: str = "MODEL", other: str = ""
) -> PosteriorInfo:
    """A precision must say which weights it is of."""
    source = SafetensorsSource(files)
    info = read_info(source)
    source.close()
    if info is None:
        raise PrecisionError(
            f"'{files[0]}' does not say which weights it is of, so nobody could check it. Make it "
            "with `bmerge "
            f"precision {model} --data TEXTS --out {folder}`{',' + other if other else '.'}"
        )
    return info


def _has_paths(file: Path | None) -> bool:
    return file is not None and bool(
        re.search(r"[\s\"':\[,](/|~/)[\w.-]+/", file.read_text(errors="replace"))
    )
