"""A LoRA adapter as PEFT writes it, with its posterior, read without torch or peft.

    adapter_config.json               r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, ...
    adapter_model.safetensors         base_model.model.<module>.lora_A.weight   (r, d_in)
                                      base_model.model.<module>.lora_B.weight   (d_out, r)
    posterior/precision.posterior     the same names, 1/weight^2 (optional)

A layer changes its weight by `s B A`, `s = alpha / r` or, rank-stabilised, `alpha / sqrt(r)`.
"""

import hashlib
import shlex
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.foreign import explain_missing
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import precision_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, resolve
from mergekit_bayes.checkpoint.specs import Array, Closing
from mergekit_bayes.errors import BmergeError, CheckpointError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora.config import BASE, CONFIG, WEIGHTS, LoraConfig, read_config
from mergekit_bayes.lora.experts import Pair, Recent, of_expert
from mergekit_bayes.lora.layers import Factors, Layer, is_of_training, is_original, read_layers
from mergekit_bayes.lora.tokens import TrainedRows
from mergekit_bayes.lora.writers import explain_files
from mergekit_bayes.posterior import Posterior, open_posterior
from mergekit_bayes.posterior.directions import refuse_matrices
from mergekit_bayes.posterior.forms import is_form_of
from mergekit_bayes.posterior.info import read_info

# Key of `PosteriorInfo.training`: `initial_identity` of the A's with which a run started.
INITIAL_A = "initial_A"

_KEPT = 4  # stacks of experts whose factors, or precisions, stay in memory


@dataclass(frozen=True)
class Adapter(Closing):
    """A LoRA adapter. Opening one reads headers and the config only.

    Attributes:
        posterior: The tensors under PEFT's names on disk, and their precision if there is one.
        config: The content of `adapter_config.json`.
        layers: The adapted weights by module, in order of the modules' names.
        replacements: Tensors that replace the base's (`modules_to_save`, and embeddings and heads
            that are stored whole), from the name in the model to the name on disk.
        unused: Names on disk of tensors that have no effect: the base's copies of modules that are
            replaced, and second copies of one tensor.
        rows: Rows of tensors that replace the base's (`trainable_token_indices`), by the name in
            the model.
        base: The content hash (sampled blocks) of the base that it was made on; None if no file
            records it.
    """

    posterior: Posterior
    config: LoraConfig
    layers: Mapping[str, Layer]
    replacements: Mapping[str, str]
    unused: tuple[str, ...] = ()
    rows: Mapping[str, TrainedRows] = field(default_factory=dict)
    base: str | None = None
    _recent: Recent[Pair] = field(default_factory=lambda: Recent(_KEPT), repr=False, compare=False)

    @property
    def ref(self) -> str:
        """The adapter as the user gave it."""
        return self.posterior.ref

    @property
    def observations(self) -> float | None:
        """The number of observations that the precision's record states, if any."""
        return self.posterior.info.observations if self.posterior.info else None

    @property
    def unused_note(self) -> str | None:
        """What a report says of tensors that have no effect; None if there are none."""
        if not self.unused:
            return None
        originals = [name for name in self.unused if is_original(name)]
        of_training = [name for name in self.unused if is_of_training(name)]
        second = [name for name in self.unused if name not in {*originals, *of_training}]
        kinds = {
            "the base's own copies of modules that it replaces": originals,
            "second copies of tensors under other names": second,
            "what only training uses": of_training,
        }
        texts = [f"{what} ('{n[0]}', {len(n)} such)" for what, n in kinds.items() if n]
        return f"'{self.ref}' has {' and '.join(texts)}: left out"

    def factors(self, layer: Layer) -> Factors:
        """Read the factors of a layer, as float32 matrices.

        Returns:
            A of shape (rank, columns) and B of (rows, rank); of all experts where a layer has
            several and means no single one.

        Raises:
            CheckpointError: An entry is not finite.
        """
        if layer.expert is not None:
            whole = layer._replace(expert=None)
            pair = of_expert(layer, self._recent.get((whole, ""), lambda: self.factors(whole)))
            return Factors(*(factor for factor in pair if factor is not None))
        return Factors(
            self.values(layer.a).reshape(layer.total_rank, layer.columns),
            self.values(layer.b).reshape(layer.rows, layer.total_rank),
        )

    def values(self, name: str) -> Array:
        """Read a tensor under its name on disk, in float32.

        Raises:
            CheckpointError: An entry is not finite.
        """
        values = read_tensor(self.posterior.mean, name).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.posterior.mean.where(name)}: '{name}' has entries that are not finite. Did "
                "training diverge?"
            )
        return values

    def precisions(
        self, layer: Layer, count: float | None = None
    ) -> tuple[Array | None, Array | None]:
        """The precisions of (A, B) for `count` observations; None for a factor that was frozen.

        See `counted`. Both have the shape of the factor that `factors` returns.
        """
        if layer.expert is not None:
            whole = layer._replace(expert=None)
            key = (whole, f"precision of {count}")
            return of_expert(layer, self._recent.get(key, lambda: self.precisions(whole, count)))
        a, b = self.counted(layer.a, count), self.counted(layer.b, count)
        return (
            None if a is None else a.reshape(layer.total_rank, layer.columns),
            None if b is None else b.reshape(layer.rows, layer.total_rank),
        )

    def counted(self, name: str, count: float | None = None) -> Array | None:
        """A tensor's precision on the scale of the loss summed over `count` observations.

            (count / ess) (S - prior) + (observations / ess) prior

        Args:
            name: The tensor's name on disk.
            count: The recorded number of observations if None.

        Returns:
            The precision in float32. A stored precision without a record is returned as it is. None
            if there is no precision of that name.

        Raises:
            PrecisionError: The precision has the shape of no form of the tensor's, or an entry of
                it is negative or not finite.
        """
        source, info = self.posterior.precision, self.posterior.info
        if source is None or name not in source.specs:
            return None
        refuse_matrices(source, "a merge of adapters", "Make another with --estimator ggn.")
        mean = self.posterior.mean.specs[name]
        if not is_form_of(source.specs[name], mean):
            raise PrecisionError(
                f"{source.where(name)}: the precision of '{name}' is "
                f"{list(source.specs[name].shape)}, the tensor "
                f"{list(mean.shape)}. Use the precision that belongs to this adapter."
            )
        stored: Array = read_tensor(source, name).astype(np.float32, copy=False)
        if is_bad_precision(stored).any():
            raise PrecisionError(
                f"{source.where(name)}: the precision of '{name}' has entries that are negative or "
                "not finite. Make it again."
            )
        stored = np.broadcast_to(stored, mean.shape)  # one number may stand for a row or for all
        if info is None or not info.ess:
            return stored
        observations = info.observations or info.ess
        prior = info.prior.precision if info.prior.kind == "isotropic" else 0.0
        gain = (observations if count is None else count) / info.ess
        data = np.maximum(stored - np.float32(prior), np.float32(0))
        counted: Array = np.float32(gain) * data + np.float32(prior * observations / info.ess)
        return counted

    def variances(self, layer: Layer, count: float | None = None) -> Factors | None:
        """Variances `V = 1 / (S + delta_0)` of both factors, with S as `counted` returns it.

        A factor without a precision was frozen and has variance 0. None if neither has one.
        """
        a, b = self.precisions(layer, count)
        if a is None and b is None:
            return None
        one, delta = np.float32(1), np.float32(DELTA_0)
        return Factors(
            np.zeros((layer.total_rank, layer.columns), np.float32)
            if a is None
            else one / (a + delta),
            np.zeros((layer.rows, layer.total_rank), np.float32)
            if b is None
            else one / (b + delta),
        )

    def close(self) -> None:
        """Close the files of the adapter and its precision."""
        self.posterior.close()


