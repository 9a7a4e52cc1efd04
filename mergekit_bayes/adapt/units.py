"""How much everything counts in an adaptation, and what is chosen where settings are left out."""

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.optim.rates import rate_from_bound
from mergekit_bayes.posterior import PosteriorInfo

_CLIP: float = FinetuneConfig.model_fields["clip_radius"].default  # of IVON in an adaptation
_STEP = 2e-3  # learning rate over the typical weight
_ADAPTER = 10.0  # an adapter's factors start small, and its rate is this many times as large


@dataclass(frozen=True)
class Units:
    """The weights of the terms of an adaptation, all in nats of the summed loss.

    Attributes:
        unit: What an observation is: a token or an example.
        removed: N_r, observations of the removed rows.
        added: N_a, observations of the added rows.
        contrast: Observations of the rows that match the removed ones; together they count N_r.
        memory: |M|, observations of the memory that is trained on.
        base: N_0, observations that the start stands for.
        base_is_recorded: Whether its posterior or the settings say so; otherwise it is assumed.
        kappa: Weight of one memory observation.
        tau: Weight of the K-prior.
        learning_rate: At the start: the largest change of a weight in a step with IVON.
        lr: The same as the optimizer takes it: for IVON in the published unit.
        steps: Optimizer steps at most.
    """

    unit: str
    removed: int
    added: int
    contrast: int
    memory: int
    base: float
    base_is_recorded: bool
    kappa: float
    tau: float
    learning_rate: float
    lr: float
    steps: int

    @property
    def edited(self) -> int:
        """N, the observations that are removed and added; the loss is reported over them."""
        return self.removed + self.added

    def weight_of(self, part: str) -> float:
        """The factor before the summed loss of a part: `remove`, `add`, `contrast` or `memory`."""
        if part == "memory":
            return self.tau * self.kappa
        return self.removed / self.contrast if part == "contrast" else 1.0

    def record(self) -> dict[str, float]:
        """The numbers under the names by which posteriors and checkpoints store them."""
        return {
            "removed": self.removed,
            "added": self.added,
            "contrast": self.contrast,
            "memory": self.memory,
            "base": self.base,
            "kappa": self.kappa,
            "tau": self.tau,
            "lr": self.lr,
            "steps": self.steps,
        }

    def summary(self) -> str:
        """One line for the user, including what was chosen for them."""
        counts = [
            f"{count:,} {name}"
            for name, count in (
                ("removed", self.removed),
                ("added", self.added),
                ("in the memory", self.memory),
            )
            if count
        ]
        source = "recorded" if self.base_is_recorded else "assumed"
        kappa = f"kappa {self.kappa:.4g}, " if self.memory else ""
        return (
            f"{', '.join(counts)} ({self.unit}s); base {self.base:,.0f} ({source}); "
            f"{kappa}tau {self.tau:g}, learning_rate {self.learning_rate:.3g}, at most "
            f"{self.steps:,} steps"
        )


def stored_count(info: PosteriorInfo) -> float | None:
    """N_0, the observations that a stored precision stands for; None if unknown.

    A merge on a base records what its tasks added to that of the base, and the base inside it
    counts as often as one task at scale 1.
    """
    if info.merge is None or info.prior.kind != "base" or info.observations is None:
        return info.observations
    common = info.merge.common_count
    return None if common is None else common + info.observations


def choose_units(
    config: AdaptConfig,
    loaded: Loaded,
    counts: Mapping[str, int],
    info: PosteriorInfo | None,
    unit: str,
) -> Units:
    """Fill in what the settings leave open.

        N_0            recorded by the posterior, else base_multiple (N_r + N_a)
        kappa          N_0 / |M|
        learning_rate  2e-3 of the median RMS of the weight matrices; ten times that for an adapter

    Args:
        config: The settings.
        loaded: The model, before an adapter is put on it.
        counts: Observations of each part, by its name.
        info: The record of the model's posterior; None without one.
        unit: Name of one observation.

    Raises:
        ConfigError: The posterior counts in another unit or stands for nothing, or the weights are
            all zero.
    """
    removed, added = counts.get("remove", 0), counts.get("add", 0)
    base = config.base_observations
    if base is None and info is not None and (base := stored_count(info)) is not None:
        if info.unit is not None and info.unit != unit:
            raise ConfigError(
                f"the posterior of '{config.model}' counts {info.unit}s, and this task {unit}s. "
                "Give base_observations."
            )
        if base <= 0:
            raise ConfigError(
                f"the posterior of '{config.model}' stands for {base:g} {unit}s, and nothing can "
                "be weighed by that. Give base_observations."
            )
    is_recorded = base is not None
    if base is None:
        base = config.base_multiple * (removed + added)
    memory = counts.get("memory", 0)
    rate = _learning_rate(config, loaded)
    kappa = config.kappa
    if kappa is None:
        kappa = base / memory if memory else 0.0
    return Units(
        unit=unit,
        removed=removed,
        added=added,
        contrast=counts.get("contrast", 0),
        memory=memory,
        base=base,
        base_is_recorded=is_recorded,
        kappa=kappa,
        tau=config.tau,
        learning_rate=rate,
        lr=_optimizer_rate(config, rate),
        steps=config.max_steps,
    )


def _optimizer_rate(config: AdaptConfig, rate: float) -> float:
    """The rate as the optimizer takes it; one that was chosen has the bits of earlier versions."""
    if config.optimizer != "ivon":
        return rate
    return rate / _CLIP if config.learning_rate is None else rate_from_bound(rate, _CLIP)


def _learning_rate(config: AdaptConfig, loaded: Loaded) -> float:
    if config.learning_rate is not None:
        return config.learning_rate
    sizes = sorted(
        size
        for p in loaded.model.parameters()
        if p.is_floating_point()
        and p.ndim > 1
        and (size := float(p.detach().float().square().mean().sqrt())) > 0
    )
    if not sizes:
        raise ConfigError("learning_rate: the model has no weights to tell one from. Give it.")
    return _STEP * sizes[len(sizes) // 2] * (_ADAPTER if config.lora is not None else 1)
