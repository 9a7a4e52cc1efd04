"""The parts of the experiment on calibration that take too long on the encoder.

`transformer` trains 45,000 parameters on 500 sentences of yelp, from a base that knows sst2: other
optimizers, sizes of the noise, laws of the noise, mixtures of runs, and 30 epochs. `language`
trains the small language model of `posterior_quality`. Rates are those which that experiment chose.
"""

import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_report import SMALL, averaged, rescaled, scores, temperature
from posterior_problems import Problem, Rows, cut, language_model, sentiment
from posterior_runs import one_step
from torch import Tensor

from mergekit_bayes.optim import BSAM, IVON, VOGN
from mergekit_bayes.trainer.choices import choose_ivon

SECTIONS = ("transformer", "language")
ROWS, VALID, DRAWS, BATCH = 500, 500, 16, 16
JSON = dict[str, Any]

# Changes of IVON's default settings, `ess` in units of the number of rows.
SIZES_OF_NOISE: dict[str, JSON] = {
    "ivon": {},
    "ivon, no noise": {"ess": 1e10, "damping": 0.01},
    **{f"ivon, ess {k or ''}N, no damping": {"ess": k or 1, "damping": 0} for k in (0, 3, 10, 100)},
    "ivon, ess N, prior by evidence": {"ess": 1, "damping": 0, "adapt_prior": True},
    "ivon, ess 100N, prior by evidence": {"ess": 100, "damping": 0, "adapt_prior": True},
    "ivon, noise x 2": {"noise": 2.0},
    "ivon, laplace noise": {"law": "laplace"},
    "ivon, uniform noise": {"law": "uniform"},
}
OTHERS = ("adam", "vogn", "bsam")


class OtherNoise(IVON):
    """IVON with noise of another law, of the same variance."""

    _gathers = False
    law = "laplace"

    def _noise(self, moved: Any, *others: Any) -> Iterator[Any]:
        state, group = moved.state, moved.group
        _, decay = self._prior_of(moved.parameter, group, state)
        generator = torch.Generator()
        for noise, h, d, *rest in super()._noise(moved, state["hess"], decay, *others):
            sigma = ((h + d) * group["ess"]).rsqrt()
            if self.law == "uniform":
                share = torch.special.ndtr(noise / sigma)
                yield (share - 0.5) * math.sqrt(12) * sigma, *rest
                continue
            # A Laplace variable is a normal one whose variance is exponential; the seed of the
            # second draw is a number of the first, so that the same noise can be made again.
            seed = int(noise.flatten()[:1].view(torch.int32)) if noise.numel() else 0
            generator.manual_seed(abs(seed))
            yield noise * torch.empty_like(noise).exponential_(generator=generator).sqrt(), *rest


def small_records(work: Path, section: str, size: str, seeds: tuple[int, ...]) -> None:
    """Add the records of a section that are not there yet."""
    file = work / SMALL
    known = [json.loads(line) for line in file.open()] if file.exists() else []
    there = {(r["section"], r["seed"]) for r in known}
    for seed in seeds:
        epochs = {"transformer": (1,) if size == "tiny" else (3, 10, 30), "language": (0,)}[section]
        for count in epochs:
            name = f"{section}, {count} epochs" if count else section
            if (name, seed) in there:
                continue
            found = list(_transformer(seed, count) if count else _language(work, seed, size))
            with file.open("a") as lines:
                for record in found:
                    lines.write(json.dumps({"section": name, "seed": seed} | record) + "\n")


def _transformer(seed: int, epochs: int) -> Iterator[JSON]:
    problem = sentiment(seed, rows=ROWS)
    labels = problem.test["labels"].numpy()
    kept: dict[str, list[np.ndarray]] = {"adam": [], "ivon": []}
    for method in (*OTHERS, *SIZES_OF_NOISE):
        runs = 3 if method in kept else 1
        for run in range(runs):
            begun = time.process_time()
            model, optimizer = _trained(problem, method, epochs, seed + 100 * run)
            seconds = time.process_time() - begun
            mean = _predicted(model, problem.test)
            drawn = None if method == "adam" else _drawn(model, optimizer, problem.test)
            if method in kept:
                kept[method].append(mean if drawn is None else drawn)
            if run:
                continue
            yield _record(
                f"{method}, at the mean" if drawn is not None else method, mean, labels, seconds
            )
            if drawn is None:
                t = temperature(mean[:VALID], labels[:VALID])
                yield _record(f"{method}, temperature", rescaled(mean, t), labels, seconds)
            else:
                yield _record(f"{method}, {DRAWS} draws", drawn, labels, seconds)
                if method == "ivon":
                    wide = _drawn(model, optimizer, problem.test, 3.0)
                    yield _record(f"{method}, {DRAWS} draws, 3 x variance", wide, labels, seconds)
        if method in kept:
            mixed = averaged(np.stack(kept[method]))
            yield _record(f"{method}, {runs} runs together", mixed, labels, runs * seconds)


