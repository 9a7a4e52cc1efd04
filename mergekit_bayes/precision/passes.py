"""The pass over the examples, which all processes of a launcher make together.

The first process does everything else alone: it reads, checks and writes. The others wait until it
comes to the pass, load the model, share the batches, and wait again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import NamedTuple, TypeVar

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.curvature import Curvature
from mergekit_bayes.curvature.parts import Parts, parts_in
from mergekit_bayes.curvature.refusals import explained, refuse_offloaded
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models.devices import SPREAD, choose_device
from mergekit_bayes.models.estimate import estimate_curvature
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.posterior.info import INPUTS
from mergekit_bayes.precision.keeping import keeping, parts_folder
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.ranks import in_step, is_main, launched, lead

R = TypeVar("R")
Examples = Sequence[Mapping[str, object]]
# Estimates by name, of a loaded model, over examples.
Estimate = Callable[[str, Loaded, Examples], Curvature]


def load(config: PrecisionConfig) -> Loaded:
    """Load the model that the settings name."""
    return load_model(
        config.model,
        config.task,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        is_spread=config.device == SPREAD,
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


def refuse_device(config: PrecisionConfig) -> None:
    """Refuse a device that is not there, or one GPU for several processes.

    Raises:
        ConfigError: It is either.
    """
    if config.device == SPREAD:
        if launched():
            raise ConfigError(
                f"--device auto: {launched()} processes would each spread the model over all GPUs. "
                "Start one, or leave --device out, and each takes a GPU."
            )
        return
    device = choose_device(config.device)
    if launched() and device.index is not None:
        raise ConfigError(
            f"--device {config.device}: {launched()} processes would run on this one GPU. Leave "
            "--device out, and each takes its own."
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
        loaded = in_step(self._on_device)
        config = self._config
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

    def _on_device(self) -> Loaded:
        self.loaded = self.loaded or load(self._config)
        parameters = dict(self.loaded.model.named_parameters())
        refuse_offloaded(parameters)
        with explained():
            self.loaded.move_to(self._config.device)
        return self.loaded
