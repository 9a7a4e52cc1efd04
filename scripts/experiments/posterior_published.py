"""Rows of `posterior_quality` with settings that authors published, and what kappa does.

Each method here has all settings of its source: rate and schedule, `ess`, beta2, start value,
prior, clip, batch and samples. What cannot be taken over is the network and the data, so the number
of passes is given in the epochs or the steps of the source, and a second length or beta2 is a row
of its own that says so in its name.

    IVON, CIFAR         Shen et al. (ICML 2024), ResNet-20 on CIFAR-10: ess = N, 200 epochs
    IVON, UCI           the same authors' settings for a small regression (NeurIPS 2021
                        competition): ess 6,000, five samples, 60 epochs
    IVON, GPT-2         the same paper, GPT-2 (125 M) on OpenWebText: ess 1e10, which is about that
                        set's number of tokens; here as written and as N
    IVON, LoRA          Cong et al. (2024), Llama-2 with adapters, here on whole weights: ess 1e7,
                        10,000 steps of 4 rows
    VOGN, CIFAR         Osawa et al. (NeurIPS 2019), LeNet-5 on CIFAR-10, 30 epochs
    bSAM, CIFAR         Möllenhoff and Khan (ICLR 2023), ResNet-18 on CIFAR-10, 180 epochs; the
                        whole batch is perturbed at once, where theirs is split in eight
"""

import math
from dataclasses import replace
from typing import Any

from posterior_problems import Problem
from posterior_runs import METHODS, Method

Run = tuple[str, Method, int]  # name of the row, method, passes


def cosine(warm: float) -> Any:
    """A schedule: linear from 0 over this share of the run, then a cosine down to 0."""

    def factor(share: float) -> float:
        if share < warm:
            return share / warm
        return 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm)))

    return factor


def constant(share: float) -> float:
    """A rate that does not change."""
    return 1.0


def by_epoch(share: float) -> float:
    """VOGN's: 0.9 as much after each of 30 epochs."""
    return float(0.9 ** int(30 * share))


CIFAR = Method(
    "ivon",
    {"lr": 0.2, "hess_init": 0.5, "beta2": 0.99999, "weight_decay": 2e-4},
    alone=True,
    ess="N",
    batch=50,
    schedule=cosine(5 / 200),
)
UCI = Method(
    "ivon",
    {"lr": 0.02, "hess_init": 0.5, "beta2": 0.999, "weight_decay": 5e-3, "mc_samples": 5},
    cost=5.0,
    alone=True,
    ess=6000.0,
    batch=8,
    schedule=constant,
)
GPT2 = Method(
    "ivon",
    {
        "lr": 300.0,
        "hess_init": 1e-3,
        "beta2": 0.99999,
        "weight_decay": 1e-6,
        "clip_radius": 1e-3,
    },
    alone=True,
    ess=1e10,
    batch=16,
    schedule=cosine(0.02),
    max_norm=1.0,
)
LORA = Method(
    "ivon",
    {
        "lr": 0.03,
        "hess_init": 1e-3,
        "beta2": 0.99999,
        "weight_decay": 0.0,
        "clip_radius": 1e-3,
        "rescale_lr": False,
    },
    alone=True,
    ess=1e7,
    batch=4,
)


def vogn(rows: int) -> Method:
    """VOGN's settings for a data set of this size: prior variance 1, untempered."""
    return Method(
        "vogn",
        {"lr": 0.01, "hess_init": 8e-3, "beta2": 0.999, "weight_decay": 1 / rows},
        alone=True,
        ess="N",
        batch=128,
        schedule=by_epoch,
    )


def bsam(rows: int) -> Method:
    """The settings of bSAM for a data set of this size: prior precision 10."""
    decay = 10 / rows
    settings = {"lr": 0.5, "hess_init": 1 - decay, "beta2": 0.999, "weight_decay": decay}
    return Method(
        "bsam",
        {**settings, "rho": 0.01, "damping": 0.1},
        cost=2.0,
        alone=True,
        ess="N",
        batch=200,
        schedule=cosine(5 / 180),
    )


def passes(problem: Problem, method: Method, epochs: int) -> int:
    """Passes of this number of epochs."""
    rows = len(problem.train["labels"])
    return int(epochs * (rows // (method.batch or problem.batch)) * method.cost)


def linear_runs(problem: Problem) -> list[Run]:
    """What the linear regression is run with: settings made for a regression."""
    return [*our_runs(), ("IVON, UCI", UCI, passes(problem, UCI, 60))]


def logistic_runs(problem: Problem) -> list[Run]:
    """What the logistic regression is run with: settings made for classifiers."""
    long = passes(problem, CIFAR, 200)
    counted, sharp = vogn(problem.observations), bsam(problem.observations)
    return [
        *our_runs(),
        ("IVON, CIFAR", CIFAR, long),
        ("IVON, CIFAR, but beta2 0.999", remembering(CIFAR, 0.999), long),
        ("VOGN, CIFAR, but one sample", counted, passes(problem, counted, 30)),
        ("bSAM, CIFAR", sharp, passes(problem, sharp, 180)),
    ]


def our_runs() -> list[Run]:
    """Our settings for the regressions, as in the other sections and with a large kappa."""
    ours = METHODS["IVON price, our settings"]
    name = "IVON price, our settings"
    return [(name, ours, 480), (name, replace(ours, ess=5e6), 480)]


def network_runs(problem: Problem) -> list[Run]:
    """What both networks are run with."""
    ours = METHODS["IVON price, our settings"]
    return [
        *(
            ("IVON price, our settings", replace(ours, ess=ess), 480)
            for ess in ("default", 1e6, 2e5, 5e4)
        ),
        ("IVON, GPT-2", GPT2, 480),
        ("IVON, GPT-2, but ess N", replace(GPT2, ess="N"), 480),
        ("IVON, LoRA", LORA, 10_000),
    ]


def classifier_runs(problem: Problem) -> list[Run]:
    """What the classifier is run with: also settings made for classifiers."""
    quick = replace(remembering(LORA, 0.999), ess=1e5)
    return [
        *network_runs(problem),
        ("IVON, LoRA, but beta2 0.999 and ess 1e5", quick, 10_000),
        ("IVON, CIFAR", CIFAR, passes(problem, CIFAR, 200)),
    ]


def remembering(method: Method, beta2: float) -> Method:
    """The method with another beta2."""
    return replace(method, settings={**method.settings, "beta2": beta2})
