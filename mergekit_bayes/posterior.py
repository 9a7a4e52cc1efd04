"""The noun: a mean (an ordinary checkpoint), a precision of the same names and shapes, and where it came from.

On disk the mean is untouched. The precision is a second safetensors set with the same names and shards:

    model/model.safetensors                 a.safetensors              the mean
    model/posterior/precision.safetensors   a.precision.safetensors    float32, 1/weight^2, >= 0
    model/posterior/posterior.json                                     PosteriorInfo, for people

`PosteriorInfo` also travels in the header of every precision file, which is the copy that is read.
A subfolder, because some loaders take every `*.safetensors` beside the model for weights.
"""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_bayes.errors import CheckpointError, MismatchError, PrecisionError
from mergekit_bayes.sources import CHECKPOINT, POSTERIOR, PRECISION, commit_in, is_hub_id, pinned, resolve
from mergekit_bayes.tensors import (
    Array,
    SafetensorsSink,
    SafetensorsSource,
    TensorSource,
    TensorSpec,
    encode,
    identity,
    parse_json,
    shown,
)

FORMAT = 1
_HEADER_KEY = "bmerge"  # in the safetensors metadata
_STEMS = ("model", "adapter_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_SIDE_FILE, _SIDE_FOLDER = 100 << 20, 1 << 20  # bytes
_NO_SIDE_FILES = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pyc", "*.gguf", "*.ggml", "*.h5",
    "*.keras", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.npy", "*.npz", "*.distcp",
    "README.md", "merge_report.json", "merge_recipe.yaml", "mergekit_config.yml", "finetune.yaml", "report.json",
    "trainer_state.json", "*_results.json", "optimizer.*", "scheduler.*", "zero_to_fp32.py", "events.out.*", "*.log",
    "*.jsonl",
)  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """Who a set of tensors is; `full` only where somebody asked for all bytes to be hashed."""

    blocks: str
    full: str | None = None


class Prior(_Record):
    """What a stored precision contains besides its data.

    `isotropic` is `precision` on every entry, on the same scale as the stored tensors. `base` is the
    base posterior as a merge counted it: `base_prior + base_count * (H of the base per observation) + DELTA_0`.
    """

    kind: Literal["none", "isotropic", "base", "unknown"] = "none"
    centre: Literal["zero", "base"] = "zero"
    precision: float = 0.0
    base: Identity | None = None
    base_precision: Identity | None = None
    base_count: float | None = None


class Anchor(_Record):
    """What training pulled towards: nothing, zero or the base, with which precision (None: not a quadratic)."""

    kind: Literal["none", "zero", "base"] = "none"
    precision: float | None = 0.0


class Term(_Record):
    """One posterior inside a merge."""

    label: str
    mean: Identity
    scale: float
    gain: float = 1.0  # how its stored precision was counted


class MergeTrace(_Record):
    """What a later merge must know to be exact: how this one counted."""

    common_count: float | None
    anchor: str = "h0"
    shrink: str | None = None
    pool: str | None = None
    only: str | None = None
    uneven: bool = False  # some tensor or entry was merged by other scales than the terms'
    guarded_share: float = 0.0


class PosteriorInfo(_Record):
    """Everything needed to use a precision again without asking its author.

    Attributes:
        estimator: How the curvature was found: `ggn`, `ivon`, `fisher`, ... A merge carries that of its terms.
        unit: What one observation is.
        observations: N, how many observations the likelihood part stands for.
        ess: The count by which the stored precision is scaled, `S = ess * (curvature + prior)`; readers
            multiply by `observations / ess`.
        sampled: How many examples were really looked at.
        mean: Identity of the weights at which the curvature was taken.
        training: Optimizer, its hyperparameters, steps, batch size in observations, loss reduction.
        health: `init_fraction`, `kappa`, quantiles of the curvature, counts of bad entries.
        aliases: Tied names, alias to the name under which the tensor is stored.
    """

    format: int = FORMAT
    estimator: str
    unit: Literal["example", "token"] | None = None
    observations: float | None = None
    ess: float | None = None
    sampled: float | None = None
    prior: Prior = Prior()
    anchor: Anchor = Anchor()
    mean: Identity
    base: Identity | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    training: dict[str, Any] = {}
    health: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    terms: tuple[Term, ...] = ()
    merge: MergeTrace | None = None

    def to_metadata(self) -> dict[str, str]:
        """The string-to-string metadata of a safetensors file."""
        return {"format": "pt", _HEADER_KEY: self.model_dump_json()}


