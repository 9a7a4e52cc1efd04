"""The pass over the examples, which all processes of a launcher make together.

The first process does everything else alone: it reads, checks and writes. The others wait until it
comes to the pass, load the model, share the batches, and wait again.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.curvature import Curvature
from mergekit_bayes.curvature.parts import Parts, batches_in, parts_in
from mergekit_bayes.curvature.refusals import explained, refuse_offloaded
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models.devices import SPREAD, choose_device
from mergekit_bayes.models.estimate import estimate_curvature
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.sharding import all_ranks, shard, sum_gradients
from mergekit_bayes.posterior.info import INPUTS
from mergekit_bayes.precision.keeping import is_sharded, keeping, parts_folder
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.ranks import in_step, in_turn, is_main, launched, lead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

R = TypeVar("R")
Examples = Sequence[Mapping[str, object]]
# Estimates by name, of a loaded model, over examples.
Estimate = Callable[[str, Loaded, Examples], Curvature]
# Estimators whose backward passes are of one observation, or whose noise is on whole weights.
_APART = ("fisher-exact", "ivon")


def load(config: PrecisionConfig) -> Loaded:
    """Load the model that the settings name."""
    return load_model(
        config.model,
        config.task,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        is_spread=config.device == SPREAD and not is_sharded(config),
    )


def with_passes(config: PrecisionConfig, work: Callable[[Estimate], R]) -> R:
    """Do work on rank 0, with a function that has all ranks estimate together.

    Args:
        config: The settings.
        work: Called on rank 0. It returns something picklable, which every rank returns.

    Raises:
        BmergeError: On every rank, the error of any.
    """
    here = _Here(config)

    def estimate(
        together: Callable[[_Pass], object], estimator: str, loaded: Loaded, examples: Examples
    ) -> Curvature:
        here.loaded = loaded
        together(_Pass(estimator, examples, _record(config, estimator, loaded, examples)))
        found, here.found = here.found, None
        assert found is not None
        return found

    def alone(together: Callable[[_Pass], object]) -> R:
        is_done = False
        try:
            result = work(partial(estimate, together))
            is_done = True
        finally:
            if here.parts is not None:
                here.parts.close(is_done=is_done)
        return result

    return lead(alone, here.join_in)


def refuse_left_over(config: PrecisionConfig) -> None:
    """Refuse to throw away what a stopped estimate has saved.

    Raises:
        CheckpointError: There is a saved state, and neither `resume` nor `force` is set.
        ConfigError: An estimator that saves none is to be resumed.
    """
    if config.resume and config.estimator == "ivon":
        raise ConfigError(
            "resume: ivon saves no state on its way. Leave --resume out, or take another estimator."
        )
    folder = parts_folder(config)
    if parts_in(folder) and not config.resume and not config.force:
        raise CheckpointError(
            f"'{folder}' holds the state of an estimate that was stopped. Go on with --resume, or "
            "start again with --force."
        )
    if config.resume and not parts_in(folder):
        logger.warning(
            "--resume: '%s' holds no saved state, so the estimate starts from the first batch",
            folder,
        )


def left_behind(config: PrecisionConfig) -> str | None:
    """What a stopped estimate leaves on the disk, and how to go on from there; None of nothing."""
    kept = config.keep_generated
    texts = kept if kept is not None and os.path.exists(os.path.expanduser(kept)) else None
    folder = parts_folder(config)
    if config.moments is None and (parts := parts_in(folder)):
        return (
            f"the state up to batch {batches_in(parts[-1]):,} is in '{folder}'; add --resume to go "
            "on from it"
        )
    if texts is not None:
        return (
            f"the texts are in '{texts}'; name it with --data instead of --self-generated, or add "
            "--force"
        )
    return None


def refuse_device(config: PrecisionConfig) -> None:
    """Refuse a device that is not there, one GPU for several processes, or what cannot be sharded.

    Raises:
        ConfigError: It is one of them.
    """
    if config.device == SPREAD:
        if is_sharded(config):
            _refuse_sharded(config)
        return
    device = choose_device(config.device)
    if launched() and device.index is not None:
        raise ConfigError(
            f"--device {config.device}: {launched()} processes would run on this one GPU. Leave "
            "--device out, and each takes its own."
        )


def _refuse_sharded(config: PrecisionConfig) -> None:
    if config.estimator in _APART:
        raise ConfigError(
            f"--estimator {config.estimator}: {launched()} processes with a part of the model each "
            "square the gradients of all their batches together, which this estimator may not. "
            "Choose ggn, fisher or fisher-empirical, or leave --device auto out."
        )
    if config.self_generated is not None:
        raise ConfigError(
            f"--self-generated: {launched()} processes with a part of the model each cannot write "
            "texts. Have them written elsewhere and name them with --data, or take "
            "--random-tokens."
        )


class _Pass(NamedTuple):
    """What rank 0 tells the others of a pass."""

    estimator: str
    examples: Examples
    record: dict[str, str | int]


def _record(
    config: PrecisionConfig, estimator: str, loaded: Loaded, examples: Examples
) -> dict[str, str | int]:
    """All that the sums depend on: a saved state of another record is not gone on from."""
    with SafetensorsSource(checkpoint_files(loaded.path)) as source:
        weights = identity(source)
    encoded = json.dumps([dict(example) for example in examples]).encode()
    return {
        "estimator": estimator,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "pool": config.pool or "",
        "dtype": config.dtype,
        "device": SPREAD if config.device == SPREAD else choose_device(config.device).type,
        "num_processes": launched() or 1,
        "weights": weights,
        "rows": sha256(encoded).hexdigest(),
        **({"blocks": config.blocks} if estimator == INPUTS else {}),
        **({"rank": config.rank} if config.rank is not None else {}),
    }


class _Here:
    """The model of this rank, and what a pass found."""

    def __init__(self, config: PrecisionConfig) -> None:
        self._config = config
        self.loaded: Loaded | None = None
        self.found: Curvature | None = None
        self.parts: Parts | None = None

    def join_in(self, asked: _Pass) -> None:
        """Make the pass, with all other ranks."""
        config = self._config
        if is_sharded(config):
            in_turn(partial(self._shard, in_step(all_ranks)))
        loaded = in_step(self._on_device)
        self.parts = Parts(
            parts_folder(config),
            asked.record,
            every=config.save_every,
            is_resumed=config.resume,
        )
        found = estimate_curvature(
            asked.estimator,
            loaded,
            asked.examples,
            batch_size=config.batch_size,
            seed=config.seed,
            keep=keeping(config, loaded.model)._replace(parts=self.parts),
        )
        self.found = found if is_main() else None

    def _shard(self, mesh: "DeviceMesh") -> None:
        self.loaded = self.loaded or load(self._config)
        with explained():
            shard(self.loaded.model, mesh, self._config.model)
            sum_gradients(self.loaded.model)

    def _on_device(self) -> Loaded:
        self.loaded = self.loaded or load(self._config)
        parameters = dict(self.loaded.model.named_parameters())
        refuse_offloaded(parameters)
        with explained():
            self.loaded.move_to(self._config.device)
        return self.loaded
