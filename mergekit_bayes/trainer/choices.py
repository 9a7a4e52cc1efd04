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

WEIGHT_DECAY = 1e-6  # prior precision over ess
# Standard deviation at the start, as a share of the typical weight, where `ess` is left out.
_START_NOISE = 0.05


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
) -> IvonChoices:
    """Fill in what the settings leave open.

        ess    the observations, or more until the noise of an entry without curvature (`ggn`) or
               at the start (`price`) is 5 % of the median weight matrix' RMS
        beta2  the Hessian remembers a fifth of the run

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
    """
    ggn = curvature == "ggn"
    # The least curvature that an entry can start from. Under `ggn` an entry that no output depends
    # on keeps it.
    floor = weight_decay if ggn else hess_init
    forgetting = 5 * (curvature_every if ggn else 1) / steps
    return IvonChoices(
        ess=ess or max(float(observations), _quiet_ess(model, floor)),
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
    )


def initial_a(model: torch.nn.Module) -> str:
    """Hash of the A factors that an adapter has at the start, by which equal starts are known."""
    factors = {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }
    return initial_identity(factors)


def _quiet_ess(model: torch.nn.Module, curvature: float) -> float:
    """The ess at which the first noise is `_START_NOISE` of the median matrix's RMS."""
    sizes = [
        float(p.detach().float().square().mean().sqrt())
        for p in model.parameters()
        if p.requires_grad and p.ndim > 1
    ]
    nonzero = sorted(size for size in sizes if size > 0)
    if not nonzero:
        return 0.0
    median = nonzero[len(nonzero) // 2]
    return float(1 / (curvature * (_START_NOISE * median) ** 2))


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
