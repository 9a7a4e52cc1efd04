"""The runs of `posterior_quality`: optimizers at equal cost, and how near their curvature is.

IVON's own h, from noise times gradient, is off for three reasons. The batch's noise,

    kappa = (1 - beta2) ess / (2 B)                 B: observations that enter one step

becomes a bias by the positivity term of the update, so that E[h] = F (1 + kappa) for a diagonal
Hessian F; so does the noise of all other parameters, which kappa does not see; and h still holds
the share `start` = beta2^steps of `hess_init`. Every run of that estimate records kappa, start and
`hess_noise` (`IVON.health`), which sees the other parameters' noise, too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from posterior_problems import Problem, Rows, cut, losses
from torch import Tensor

from mergekit_bayes.curvature import ggn_diagonal
from mergekit_bayes.curvature.ggn import random_root
from mergekit_bayes.curvature.outputs import likelihood, scored_logits
from mergekit_bayes.optim.bsam import BSAM
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.optim.vogn import VOGN


def linear(share: float) -> float:
    """The factor of the rate after this share of a run: down to 0."""
    return 1 - share


@dataclass(frozen=True)
class Method:
    """An optimizer, and where the curvature is taken from.

    Attributes:
        optimizer: `ivon`, `vogn`, `bsam` or `adam`.
        settings: Its settings beside those of the problem.
        cost: Passes of a step.
        flush: Whether the curvature is measured after training.
        alone: Whether the settings are complete: none of the problem's, and no beta2 chosen by
            the length of the run.
        ess: Effective sample size, a number or as in `Problem.ess`; None is the section's.
        batch: Rows a batch; None is the problem's.
        schedule: Factor of the rate by the share of the run that is over.
        max_norm: Bound on the norm of the gradient of each sample; None is no bound.
    """

    optimizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    flush: bool = False
    alone: bool = False
    ess: float | str | None = None
    batch: int | None = None
    schedule: Callable[[float], float] = linear
    max_norm: float | None = None


def ggn(every: int, *, flush: bool = False) -> Method:
    """IVON with a root-GGN draw every `every` steps; a backward is two thirds of a pass."""
    return Method(
        "ivon", {"curvature": "ggn", "curvature_every": every}, 1 + 2 / (3 * every), flush
    )


METHODS = {
    "IVON price, our settings": Method("ivon"),
    "IVON price, antithetic": Method("ivon", {"antithetic": True, "mc_samples": 2}, 2.0),
    "IVON ggn, k = 1": ggn(1),
    "IVON ggn, k = 4": ggn(4),
    "IVON ggn, k = 8": ggn(8),
    "VOGN, our settings": Method("vogn"),
    "bSAM, our settings": Method("bsam", cost=2.0),
    "Adam, B v": Method("adam"),
    "IVON price, then flush": Method("ivon", flush=True),
    "IVON ggn, k = 1, then flush": ggn(1, flush=True),
    "IVON ggn, k = 4, then flush": ggn(4, flush=True),
    "IVON ggn, k = 8, then flush": ggn(8, flush=True),
    "Adam, then flush": Method("adam", flush=True),
}
FEW = {
    n: METHODS[n]
    for n in (
        "IVON price, our settings",
        "IVON price, antithetic",
        "IVON ggn, k = 8",
        "Adam, B v",
        "IVON price, then flush",
        "IVON ggn, k = 8, then flush",
    )
}


def train(
    problem: Problem, method: Method, passes: int, ess_setting: float | str, seed: int
) -> dict[str, Any]:
    """Train for a number of passes.

    Returns:
        What `planned` does, agreement of the run's curvature with the truth at its own mean, and
        its held-out loss.
    """
    model: Any = copy.deepcopy(problem.start)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, plan = make_optimizer(
        problem, method, list(names.values()), passes, ess_setting, seed
    )
    steps, flushed = plan["steps"], plan["flush"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: method.schedule(step / steps)
    )
    batch = method.batch or problem.batch
    for i, rows in enumerate(cut(problem.train, batch, steps, seed)):
        generator = torch.Generator().manual_seed(10_000 * seed + i)
        one_step(model, optimizer, rows, generator, method.max_norm)
        schedule.step()
    if method.flush:
        estimate = ggn_diagonal(
            model, cut(problem.train, problem.batch, flushed, seed + 100), seed=seed
        )
        curvature = {n: t / estimate.observations for n, t in estimate.total.items()}
    elif method.optimizer == "adam":  # in the unit of a GGN: B times the square of a mean gradient
        scale = observations(problem, batch)
        debias = 1 - optimizer.param_groups[0]["betas"][1] ** steps
        curvature = {n: optimizer.state[p]["exp_avg_sq"] * scale / debias for n, p in names.items()}
    else:
        curvature = {n: optimizer.state[p]["hess"] for n, p in names.items()}
    truth = problem.truth(problem, model)
    compared = [n for n in truth if problem.compared(n)]
    estimated, exact = (
        torch.cat([tensors[n].detach().flatten().double() for n in compared])
        for tensors in (curvature, truth)
    )
    if "kappa" in plan:
        plan["hess_noise"] = optimizer.health(observations(problem, batch))["hess_noise"]
    return {**plan, **agreement(estimated, exact), **quality(model, problem)}


def planned(
    problem: Problem, method: Method, passes: int, ess_setting: float | str, seed: int
) -> dict[str, Any]:
    """What a run is made of, without the training.

    Returns:
        Passes, steps, batches of the flush, `ess` (None for Adam) and seed; of an h from noise *
        gradient that is compared also `kappa` and `start`.
    """
    parameters = list(copy.deepcopy(problem.start).parameters())
    return make_optimizer(problem, method, parameters, passes, ess_setting, seed)[1]


def observations(problem: Problem, batch: int) -> float:
    """Mean number of observations in a batch of this number of rows."""
    return batch * problem.observations / len(problem.train["labels"])


def make_optimizer(
    problem: Problem,
    method: Method,
    parameters: list[Tensor],
    passes: int,
    ess_setting: float | str,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """The optimizer of a method, and what `planned` returns."""
    flushed = min(64, passes // 8) if method.flush else 0
    steps = max(1, int((passes - flushed) / method.cost))
    plan = {"passes": passes, "steps": steps, "flush": flushed, "ess": None, "seed": seed}
    settings = {**({} if method.alone else problem.settings[method.optimizer]), **method.settings}
    if method.optimizer == "adam":
        return torch.optim.Adam(parameters, **settings), plan
    is_drawn = settings.get("curvature") == "ggn"
    ess = problem.ess(
        ess_setting if method.ess is None else method.ess,
        settings["weight_decay"] + (0.0 if is_drawn else settings["hess_init"]),
    )
    if not method.alone:
        memory = 5 * (settings["curvature_every"] if is_drawn else 1) / steps
        settings["beta2"] = max(0.5 if is_drawn else 0.9, 1 - memory)
    made: Any = {"ivon": IVON, "vogn": VOGN, "bsam": BSAM}[method.optimizer]
    optimizer = made(parameters, ess=ess, seed=seed, **settings)
    plan["ess"] = ess
    if method.optimizer == "ivon" and not is_drawn and not method.flush:
        health = optimizer.health(observations(problem, method.batch or problem.batch))
        plan |= {"kappa": health["kappa"], "start": settings["beta2"] ** steps}
    return optimizer, plan


def one_step(
    model: Any,
    optimizer: Any,
    rows: Rows,
    generator: torch.Generator,
    max_norm: float | None = None,
) -> None:
    """One step of any of the optimizers on one batch."""
    if isinstance(optimizer, torch.optim.Adam):
        optimizer.zero_grad()
        losses(model, rows).mean().backward()
    elif isinstance(optimizer, VOGN):
        with optimizer.sampled_params(train=True):
            optimizer.backward(losses(model, rows))
    else:
        for _ in range(int(optimizer.defaults.get("mc_samples", 1))):
            with optimizer.sampled_params(train=True):
                if isinstance(optimizer, IVON) and optimizer.curvature_due:
                    draw_curvature(model, optimizer, rows, generator)
                losses(model, rows).mean().backward()
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(optimizer, BSAM):
        with optimizer.ascended_params():
            losses(model, rows).mean().backward()
    optimizer.step()


def draw_curvature(model: Any, optimizer: IVON, rows: Rows, generator: torch.Generator) -> None:
    """One root-GGN draw. The Trainer mixin does the same without a second forward pass."""
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    scored = scored_logits(model(**inputs).logits, rows["labels"], rows.get("input_ids"))
    optimizer.add_curvature(
        (random_root(scored.detach(), likelihood(model), generator) * scored).sum(), len(scored)
    )


def agreement(estimated: Tensor, truth: Tensor) -> dict[str, float]:
    """How near an estimate is, over entries that have a curvature.

    Returns:
        Spearman's rank correlation, the median relative error, and the median ratio.
    """
    estimated, truth = estimated[truth > 0], truth[truth > 0]
    ranks = torch.stack([t.argsort().argsort().double() for t in (estimated, truth)])
    return {
        "rank": float(torch.corrcoef(ranks)[0, 1]),
        "error": float(((estimated - truth).abs() / truth).median()),
        "ratio": float((estimated / truth).median()),
    }


@torch.no_grad()
def quality(model: Any, problem: Problem) -> dict[str, float]:
    """Held-out loss, and the share of training examples that the model gets right."""
    result = {"loss": float(losses(model, problem.test).mean())}
    if likelihood(model) == "categorical" and problem.train["labels"].ndim == 1:
        for name, rows in (("accuracy", problem.test), ("learnt", problem.train)):
            guess = model(**{k: v for k, v in rows.items() if k != "labels"}).logits.argmax(-1)
            result[name] = float((guess == rows["labels"]).double().mean())
    return result
