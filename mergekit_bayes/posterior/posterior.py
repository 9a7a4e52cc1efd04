"""The posterior of a model: its weights as the mean, and a precision of the same names and shapes.

On disk the mean is an ordinary checkpoint and stays untouched. The precision is a second set of
tensors, in safetensors format, with the same shards:

    model/model.safetensors                 a.safetensors    the mean
    model/posterior/precision.posterior     a.posterior      float32, 1/weight^2, >= 0
    model/posterior/precision.index.json                     which file holds which precision
    model/posterior/posterior.json                           PosteriorInfo, to read

`PosteriorInfo` also travels in the header of every precision file, which is the copy that is read.
Some loaders take every `*.safetensors` beside the model or below it for weights: hence the ending,
and a role before every name (`stored`). `docs/posterior-format.md` is the whole specification.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_ENDING,
    POSTERIOR_FOLDER,
    checkpoint_files,
    precision_files,
    precision_set,
    set_files,
)
from mergekit_bayes.checkpoint.moment_files import explain_moments
from mergekit_bayes.checkpoint.renaming import find_renaming
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import (
    CHECKPOINT,
    POSTERIOR,
    PRECISION,
    commit_in,
    is_hub_id,
    pinned,
    resolve,
)
from mergekit_bayes.checkpoint.specs import CheckpointSource, Closing, PrecisionSource, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp, changed_error
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior.forms import DirectionsSpec, is_form_of
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.posterior.stored import StoredPrecisions


@dataclass(frozen=True)
class Posterior(Closing):
    """A mean, optionally a precision, and the record of where they come from.

    Opening one reads headers only. A precision without `info` is taken as it is: on the scale of
    the summed loss, with prior 0.

    Attributes:
        ref: The model as the user gave it.
        path: The local file or folder.
        mean: The weights.
        precision: Their precision, 1/weight^2; None if there is none.
        info: What the precision's file says about it.
        isotropic: One precision for every entry, 1/weight^2, in place of a file.
        parts: The base and the adapter, for BASE+ADAPTER.
        stored_mean: The weights as they are stored, where `mean` has their rows in another order
            for a merge. They say which model it is.
    """

    ref: str
    path: Path
    mean: CheckpointSource
    precision: PrecisionSource | None = None
    info: PosteriorInfo | None = None
    isotropic: float | None = None
    parts: tuple["Posterior", ...] = ()
    stored_mean: CheckpointSource | None = None

    @cached_property
    def identity(self) -> str:
        """Content hash of the mean, by sampled blocks."""
        return identity(self.stored_mean or self.mean)

    @cached_property
    def precision_identity(self) -> str:
        """Content hash of the precision, by sampled blocks."""
        return f"isotropic {self.isotropic}" if self.precision is None else identity(self.precision)

    @cached_property
    def full_identity(self) -> str:
        """Content hash of the mean by all bytes; for BASE+ADAPTER those of both, with a `+`."""
        return self._hash_mean()

    @cached_property
    def full_precision_identity(self) -> str:
        """Content hash of the precision and of its record, by all bytes.

        Of BASE+ADAPTER it is that of the adapter's.
        """
        return self._hash_precision()

    def _hash_mean(self) -> str:
        if self.parts:  # what is stored, not what is computed of it
            return "+".join(part._hash_mean() for part in self.parts)
        return identity(self.stored_mean or self.mean, full=True)

    def _hash_precision(self) -> str:
        if self.parts and self.precision is not None:
            return self.parts[-1]._hash_precision()
        if self.precision is None:
            return f"isotropic {self.isotropic}"
        # The record decides how the numbers count, and is in the header.
        record = json.dumps(dict(self.precision.metadata), sort_keys=True)
        return hashlib.sha256(f"{identity(self.precision, full=True)}{record}".encode()).hexdigest()

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """All files of tensors that are read, as they were when opened."""
        return {**self.mean.inputs, **(self.precision.inputs if self.precision else {})}

    @cached_property
    def renamed_precisions(self) -> Mapping[str, str]:
        """The precision's name of each tensor that it names otherwise than the mean."""
        if self.precision is None:
            return {}
        renaming = find_renaming(self.mean.specs, self.precision.specs, fits=_is_form)
        return {mean: stored for stored, mean in renaming.names.items()}

    @property
    def commit(self) -> str | None:
        """Commit of the Hub repository that was fetched; None for a local path.

        For BASE+ADAPTER the commits of both with a `+` between them, empty for a local one.
        """
        if self.parts:
            commits = [part.commit or "" for part in self.parts]
            return "+".join(commits) if any(commits) else None
        return commit_in(self.ref, self.path)

    @property
    def pinned(self) -> str:
        """`ref` with its commit if it is a Hub id, so that it names the same weights later."""
        if self.parts:
            return "+".join(part.pinned for part in self.parts)
        return pinned(self.ref, self.path)

    @property
    def is_file(self) -> bool:
        """Whether the model is a single file, not a folder."""
        return self.path.is_file()

    @property
    def has_precision(self) -> bool:
        """Whether there is a precision, stored or isotropic."""
        return self.precision is not None or self.isotropic is not None

    def check_identity(
        self, mean: str | None, precision: str | None = None, *, full: bool = False
    ) -> None:
        """Compare the content hashes with those that a recipe records; None is not compared.

        Args:
            mean: What the recipe records of the mean.
            precision: What it records of the precision.
            full: Whether these are hashes of all bytes.

        Raises:
            MismatchError: The recipe was made with another mean or precision.
        """
        prefix = "full_" if full else ""
        if mean is not None:
            actual = self.full_identity if full else self.identity
            if mean != actual:
                raise self._changed("", mean, actual, f"{prefix}identities")
        if precision is not None:
            actual = self.full_precision_identity if full else self.precision_identity
            if precision != actual:
                raise self._changed(
                    "the precision of ", precision, actual, f"{prefix}precision_identities"
                )

    def refuse_other_bytes(self) -> None:
        """Hash all bytes again, and compare with the full hashes of before.

        Raises:
            ChangedError: The mean or the precision has other content than before.
        """
        if self._hash_mean() != self.full_identity:
            raise changed_error(f"'{self.ref}'", "all bytes together have another hash")
        if self.has_precision and self._hash_precision() != self.full_precision_identity:
            raise changed_error(
                f"the precision of '{self.ref}'", "all bytes together have another hash"
            )

    def _changed(self, what: str, recorded: str, actual: str, key: str) -> MismatchError:
        return MismatchError(
            f"{what}'{self.ref}' is not what the recipe was made with: it records "
            f"{recorded:.12}..., found {actual:.12}.... Bring that one back, or take '{key}' out "
            "of the recipe."
        )

    def close(self) -> None:
        """Close the files of the mean and the precision."""
        self.mean.close()
        if self.precision is not None:
            self.precision.close()


