"""The pass over the examples, which all processes of a launcher make together.

The first process does everything else alone: it reads, checks and writes. The others wait until it
comes to the pass, load the model, share the batches, and wait again.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from mergekit_bayes.curvature import Curvature
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.estimate import estimate_curvature
from mergekit_bayes.models.load import Loaded, choose_device, load_model
from mergekit_bayes.precision.keeping import keeping
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.ranks import in_step, is_main, launched, lead

R = TypeVar("R")
Examples = Sequence[Mapping[str, object]]
# Estimates by name, of a loaded model, over examples.
Estimate = Callable[[str, Loaded, Examples], Curvature]


def load(config: PrecisionConfig) -> Loaded:
    """Load the model that the settings name."""
    return load_model(
        config.model, config.task, dtype=config.dtype, trust_remote_code=config.trust_remote_code
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
        together(_Pass(estimator, examples))
        found, here.found = here.found, None
        assert found is not None
        return found

    return lead(lambda together: work(partial(estimate, together)), here.join_in)


def refuse_device(config: PrecisionConfig) -> None:
    """Refuse a device that is not there, or one GPU for several processes.

    Raises:
        ConfigError: It is either.
    """
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


class _Here:
    """The model of this rank, and what a pass found."""

    def __init__(self, config: PrecisionConfig) -> None:
        self._config = config
        self.loaded: Loaded | None = None
        self.found: Curvature | None = None

    def join_in(self, asked: _Pass) -> None:
        """Make the pass, with all other ranks."""
        loaded = in_step(self._on_device)
        found = estimate_curvature(
            asked.estimator,
            loaded,
            asked.examples,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            keep=keeping(self._config, loaded.model),
        )
        self.found = found if is_main() else None

    def _on_device(self) -> Loaded:
        self.loaded = self.loaded or load(self._config)
        self.loaded.move_to(self._config.device)
        return self.loaded
