"""A LoRA adapter as PEFT writes it: which layers, which factors, which scaling, without torch or
peft.

    adapter_config.json         r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, fan_in_fan_out, ...
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight   (r, d_in)
                                base_model.model.<module>.lora_B.weight   (d_out, r)
    posterior/precision.safetensors   the same names, 1/weight^2 (optional)

A layer changes its weight by `s B A`, `s = alpha / r` or, rank-stabilised, `alpha / sqrt(r)`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, resolve
from mergekit_bayes.checkpoint.specs import MERGEABLE, Array, Closing
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0, is_bad_precision
from mergekit_bayes.posterior import Posterior, open_posterior

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Key of `PosteriorInfo.training`: `initial_identity` of the A's that a run started from.
INITIAL_A = "initial_A"

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What makes an adapter more than `s B A` on some weights, and so no sum of dense changes.
_BEYOND = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
)
# Initialisations that take the first factors out of the base's weights: the stored base is then not
# the one trained on.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factors(NamedTuple):
    """The two factors of a layer, or their variances: float32."""

    a: Array  # (r, d_in)
    b: Array  # (d_out, r)


class Layer(NamedTuple):
    """One adapted weight: `s B A`, (rows, columns) = (d_out, d_in)."""

    module: str
    a: str  # name on disk
    b: str
    rank: int
    rows: int
    columns: int
    scaling: float


@dataclass(frozen=True)
class Adapter(Closing):
    """A LoRA adapter. Opening one reads headers and the config only.

    Attributes:
        posterior: Its tensors under PEFT's names on disk, and their precision if it has one.
        config: `adapter_config.json`.
        layers: The adapted weights by module, in order of the modules' names.
        whole: Tensors that replace the base's (`modules_to_save`): name in the model to name on
            disk.
    """

    posterior: Posterior
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    whole: Mapping[str, str]

    @property
    def ref(self) -> str:
        return self.posterior.ref

    @property
    def observations(self) -> float | None:
        return self.posterior.info.observations if self.posterior.info else None

    def factors(self, layer: Layer) -> Factors:
        """The factors of a layer. Raises `CheckpointError` for an entry that is not finite."""
        return Factors(self._finite(layer.a), self._finite(layer.b))

    def _finite(self, name: str) -> Array:
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
        """Stored precisions of (A, B) as if `count` observations had been seen; None for a frozen
        factor.

        See `counted`.
        """
        return self.counted(layer.a, count), self.counted(layer.b, count)

    def counted(self, name: str, count: float | None = None) -> Array | None:
        """A tensor's precision on the scale of the summed loss: `gain * (S - prior) + prior *
        observations / ess`.

        The gain is `count / ess`, with `count` the recorded observations if None; a precision
        without information is taken as it is. None if there is no precision of that name.
        """
        source, info = self.posterior.precision, self.posterior.info
        if source is None or name not in source.specs:
            return None
        if source.specs[name].shape != self.posterior.mean.specs[name].shape:
            raise PrecisionError(
                f"{source.where(name)}: the precision of '{name}' is "
                f"{list(source.specs[name].shape)}, the tensor "
                f"{list(self.posterior.mean.specs[name].shape)}. Use the precision that belongs to "
                "this adapter."
            )
        stored: Array = read_tensor(source, name).astype(np.float32, copy=False)
        if is_bad_precision(stored).any():
            raise PrecisionError(
                f"{source.where(name)}: the precision of '{name}' has entries that are negative or "
                "not finite. "
                "Make it anew."
            )
        if info is None or not info.ess:
            return stored
        observations = info.observations or info.ess
        prior = info.prior.precision if info.prior.kind == "isotropic" else 0.0
        gain = (observations if count is None else count) / info.ess
        data = np.maximum(stored - np.float32(prior), np.float32(0))
        counted: Array = np.float32(gain) * data + np.float32(prior * observations / info.ess)
        return counted

    def variances(self, layer: Layer, count: float | None = None) -> Factors | None:
        """`V = 1 / (S + delta_0)` of both factors; 0 for a factor without a precision (it was frozen).

        None if neither has one.
        """
        a, b = self.precisions(layer, count)
        if a is None and b is None:
            return None
        one, delta = np.float32(1), np.float32(DELTA_0)
        return Factors(
            np.zeros((layer.rank, layer.columns), np.float32) if a is None else one / (a + delta),
            np.zeros((layer.rows, layer.rank), np.float32) if b is None else one / (b + delta),
        )

    def close(self) -> None:
        self.posterior.close()


def open_adapter(ref: str, *, precision: str | None = None, with_precision: bool = True) -> Adapter:
    """Open a PEFT LoRA adapter: a folder or a Hub id.

    Args:
        ref: The folder that holds `adapter_config.json`, or `org/name[@revision]`.
        precision: Another place for its precision: a file or a folder.
        with_precision: False leaves its precision alone.

    Raises:
        CheckpointError: No adapter there, or one whose config and tensors disagree.
        ConfigError: A kind of adapter that is not `s B A` on the base's weights.
        PrecisionError: A precision taken at other weights than this adapter's.
    """
    path = resolve(ref, CHECKPOINT + (POSTERIOR if with_precision else ()))
    folder = path.parent if path.is_file() else path
    config = _read_config(folder, ref)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"'{ref}' has {CONFIG} but no {WEIGHTS}. Save it anew with `save_pretrained`; pickles "
            "are not read."
        )
    # The file, so that a model in the same folder is not taken for it.
    posterior = open_posterior(
        str(folder / WEIGHTS), precision=precision, with_precision=with_precision
    )
    posterior = Posterior(ref, folder, posterior.mean, posterior.precision, posterior.info)
    try:
        layers, whole = _layers(posterior, config)
        if posterior.info is not None and identity(posterior.mean) != posterior.info.mean.blocks:
            raise PrecisionError(
                f"the precision of '{ref}' was taken at other weights than these: its record of "
                "them differs. "
                "Use the precision that belongs to them."
            )
        return Adapter(posterior, config, layers, whole)
    except BaseException:
        posterior.close()
        raise


def is_adapter(path: Path) -> bool:
    """True if the tensors of this folder or file are an adapter's."""
    return checkpoint_files(path)[0].name == WEIGHTS


def initial_identity(factors: Mapping[str, Array]) -> str:
    """Who the A's are that a run starts from: SHA-256 over names and bytes, in order of name.

    Recorded as `training["initial_A"]` of a posterior, it lets adapters of one start be merged
    factor by factor.
    """
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(f"{name}\0{list(factors[name].shape)}\0".encode())
        digest.update(np.ascontiguousarray(factors[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def _read_config(folder: Path, ref: str) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.exists():
        raise CheckpointError(
            f"'{ref}' is not an adapter: it has no {CONFIG}. Name the folder that PEFT wrote."
        )
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        _check_kind(config, ref)
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(r, int) and r > 0 for r in ranks) or not all(
            math.isfinite(a) for a in alphas
        ):
            raise ValueError("r is not a positive and lora_alpha not a finite number")
        return config
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a LoRA config ({error!r}). Save the adapter anew."
        ) from None


def _check_kind(config: Mapping[str, Any], ref: str) -> None:
    found = [f"{key}={config[key]}" for key in _BEYOND if config.get(key)]
    if str(config.get("peft_type", "LORA")) != "LORA":
        found.insert(0, f"peft_type={config['peft_type']}")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']}")
    if str(config.get("init_lora_weights")).lower().startswith(_MOVES_THE_BASE):
        found.append(f"init_lora_weights={config['init_lora_weights']}")
    if found:
        raise ConfigError(
            f"'{ref}' is more than s B A on its base's weights ({', '.join(found)}), and only that "
            "is read here. Fold "
            "it into its base with `PeftModel.merge_and_unload()` and merge the result."
        )


def _layers(
    posterior: Posterior, config: Mapping[str, Any]
) -> tuple[dict[str, Layer], dict[str, str]]:
    names: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for disk in posterior.mean.specs:
        name = disk.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            names.setdefault(match["module"], {})[match["factor"]] = disk
        elif _is_saved(name, config.get("modules_to_save") or ()):
            whole[name] = disk
        else:
            raise ConfigError(
                f"{posterior.mean.where(disk)}: '{disk}' is neither lora_A, lora_B nor of "
                "modules_to_save. Adapters of "
                "embeddings and other kinds are not read; fold it into its base with "
                "`PeftModel.merge_and_unload()`."
            )
    if not names:
        raise CheckpointError(
            f"{posterior.mean.files[0]}: holds no lora_A and lora_B. Is it a LoRA adapter?"
        )
    return {
        module: _layer(posterior, config, module, names[module]) for module in sorted(names)
    }, whole


def _layer(
    posterior: Posterior, config: Mapping[str, Any], module: str, names: Mapping[str, str]
) -> Layer:
    if len(names) < 2:
        there = next(iter(names.values()))
        raise CheckpointError(
            f"{posterior.mean.where(there)}: '{there}' has no other factor. Save the adapter anew."
        )
    a, b = posterior.mean.specs[names["A"]], posterior.mean.specs[names["B"]]
    where = posterior.mean.where(names["A"])
    for spec, name in ((a, names["A"]), (b, names["B"])):
        if spec.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{where}: '{name}' is {spec.dtype}; factors are read from {', '.join(MERGEABLE)}."
            )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ConfigError(
            f"{where}: '{names['A']}' is {list(a.shape)}; only adapters of matrices are read. Fold "
            "it into its base "
            "with `PeftModel.merge_and_unload()`."
        )
    rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
    if a.shape[0] != rank or b.shape[1] != rank:
        raise MismatchError(
            f"{where}: the factors of '{module}' are {list(a.shape)} and {list(b.shape)}, but "
            f"{CONFIG} gives it rank "
            f"{rank}. The two files do not belong together."
        )
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Layer(module, names["A"], names["B"], rank, b.shape[0], a.shape[1], scaling)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, from a dot or the
    start on.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _is_saved(name: str, modules: Sequence[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in modules)
