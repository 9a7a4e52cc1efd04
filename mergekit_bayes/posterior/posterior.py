"""The noun: a mean (an ordinary checkpoint), a precision of the same names and shapes, and where it
came from.

On disk the mean is untouched. The precision is a second safetensors set with the same names and
shards:

    model/model.safetensors                 a.safetensors              the mean
    model/posterior/precision.safetensors   a.precision.safetensors    float32, 1/weight^2, >= 0
    model/posterior/posterior.json                                     PosteriorInfo, for people

`PosteriorInfo` also travels in the header of every precision file, which is the copy that is read.
A subfolder, because some loaders take every `*.safetensors` beside the model for weights.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files, set_files
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
from mergekit_bayes.checkpoint.specs import CheckpointSource, Closing, PrecisionSource
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior.info import PosteriorInfo, read_info


@dataclass(frozen=True)
class Posterior(Closing):
    """A mean, perhaps a precision, and what is known about it. Opening one reads headers only.

    `isotropic` stands for a precision that is one number everywhere. A precision without `info` is
    taken as it
    is: on the scale of the summed loss, prior 0. `parts` are what BASE+ADAPTER was made of.
    """

    ref: str
    path: Path
    mean: CheckpointSource
    precision: PrecisionSource | None = None
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
        """Of the Hub repository that it was fetched from; of BASE+ADAPTER both, empty for a local
        one.
        """
        if self.parts:
            commits = [part.commit or "" for part in self.parts]
            return "+".join(commits) if any(commits) else None
        return commit_in(self.ref, self.path)

    @property
    def pinned(self) -> str:
        """`ref` as it will mean the same tomorrow: a Hub id with its commit."""
        return (
            "+".join(part.pinned for part in self.parts)
            if self.parts
            else pinned(self.ref, self.path)
        )

    def check_identity(self, mean: str | None, precision: str | None = None) -> None:
        """Raise `MismatchError` if a recipe wants another mean or precision than this."""
        for what, wanted, found, key in (
            ("", mean, self.identity, "identities"),
            (
                "the precision of ",
                precision,
                precision and self.precision_identity,
                "precision_identities",
            ),
        ):
            if wanted is not None and wanted != found:
                raise MismatchError(
                    f"{what}'{self.ref}' is not what the recipe was made with: it records "
                    f"{wanted:.12}..., found "
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
        with_precision: False leaves precisions alone (uniform weights need none, a Hub id then
            fetches none).
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


def _given_precision(ref: str) -> list[Path]:
    path = resolve(ref, PRECISION)  # of a Hub id the precision only, not the model beside it
    if path.is_file():
        return checkpoint_files(path, ref)
    for folder, stem in ((path / "posterior", "precision"), (path, "precision"), (path, "model")):
        if stem == "model" and is_hub_id(ref):
            resolve(ref, CHECKPOINT)
        if files := set_files(folder, stem):
            return files
    raise PrecisionError(f"'{ref}' holds no precision.safetensors. Name the file itself.")