class CheckpointSource(TensorSource, Protocol):
    """Named tensors that lie in the files of a checkpoint, or are computed from it."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def file_of(self, name: str) -> int:
        """Index of the shard to which a tensor belongs."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Posterior:
    """A mean, perhaps a precision, and what is known about it. Opening one reads headers only.

    `isotropic` stands for a precision that is one number everywhere. A precision without `info` is taken as it
    is: on the scale of the summed loss, prior 0. `parts` are what BASE+ADAPTER was made of.
    """

    ref: str
    path: Path
    mean: CheckpointSource
    precision: CheckpointSource | None = None
    info: PosteriorInfo | None = None
    isotropic: float | None = None
    parts: tuple["Posterior", ...] = ()

    @cached_property
    def identity(self) -> str:
        """Who the mean is, by sampled blocks."""
        return identity(self.mean)

    @cached_property
    def precision_identity(self) -> str:
        """Who the precision is, by sampled blocks."""
        return f"isotropic {self.isotropic}" if self.precision is None else identity(self.precision)

    @property
    def commit(self) -> str | None:
        """Of the Hub repository that it was fetched from; of BASE+ADAPTER both, empty for a local one."""
        if self.parts:
            commits = [part.commit or "" for part in self.parts]
            return "+".join(commits) if any(commits) else None
        return commit_in(self.ref, self.path)

    @property
    def pinned(self) -> str:
        """`ref` as it will mean the same tomorrow: a Hub id with its commit."""
        return "+".join(part.pinned for part in self.parts) if self.parts else pinned(self.ref, self.path)

    def check_identity(self, mean: str | None, precision: str | None = None) -> None:
        """Raise `MismatchError` if a recipe wants another mean or precision than this."""
        for what, wanted, found, key in (
            ("", mean, self.identity, "identities"),
            ("the precision of ", precision, precision and self.precision_identity, "precision_identities"),
        ):
            if wanted is not None and wanted != found:
                raise MismatchError(
                    f"{what}'{self.ref}' is not what the recipe was made with: it records {wanted:.12}..., found "
                    f"{found:.12}.... Bring that one back, or take '{key}' out of the recipe."
                )

    @property
    def is_file(self) -> bool:
        return self.path.is_file()

    @property
    def has_precision(self) -> bool:
        return self.precision is not None or self.isotropic is not None

    def close(self) -> None:
        self.mean.close()
        if self.precision is not None:
            self.precision.close()


def open_posterior(
    ref: str,
    *,
    precision: str | None = None,
    isotropic: float | None = None,
    with_precision: bool = True,
) -> Posterior:
    """Open a model and, where there is one, its precision. Reads headers only.

    Args:
        ref: A `.safetensors` file, a folder, or `org/name[@revision]`.
        precision: Another place for the precision: a file or a folder.
        isotropic: One precision for every entry, 1/weight^2, instead of a file.
        with_precision: False leaves precisions alone (uniform weights need none, a Hub id then fetches none).
    """
    path = resolve(ref, CHECKPOINT + (POSTERIOR if with_precision else ()))
    mean = SafetensorsSource(checkpoint_files(path, ref))
    try:
        if isotropic is not None:
            return Posterior(ref, path, mean, isotropic=isotropic)
        if not with_precision:
            return Posterior(ref, path, mean)
        found = _given_precision(precision) if precision else precision_files(path)
        if not found:
            return Posterior(ref, path, mean)
        source = SafetensorsSource(found)
        return Posterior(ref, path, mean, source, read_info(source))
    except BaseException:
        mean.close()
        raise