def open_adapter(ref: str, *, precision: str | None = None, with_precision: bool = True) -> Adapter:
    """Open a LoRA adapter that PEFT wrote. Reads headers and the config only.

    Args:
        ref: The folder that holds `adapter_config.json`, or `org/name[@revision]`.
        precision: Another place for its precision: a file or a folder.
        with_precision: Open its precision too.

    Raises:
        CheckpointError: There is no adapter, or its config and tensors disagree.
        ConfigError: The adapter is of a variant that is not read.
        MismatchError: The factors have another rank than the config says.
        PrecisionError: The precision was taken at other weights than this adapter's.
    """
    path = resolve(ref, CHECKPOINT + (POSTERIOR if with_precision else ()))
    folder = path.parent if path.is_file() else path
    config = read_config(path, ref)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(_explain_missing(folder, ref))
    with ExitStack() as stack:
        # The file, so that a model in the same folder is not taken for the adapter.
        opened = open_posterior(
            str(folder / WEIGHTS), precision=precision, with_precision=with_precision
        )
        posterior = stack.enter_context(replace(opened, ref=ref, path=folder))
        tensors = read_layers(posterior, config)
        if posterior.info is not None and identity(posterior.mean) != posterior.info.mean.blocks:
            files = (folder,) if posterior.precision is None else posterior.precision.files
            raise PrecisionError(
                f"the precision of '{ref}' ({files[0]}) was taken at other weights than these: its "
                "record of them differs. Use the precision that belongs to them."
            )
        base = _recorded_base(posterior)
        stack.pop_all()  # the adapter owns the files from here on
    return Adapter(posterior, config, *tensors, base=base)


def _recorded_base(posterior: Posterior) -> str | None:
    """The hash of an adapter's base, which its file or its posterior records.

    A merge by equal weights opens no posterior and reads its record alone.
    """
    if (base := posterior.mean.metadata.get(BASE)) is not None:
        return base
    info = posterior.info
    if info is None:
        # What is wrong with a precision that is not used is no matter of this merge.
        with suppress(BmergeError), ExitStack() as stack:
            if files := precision_files(posterior.path):
                info = read_info(stack.enter_context(SafetensorsSource(files[:1])))
            if info is not None and identity(posterior.mean) != info.mean.blocks:
                info = None
    return None if info is None or info.base is None else info.base.blocks


def _explain_missing(folder: Path, ref: str) -> str:
    """The message for an adapter's folder without its tensors."""
    if (folder / "adapter_model.bin").exists():
        return (
            f"'{ref}' holds its tensors in a pickle (adapter_model.bin), which is not read here. "
            f"Convert it to safetensors first: `bmerge convert {shlex.quote(ref)} -o OUT`."
        )
    reason = explain_files(folder) or explain_missing(folder)
    return f"'{ref}' has {CONFIG} but no {WEIGHTS}. " + (
        f"Instead: {reason}" if reason else "Save it again with `save_pretrained`."
    )


def initial_identity(factors: Mapping[str, Array]) -> str:
    """Content hash of the A's with which a run starts: SHA-256 over names, shapes and bytes.

    Recorded as `training["initial_A"]` of a posterior, it shows that adapters started from one A
    and may be merged factor by factor.
    """
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(f"{name}\0{list(factors[name].shape)}\0".encode())
        digest.update(np.ascontiguousarray(factors[name], dtype="<f4").tobytes())
    return digest.hexdigest()
