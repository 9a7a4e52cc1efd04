"""Settings of IVON for one training: what was left out follows from model, data and steps.

    IVON(model.parameters(), **ivon_settings(model, observations, steps))

`bmerge finetune` and the Trainers of this package choose by the same rules. The measurements
behind them are in `docs/experiments.md`.
"""

import inspect
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from mergekit_bayes.errors import ConfigError, did_you_mean
from mergekit_bayes.lora import initial_identity
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.rates import checked_rate
from mergekit_bayes.posterior import Predictive

WEIGHT_DECAY = 1e-6  # prior precision over ess
# Standard deviations as shares of the typical weight: at the start, where `ess` is left out, and
# the largest one where `damping` is.
_START_NOISE, _NOISE = 0.05, 0.15
_LEAST_ESS = 1e6
_WIDENING = 3.0  # of the variance of draws for prediction, over that of the training


@dataclass(frozen=True)
class IvonChoices:
    """Arguments of `IVON` besides the learning rate, the weight decay and the seed.

    The names are those of `IVON` and `FinetuneConfig`, where they are documented.
    """

    ess: float
    hess_init: float
    beta1: float
    beta2: float
    clip_radius: float
    rescale_lr: bool
    mc_samples: int
    antithetic: bool
    rank_noise: bool
    curvature: Literal["price", "ggn"]
    curvature_every: int
    damping: float


def ivon_settings(
    model: torch.nn.Module,
    observations: float,
    steps: int,
    *,
    learning_rate: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
    seed: int = 0,
    **given: Any,
) -> dict[str, Any]:
    """Keyword arguments of `IVON` for a training.

    Args:
        model: The model that is trained, with its adapter if there is one.
        observations: Number of observations in the data: scored tokens, or examples.
        steps: Optimizer steps of the whole run.
        learning_rate: The largest change of a weight in one step, to be chosen like AdamW's rate;
            by default 1e-4, and 1e-3 for an adapter. IVON's `lr` follows from it.
        weight_decay: Prior precision over `ess`.
        seed: Seed of the noise.
        **given: Other arguments of `IVON`, which are taken as they are.

    Raises:
        ConfigError: A setting that IVON does not have, or a learning rate in another unit.
    """
    _refuse_unknown(given)
    names = [field.name for field in fields(IvonChoices)]
    own = {name: given.pop(name) for name in names if name in given}
    choices = choose_ivon(model, observations, steps, weight_decay=weight_decay, **own)
    if learning_rate is None:
        learning_rate = 1e-3 if hasattr(model, "peft_config") else 1e-4
    is_rescaled = choices.rescale_lr and choices.curvature == "price"
    scale = choices.hess_init + weight_decay if is_rescaled else 1.0
    lr = checked_rate(learning_rate, choices.clip_radius, scale)
    return {"lr": lr, "weight_decay": weight_decay, "seed": seed, **asdict(choices), **given}


def choose_ivon(
    model: torch.nn.Module,
    observations: float,
    steps: int,
    *,
    weight_decay: float,
    ess: float | None = None,
    hess_init: float = 0.01,
    beta1: float = 0.9,
    beta2: float | None = None,
    clip_radius: float = 1e-3,
    rescale_lr: bool = False,
    mc_samples: int = 1,
    antithetic: bool = False,
    rank_noise: bool = False,
    curvature: Literal["price", "ggn"] = "ggn",
    curvature_every: int = 8,
    damping: float | None = None,
) -> IvonChoices:
    """Fill in what the settings leave open.

        ess      the observations, at least 1e6 (`ggn`); under `price`, or with a `damping` of
                 one's own, or more until the noise of an entry at the start, or without curvature,
                 is 5 % of the median weight matrix' RMS
        damping  1 / (ess (0.15 RMS)^2), so that no weight's noise exceeds 15 % of that RMS (`ggn`)
        beta2    the Hessian remembers a fifth of the run

    Args:
        model: The model that is trained, with its adapter if there is one.
        observations: Number of observations in the data.
        steps: Optimizer steps of the whole run.
        weight_decay: Prior precision over `ess`.
        ess: Effective sample size; None to choose it.
        hess_init: Start value of the Hessian.
        beta1: Memory of the gradient.
        beta2: Memory of the Hessian; None to choose it.
        clip_radius: Bound on each entry of the direction.
        rescale_lr: As in `IVON`.
        mc_samples: Weight samples of a step; at least two with `antithetic`.
        antithetic: As in `IVON`.
        rank_noise: As in `IVON`.
        curvature: As in `IVON`.
        curvature_every: As in `IVON`.
        damping: What is added to the Hessian under `ggn`; None to choose it.
    """
    ggn = curvature == "ggn"
    typical = _typical_size(model)
    if ggn and damping is None and typical:
        ess = ess or max(float(observations), _LEAST_ESS)
        damping = 1 / (ess * (_NOISE * typical) ** 2)
    damping = damping or 0.0
    if ess is None:
        # The least curvature that an entry can start from. Under `ggn` an entry that no output
        # depends on keeps it.
        floor = weight_decay + damping if ggn else hess_init
        quiet = 1 / (floor * (_START_NOISE * typical) ** 2) if typical else 0.0
        ess = max(float(observations), quiet)
    forgetting = 5 * (curvature_every if ggn else 1) / steps
    return IvonChoices(
        ess=ess,
        hess_init=hess_init,
        beta1=beta1,
        beta2=min(0.99999, max(0.5 if ggn else 0.9, 1 - forgetting)) if beta2 is None else beta2,
        clip_radius=clip_radius,
        rescale_lr=rescale_lr,
        mc_samples=max(2, mc_samples) if antithetic else mc_samples,
        antithetic=antithetic,
        rank_noise=rank_noise,
        curvature=curvature,
        curvature_every=curvature_every,
        damping=damping,
    )


def predictive(
    count: float, *, ess: float, damping: float, weight_decay: float
) -> Predictive | None:
    """How weights are drawn around the mean of a training under noise.

        sigma^2 = 3 / (ess (h + damping + weight_decay))

    The draws have three times the variance of those of the training: averages over them are
    better than over the training's own (`docs/experiments.md`, on calibration).

    Args:
        count: The observations by which the stored precision is scaled, `count (h + prior)`.
        ess: That of the training.
        damping: That of the training.
        weight_decay: That of the training.

    Returns:
        None without damping, where nothing bounds the noise of entries without curvature.
    """
    if not damping:
        return None
    return Predictive(prior=count * (damping + weight_decay), temperature=_WIDENING * count / ess)


def initial_a(model: torch.nn.Module) -> str:
    """Hash of the A factors that an adapter has at the start, by which equal starts are known."""
    factors = {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }
    return initial_identity(factors)


def _typical_size(model: torch.nn.Module) -> float:
    """The RMS of the median weight matrix that is trained and not zero; 0 where there is none."""
    sizes = [
        float(p.detach().float().square().mean().sqrt())
        for p in model.parameters()
        if p.requires_grad and p.ndim > 1
    ]
    nonzero = sorted(size for size in sizes if size > 0)
    return nonzero[len(nonzero) // 2] if nonzero else 0.0


def _refuse_unknown(given: dict[str, Any]) -> None:
    if "lr" in given:
        raise ConfigError(
            "lr: give learning_rate, the largest change of a weight in one step, from which IVON's "
            "lr follows."
        )
    names = set(inspect.signature(IVON).parameters) - {"params", "lr"}
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names) or f"one of {', '.join(sorted(names))}."
            raise ConfigError(f"IVON has no setting '{name}'; {hint}")