def checkpoint_files(path: Path, ref: str | None = None) -> list[Path]:
    """The safetensors files of a model: the file itself, the single file of a folder, or its shards."""
    ref = ref or str(path)
    convert = f"Convert it to safetensors first: `bmerge convert {shlex.quote(ref)} -o "
    if path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(f"'{ref}' is a pickle, which is not read here. {convert}OUT.safetensors`.")
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"'{ref}' is not a .safetensors file. Name one, or a folder that save_pretrained wrote."
            )
        return [path]
    for stem in _STEMS:
        if files := _set_files(path, stem):
            return files
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"):
        if os.path.exists(path / name):
            raise CheckpointError(
                f"'{ref}' holds its tensors in pickles ({name}), which are not read here. {convert}OUT`."
            )
    raise CheckpointError(
        f"'{ref}' holds neither model.safetensors nor model.safetensors.index.json. "
        "Name a .safetensors file or a folder that save_pretrained wrote."
        + (f" If its tensors are in pickles: `bmerge convert {ref} -o OUT`." if is_hub_id(ref) else "")
    )


def precision_files(path: Path) -> list[Path]:
    """Where a model's own precision lies; empty if it has none."""
    if path.is_file():
        sibling = precision_path(path)
        if sibling.exists() or path.stem not in _STEMS:
            return [sibling] if sibling.exists() else []
        return _set_files(path.parent / "posterior", "precision")  # the single file of a model folder
    return _set_files(path / "posterior", "precision")


def precision_path(model: Path) -> Path:
    """Where the precision of a model belongs: `X.precision.safetensors`, or the folder `model/posterior`."""
    if model.suffix == ".safetensors":
        return model.with_name(model.name.removesuffix(".safetensors") + ".precision.safetensors")
    return model / "posterior"


def shard_name(files: tuple[Path, ...], index: int, stem: str) -> str:
    """Name of shard `index` of a set called `stem` that is sharded like `files`."""
    if len(files) == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{index + 1:05d}-of-{len(files):05d}.safetensors"


def read_info(source: CheckpointSource) -> PosteriorInfo | None:
    """`PosteriorInfo` from a precision file's header; None for a foreign file."""
    return parse_info(source.metadata, source.files[0])


