"""Propose scales by Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011)."""

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.preview.settings import PreviewConfig, Vector

if TYPE_CHECKING:
    pass

_SMALLEST = 1e-3  # of a share, so that they never sum to zero


def refuse_search(config: PreviewConfig) -> None:
    """Refuse a search that cannot be made, before anything is read.

    Raises:
        ConfigError: Optuna is not installed, or the range is empty.
    """
    if config.search is None:
        if config.between is not None:
            raise ConfigError("--between is about --search N, which is not given.")
        return
    if find_spec("optuna") is None:
        raise ConfigError(
            "--search needs Optuna, which is not installed: pip install 'mergekit-bayes[search]'"
        )
    if config.between is not None:
        ends = config.between
        if len(ends) != 2 or not all(map(math.isfinite, ends)) or not ends[0] < ends[1]:
            given = ",".join(f"{end:g}" for end in ends)
            raise ConfigError(f"--between {given}: expected LOW,HIGH, the lower first.")


class Search:
    """Proposes scales, and learns what they cost. The same seed and costs give the same proposals.

    Args:
        config: What is previewed.
        own: The recipe's scales.
        shares: Whether the scales are shares of an average, which are proposed with sum 1.
    """

    def __init__(self, config: PreviewConfig, own: Vector, *, shares: bool) -> None:
        import optuna
        from optuna.distributions import FloatDistribution

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed))
        self._shares = shares
        ranges = [(_SMALLEST, 1.0) if shares else _range(config, scale) for scale in own]
        self._spaces = {f"scale_{i}": FloatDistribution(*ends) for i, ends in enumerate(ranges)}
        self._trial: optuna.Trial | None = None

    def know(self, scales: Vector, cost: float) -> None:
        """Learn what scales cost that were not proposed; those outside of the range do not count.

        Args:
            scales: One for each task.
            cost: In nats an observation; infinite where they cannot be merged.
        """
        largest = max(scales) if self._shares and max(scales) > 0 else 1.0
        params = {n: x / largest for n, x in zip(self._spaces, scales, strict=True)}
        inside = all(s.low <= params[n] <= s.high for n, s in self._spaces.items())
        if inside and math.isfinite(cost):
            trial = self._optuna.create_trial(
                params=params, distributions=dict(self._spaces), value=cost
            )
            self._study.add_trial(trial)

    def propose(self) -> Vector:
        """The next scales to try, one for each task."""
        self._trial = self._study.ask(dict(self._spaces))
        scales = tuple(float(self._trial.params[name]) for name in self._spaces)
        if not self._shares:
            return scales
        total = math.fsum(scales)
        return tuple(scale / total for scale in scales)

    def learn(self, cost: float) -> None:
        """Learn what the proposed scales cost."""
        if self._trial is None:
            raise ValueError("nothing was proposed")
        state = self._optuna.trial.TrialState
        if math.isfinite(cost):
            self._study.tell(self._trial, cost)
        else:
            self._study.tell(self._trial, state=state.FAIL)
        self._trial = None


def _range(config: PreviewConfig, scale: float) -> tuple[float, float]:
    if config.between is not None:
        low, high = config.between
        return low, high
    end = 2 * scale or 1.0
    return min(0.0, end), max(0.0, end)