def _record(method: str, log_p: np.ndarray, labels: np.ndarray, seconds: float) -> JSON:
    """Scores of the rows that chose nothing."""
    return {"method": method} | scores(log_p[VALID:], labels[VALID:]) | {"seconds": seconds}


def _trained(problem: Problem, method: str, epochs: int, seed: int) -> tuple[Any, Any]:
    model: Any = copy.deepcopy(problem.start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = math.ceil(len(problem.train["labels"]) / BATCH) * epochs
    optimizer = _optimizer(problem, method, model, parameters, steps, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for i, rows in enumerate(cut(problem.train, BATCH, steps, seed)):
        one_step(model, optimizer, rows, torch.Generator().manual_seed(10_000 * seed + i))
        schedule.step()
    return model, optimizer


def _optimizer(
    problem: Problem, method: str, model: Any, parameters: list[Tensor], steps: int, seed: int
) -> Any:
    total = float(problem.observations)
    if method == "adam":
        return torch.optim.Adam(parameters, **problem.settings["adam"])
    if method in OTHERS:
        kind: Any = {"vogn": VOGN, "bsam": BSAM}[method]
        return kind(parameters, ess=total, seed=seed, **problem.settings[method])
    changes = dict(SIZES_OF_NOISE[method])
    law, adapts = changes.pop("law", None), changes.pop("adapt_prior", False)
    wider = changes.pop("noise", 1.0)
    if changes.get("ess", 1e9) < 1e9:
        changes["ess"] *= total
    chosen = vars(choose_ivon(model, total, steps, weight_decay=1e-6, **changes))
    chosen["damping"] /= wider**2
    kind = type("Other", (OtherNoise,), {"law": law}) if law else IVON
    lr = problem.settings["ivon"]["lr"]
    return kind(parameters, lr=lr, weight_decay=1e-6, seed=seed, adapt_prior=adapts, **chosen)


@torch.no_grad()
def _predicted(model: Any, rows: Rows) -> np.ndarray:
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    log_p: np.ndarray = model(**inputs).logits.double().log_softmax(-1).numpy()
    return log_p


def _drawn(model: Any, optimizer: Any, rows: Rows, variance: float = 1.0) -> np.ndarray:
    """The average over draws of the optimizer's posterior, at a multiple of its variance."""
    found = []
    for _ in range(DRAWS):
        with torch.no_grad(), optimizer.sampled_params(temperature=variance):
            found.append(_predicted(model, rows))
    return averaged(np.stack(found))


def _language(work: Path, seed: int, size: str) -> Iterator[JSON]:
    problem = language_model(seed, work / f"language-{seed}", 1e-4)
    steps = 20 if size == "tiny" else 240
    for method in ("adam", "ivon, no noise", "ivon"):
        begun = time.process_time()
        model: Any = copy.deepcopy(problem.start)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = _optimizer(problem, method, model, parameters, steps, seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for i, rows in enumerate(cut(problem.train, BATCH, steps, seed)):
            one_step(model, optimizer, rows, torch.Generator().manual_seed(10_000 * seed + i))
            schedule.step()
        seconds = time.process_time() - begun
        mean, labels = _tokens(model, problem.test)
        yield (
            {"method": method if method == "adam" else f"{method}, at the mean"}
            | scores(mean, labels)
            | {"seconds": seconds}
        )
        if method == "ivon":
            for variance in (1.0, 3.0):
                each = []
                for _ in range(8):
                    with torch.no_grad(), optimizer.sampled_params(temperature=variance):
                        each.append(_tokens(model, problem.test)[0])
                name = f"{method}, 8 draws" + ", 3 x variance" * (variance > 1)
                yield (
                    {"method": name}
                    | scores(averaged(np.stack(each)), labels)
                    | {"seconds": seconds}
                )


@torch.no_grad()
def _tokens(model: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the scored tokens of 200 rows, and the tokens."""
    found, targets = [], []
    model.eval()
    for part in range(0, 200, 50):
        batch = {k: v[part : part + 50] for k, v in rows.items()}
        labels = batch.pop("labels")[:, 1:]
        log_p = model(**batch).logits[:, :-1].double().log_softmax(-1)
        found.append(log_p[labels != -100].numpy())
        targets.append(labels[labels != -100].numpy())
    return np.concatenate(found), np.concatenate(targets)