def parse_info(metadata: Mapping[str, str], file: Path) -> PosteriorInfo | None:
    """`PosteriorInfo` from the metadata of a precision file; None for a foreign file's."""
    text = metadata.get(_HEADER_KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
        if found.get("format") != FORMAT:
            raise PrecisionError(
                f"{file}: posterior format {found.get('format')}, this version reads {FORMAT}. Update mergekit-bayes."
            )
        return PosteriorInfo.model_validate(found)
    except (ValidationError, ValueError, AttributeError) as error:
        raise PrecisionError(f"{file}: its posterior information cannot be read ({error}).") from None


def identify(source: TensorSource, *, full: bool = True) -> Identity:
    """Identity of a checkpoint, with the hash of all bytes unless `full` is False."""
    return Identity(blocks=identity(source), full=identity(source, full=True) if full else None)


def tokenizer_identity(folder: Path) -> str | None:
    """SHA-256 of `tokenizer.json`; None for a tokenizer without one."""
    file = folder / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def tokens_apart(one: Path, other: Path) -> list[tuple[int, str, str]]:
    """Numbers that two folders' tokenizers give to different tokens, with both; empty where one has no tokenizer."""
    if tokenizer_identity(one) in (None, tokenizer_identity(other)) or tokenizer_identity(other) is None:
        return []
    here, there = _tokens(one), _tokens(other)
    return [(n, here[n], there[n]) for n in sorted(here.keys() & there.keys()) if here[n] != there[n]]


def _tokens(folder: Path) -> dict[int, str]:
    """Token by number, as far as `tokenizer.json` says it plainly."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        found = {int(number): str(token) for token, number in pairs}
        return found | {int(t["id"]): str(t["content"]) for t in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def save_posterior(
    model: Path,
    precision: Mapping[str, Array],
    info: PosteriorInfo,
    *,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Store a precision beside its model, with the model's names, shapes and shards.

    Args:
        model: The checkpoint, a file or folder; it is not touched.
        precision: float32 arrays under the checkpoint's own tensor names; 1/weight^2, finite and >= 0. Tensors
            that were not trained may be absent.
        info: Travels in every file's header.
        out: Another place: a `.safetensors` file, or a folder.
        force: Replace what is there.

    Returns:
        The file or folder written.
    """
    mean = SafetensorsSource(checkpoint_files(model))
    try:
        _check_precision(precision, mean, model)
        target = out or precision_path(model)
        with replacing(target, force=force) as partial:
            if target.suffix == ".safetensors":
                _write_set(partial, precision, info)
            else:
                partial.mkdir()
                groups: dict[int, list[str]] = {}
                for name in precision:
                    groups.setdefault(mean.file_of(name), []).append(name)
                shards = {shard_name(mean.files, i, "precision"): names for i, names in sorted(groups.items())}
                for file, names in shards.items():
                    _write_set(partial / file, {n: precision[n] for n in names}, info)
                if len(mean.files) > 1:
                    write_index(partial, "precision", shards, sum(4 * p.size for p in precision.values()))
                write_info(partial, info)
        return target
    finally:
        mean.close()


def write_index(folder: Path, stem: str, shards: Mapping[str, list[str]], total_size: int) -> None:
    """The index that says which shard holds which tensor, as save_pretrained writes it."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: which file of the same folder holds which tensor.

    Raises `CheckpointError` for what is not such a map, and for a file that lies elsewhere or is not there.
    """
    try:
        if not index.is_file():
            raise ValueError("it is not a file")
        content = parse_json(index.read_bytes())
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has none")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\0" in file:
                raise ValueError(f"{shown(name)} is in {shown(file)}, which is no file name")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{index}: is not an index with a weight_map of file names beside it ({reason}). Fetch it again."
        ) from None
    for name in sorted(set(weight_map.values())):
        if not os.path.exists(index.parent / name):
            raise CheckpointError(f"{index}: names {shown(name)}, which is not there. Fetch the missing shards.")
    return weight_map


def check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Compare an index with its shards, name by name; `held` says which file really holds which tensor.

    Raises `CheckpointError` that names a tensor and its shard.
    """
    for name, file in weight_map.items():
        if held.get(name) != file:
            instead = f"; {shown(held[name])} does" if name in held else ""
            raise CheckpointError(
                f"{index}: says that {shown(name)} is in {shown(file)}, but that file does not hold it{instead}. "
                "Index and shards are of two savings; fetch them again."
            )
    for name, file in held.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{index}: does not list {shown(name)}, which {shown(file)} holds. "
                "Index and shards are of two savings; fetch them again."
            )


def side_files(folder: Path) -> list[Path]:
    """What lies in a model's folder beside its tensors, relative to it: config, tokenizer, code, licence and the like.

    Not tensors in any format and their indices, nor what a merge, a training or an evaluation says of this model, its
    card, hidden files and files over 100 MiB. Of folders only those without any of these, and up to 1 MiB, such as
    `1_Pooling/`.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        inner = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]
        sizes = [f.stat().st_size for f in inner if _is_side_file(f)]
        whole = len(sizes) == len(inner) and sum(sizes) <= (_SIDE_FOLDER if path.is_dir() else _SIDE_FILE)
        if whole and not path.match(".*") and path.name != "posterior":
            found += [f.relative_to(folder) for f in inner]
    return found