def _is_form(shape: Sequence[int], mean: Sequence[int]) -> bool:
    """Whether a precision of this shape may be that of a mean: a form, or as long or 1 by axis."""
    of_mean = TensorSpec("F32", tuple(mean))
    return (
        not shape
        or any(
            is_form_of(spec("F32", tuple(shape)), of_mean) for spec in (TensorSpec, DirectionsSpec)
        )
        or (len(shape) == len(mean) and all(a in (1, b) for a, b in zip(shape, mean, strict=True)))
    )


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
        isotropic: One precision for every entry, 1/weight^2, in place of a file.
        with_precision: Open the precision too. Uniform weights need none, and a Hub id then
            fetches none.

    Raises:
        CheckpointError: There is no such model, or a file cannot be read.
        PrecisionError: The given place holds no precision, or its record cannot be read.
    """
    path = resolve(ref, CHECKPOINT + (POSTERIOR if with_precision else ()))
    with ExitStack() as stack:
        mean = stack.enter_context(SafetensorsSource(checkpoint_files(path, ref)))
        posterior = Posterior(ref, path, mean, isotropic=isotropic)
        if isotropic is None and with_precision:
            files = _given_precision(precision, ref) if precision else precision_files(path)
            if files:
                source = stack.enter_context(StoredPrecisions(files))
                posterior = replace(posterior, precision=source, info=source.info)
        stack.pop_all()  # the posterior owns the files from here on
    return posterior


def _given_precision(ref: str, model: str) -> list[Path]:
    """The files of a precision that was named by itself."""
    path = resolve(ref, PRECISION)  # from the Hub the precision only, not the model beside it
    if path.is_file():
        if reason := explain_moments(path, ref, model):
            raise PrecisionError(reason)
        return [path] if path.suffix == POSTERIOR_ENDING else checkpoint_files(path, ref)
    for folder in (path / POSTERIOR_FOLDER, path):
        if files := precision_set(folder):
            return files
    # The weights of a training's checkpoint are no precision either.
    if reason := explain_moments(path, ref, model):
        raise PrecisionError(reason)
    if is_hub_id(ref):
        resolve(ref, CHECKPOINT)
    if files := set_files(path, "model"):
        return files
    raise PrecisionError(f"'{ref}' holds no precision. Name the file itself.")