def copy_side_files(source: Path, target: Path, *, but: str | None = None) -> None:
    """Copy a model's side files, but for those that match a pattern. Raises `OSError`."""
    for name in side_files(source):
        if but is None or not name.match(but):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def write_info(folder: Path, info: PosteriorInfo) -> None:
    """`posterior.json`, the copy for people."""
    (folder / "posterior.json").write_text(info.model_dump_json(indent=2) + "\n")


def refuse_foreign(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that holds something else than a model: `--force` leaves it alone."""
    if folder.is_dir() and any(folder.iterdir()) and not any(f for g in _OF_A_MODEL for f in folder.glob(g)):
        raise CheckpointError(
            f"'{folder}' is a folder without a model in it, which --force leaves alone. Choose another -o, or remove "
            "it yourself."
        )


_OF_A_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json", "merge_report.json")


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end; nothing is left behind on failure.

    Raises `CheckpointError` if the target exists and `force` is False, or when the disk says no.
    """
    if target.exists() and not force:
        raise CheckpointError(f"'{target}' exists. Choose another -o, or pass --force to replace it.")
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        partial = scratch / target.name
        yield partial
        if target.is_dir() and not target.is_symlink():
            _swap_folder(target, partial, scratch / "replaced")
        else:
            os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(f"{target}: writing failed ({error.strerror or error}).") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial.parent, ignore_errors=True)


def _swap_folder(target: Path, new: Path, aside: Path) -> None:
    """A folder cannot be replaced in one step: move it aside, and back if the new one cannot take its place."""
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise


def _set_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not os.path.lexists(index):
        return [single] if os.path.exists(single) else []
    if os.path.exists(single):
        raise CheckpointError(
            f"{folder}: holds both {single.name} and {index.name}. Remove the stale one, or name a file."
        )
    weight_map = read_index(index)
    files = [folder / name for name in sorted(set(weight_map.values()))]
    source = SafetensorsSource(files)
    try:
        check_index(index, weight_map, {name: files[source.file_of(name)].name for name in source.specs})
    finally:
        source.close()
    return files


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not any(file.match(pattern) for pattern in _NO_SIDE_FILES)


def _given_precision(ref: str) -> list[Path]:
    path = resolve(ref, PRECISION)  # of a Hub id the precision only, not the model beside it
    if path.is_file():
        return checkpoint_files(path, ref)
    for folder, stem in ((path / "posterior", "precision"), (path, "precision"), (path, "model")):
        if stem == "model" and is_hub_id(ref):
            resolve(ref, CHECKPOINT)
        if files := _set_files(folder, stem):
            return files
    raise PrecisionError(f"'{ref}' holds no precision.safetensors. Name the file itself.")


def _check_precision(precision: Mapping[str, Array], mean: SafetensorsSource, model: Path) -> None:
    for name, values in precision.items():
        spec = mean.specs.get(name)
        if spec is None:
            raise MismatchError(f"precision of '{name}': {model} has no tensor of that name.")
        if spec.shape != values.shape:
            raise MismatchError(
                f"precision of '{name}' is {list(values.shape)}, but the tensor in {model} is {list(spec.shape)}."
            )
        bad = int(np.count_nonzero(~(np.isfinite(values) & (values >= 0))))
        if bad:
            raise PrecisionError(f"precision of '{name}': {bad} of {values.size} entries are negative or not finite.")


def _write_set(path: Path, tensors: Mapping[str, Array], info: PosteriorInfo) -> None:
    specs = {name: TensorSpec("F32", t.shape) for name, t in tensors.items()}
    sink = SafetensorsSink(path, specs, info.to_metadata())
    try:
        for name, t in tensors.items():
            sink.write_bytes(name, 0, encode(t.reshape(-1), "F32"))
        sink.close()
    finally:
        sink.abandon()
