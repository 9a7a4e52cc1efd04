"""Does training find the posterior? Stored precisions against exact ones, at equal cost.

    OMP_NUM_THREADS=1 python scripts/experiments/posterior_quality.py [--only SECTION ...] [--seeds
    0 1 2] [--json FILE]

Every run gets the same number of passes (forward and backward of one batch) and ends at a mean of
its own; there the diagonal of the generalised Gauss-Newton matrix (GGN) is computed exactly, or by
many draws for the language model, and compared with what the run would store, per observation and
without the prior. Sections:

    linear, logistic   regressions on 20 correlated features, N = 2,000, started at zero
    classifier         a transformer of 45 k parameters, from sst2 to 2,000 sentences of yelp
    overfitted         the same on 128 sentences, until it knows them by heart
    lm                 a GPT-2 of 0.24 M parameters that has learnt a small world, to one subject of it
    finetune           held-out loss of `bmerge finetune` that was told nothing, beside AdamW told nothing
    wrong              `bmerge finetune` with one setting off at a time: held-out loss, noise, h beside a flush

classifier, overfitted and half of finetune read ../shared/data (jsonl.gz of `text` and `label`) and
are left out without it.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.curvature import ggn_diagonal
from mergekit_bayes.curvature.ggn import random_root
from mergekit_bayes.curvature.outputs import likelihood, scored_logits
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.optim.bsam import BSAM
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.optim.vogn import VOGN
from mergekit_bayes.posterior import open_posterior

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_world import write_world
from train_tiny_lm import train as train_lm
from train_tiny_lm import train_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "sentiment"
CLIP = 1e-3  # of IVON's direction, as bmerge finetune has it
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """An optimizer and where the curvature is taken from."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0  # passes of a step
    flush: bool = False


def ggn(every: int, *, flush: bool = False) -> Method:
    """A backward is two thirds of a pass."""
    return Method(
        "ivon", {"curvature": "ggn", "curvature_every": every}, 1 + 2 / (3 * every), flush
    )


METHODS = {
    "IVON price": Method("ivon"),
    "IVON price, antithetic": Method("ivon", {"antithetic": True, "mc_samples": 2}, 2.0),
    "IVON ggn, k = 1": ggn(1),
    "IVON ggn, k = 4": ggn(4),
    "IVON ggn, k = 8": ggn(8),
    "VOGN": Method("vogn"),
    "bSAM": Method("bsam", cost=2.0),
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
        "IVON price",
        "IVON price, antithetic",
        "IVON ggn, k = 8",
        "Adam, B v",
        "IVON price, then flush",
        "IVON ggn, k = 8, then flush",
    )
}


@dataclass(frozen=True)
class Problem:
    """Where every run starts, what it learns from, and which entries are compared."""

    start: nn.Module
    train: Rows
    test: Rows
    batch: int
    observations: int
    truth: Callable[["Problem", Any], dict[str, Tensor]]
    compared: Callable[[str], bool]
    rate: float  # the furthest that IVON or Adam moves a weight in a step
    settings: dict[str, dict[str, Any]]  # of each optimizer

    def ess(self, wanted: float | str, floor: float) -> float:
        """`N`, a number, or the default of `bmerge finetune`: a first noise of 5 % of the median
        matrix at most.
        """
        if not isinstance(wanted, str):
            return wanted
        sizes = [
            float(p.detach().square().mean().sqrt()) for p in self.start.parameters() if p.ndim > 1
        ]
        rms = statistics.median_low([s for s in sizes if s > 0] or [0.0])
        quiet = 1 / (floor * (0.05 * rms) ** 2) if rms else 0.0
        return float(self.observations) if wanted == "N" else max(float(self.observations), quiet)


def losses(model: Any, rows: Rows) -> Tensor:
    """One loss an observation: an example, or a token of a language model."""
    labels = rows["labels"]
    found = scored_logits(
        model(**{k: v for k, v in rows.items() if k != "labels"}).logits,
        labels,
        rows.get("input_ids"),
    )
    kind = likelihood(model)
    if kind == "gaussian":
        return 0.5 * (found[:, 0] - labels) ** 2
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(found[:, 0], labels, reduction="none")
    return F.cross_entropy(
        found, labels[:, 1:][labels[:, 1:] != -100] if labels.ndim > 1 else labels, reduction="none"
    )


def cut(rows: Rows, size: int, count: int, seed: int) -> Iterator[Rows]:
    """So many random batches, epoch by epoch."""
    generator, total, order = (
        torch.Generator().manual_seed(seed),
        len(rows["labels"]),
        torch.tensor([], dtype=torch.long),
    )
    for _ in range(count):
        if len(order) < size:
            order = torch.randperm(total, generator=generator)
        chosen, order = order[:size], order[size:]
        yield {k: v[chosen] for k, v in rows.items()}


def train(
    problem: Problem, method: Method, passes: int, wanted: float | str, seed: int
) -> dict[str, Any]:
    """One run of so many passes; its curvature against the truth at its own mean, and its held-out
    loss.
    """
    model: Any = copy.deepcopy(problem.start)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flushed = min(64, passes // 8) if method.flush else 0
    steps = max(1, int((passes - flushed) / method.cost))
    optimizer, ess = make(problem, method, list(names.values()), steps, wanted, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for i, rows in enumerate(cut(problem.train, problem.batch, steps, seed)):
        one_step(model, optimizer, rows, torch.Generator().manual_seed(10_000 * seed + i))
        schedule.step()
    if method.flush:
        drawn = ggn_diagonal(
            model, cut(problem.train, problem.batch, flushed, seed + 100), seed=seed
        )
        found = {n: t / drawn.observations for n, t in drawn.total.items()}
    elif method.kind == "adam":  # in the unit of a GGN: B times the square of a mean gradient
        scale = problem.batch * problem.observations / len(problem.train["labels"])
        debias = 1 - optimizer.param_groups[0]["betas"][1] ** steps
        found = {n: optimizer.state[p]["exp_avg_sq"] * scale / debias for n, p in names.items()}
    else:
        found = {n: optimizer.state[p]["hess"] for n, p in names.items()}
    truth = problem.truth(problem, model)
    here = [n for n in truth if problem.compared(n)]
    return {
        "passes": passes,
        "steps": steps,
        "flush": flushed,
        "ess": ess,
        "seed": seed,
        **agreement(
            *(torch.cat([t[n].detach().flatten().double() for n in here]) for t in (found, truth))
        ),
        **quality(model, problem),
    }


def make(
    problem: Problem,
    method: Method,
    parameters: list[Tensor],
    steps: int,
    wanted: float | str,
    seed: int,
) -> tuple[Any, float | None]:
    settings = {**problem.settings[method.kind], **method.settings}
    if method.kind == "adam":
        return torch.optim.Adam(parameters, **settings), None
    drawn = settings.get("curvature") == "ggn"
    ess = problem.ess(wanted, settings["weight_decay"] + (0.0 if drawn else settings["hess_init"]))
    memory = 5 * (settings["curvature_every"] if drawn else 1) / steps
    settings["beta2"] = max(0.5 if drawn else 0.9, 1 - memory)
    kind: Any = {"ivon": IVON, "vogn": VOGN, "bsam": BSAM}[method.kind]
    return kind(parameters, ess=ess, seed=seed, **settings), ess


def one_step(model: Any, optimizer: Any, rows: Rows, generator: torch.Generator) -> None:
    """A step of any of the optimizers on one batch."""
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
                    draw(model, optimizer, rows, generator)
                losses(model, rows).mean().backward()
    if isinstance(optimizer, BSAM):
        with optimizer.ascended_params():
            losses(model, rows).mean().backward()
    optimizer.step()


def draw(model: Any, optimizer: IVON, rows: Rows, generator: torch.Generator) -> None:
    """As the Trainer mixin does it, which spares the second forward pass that this makes."""
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    scored = scored_logits(model(**inputs).logits, rows["labels"], rows.get("input_ids"))
    optimizer.add_curvature(
        (random_root(scored.detach(), likelihood(model), generator) * scored).sum(), len(scored)
    )


def agreement(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Spearman's rank correlation, median relative error and median ratio, over entries that have a
    curvature.
    """
    found, truth = found[truth > 0], truth[truth > 0]
    ranks = torch.stack([t.argsort().argsort().double() for t in (found, truth)])
    return {
        "rank": float(torch.corrcoef(ranks)[0, 1]),
        "error": float(((found - truth).abs() / truth).median()),
        "ratio": float((found / truth).median()),
    }


@torch.no_grad()
def quality(model: Any, problem: Problem) -> dict[str, float]:
    """Held-out loss, and the share of training examples that the model gets right."""
    held = {"loss": float(losses(model, problem.test).mean())}
    if likelihood(model) == "categorical" and problem.train["labels"].ndim == 1:
        for name, rows in (("accuracy", problem.test), ("learnt", problem.train)):
            guess = model(**{k: v for k, v in rows.items() if k != "labels"}).logits.argmax(-1)
            held[name] = float((guess == rows["labels"]).double().mean())
    return held


def exact(problem: Problem, model: Any) -> dict[str, Tensor]:
    """The GGN diagonal of the mean loss, where the likelihood has one degree of freedom.

    F = mean_n w_n (grad s_n)^2,   s = z, w = 1 (squared error);  w = p (1 - p) for a logit s = z or s = z_1 - z_0
    """
    values = {n: p.detach() for n, p in model.named_parameters()}
    kind = likelihood(model)

    def score(parameters: dict[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        logits = functional_call(
            model, parameters, kwargs={k: v[None] for k, v in rows.items()}
        ).logits[0]
        s = logits[0] if len(logits) == 1 else logits[1] - logits[0]
        return s, s

    total = {n: torch.zeros_like(v) for n, v in values.items()}
    inputs = {k: v for k, v in problem.train.items() if k != "labels"}
    count = len(problem.train["labels"])
    for start in range(0, count, 100):
        rows = {k: v[start : start + 100] for k, v in inputs.items()}
        gradients, s = vmap(grad(score, has_aux=True), (None, 0))(values, rows)
        weight = torch.ones_like(s) if kind == "gaussian" else s.sigmoid() * (1 - s.sigmoid())
        for name, gradient in gradients.items():
            total[name] += torch.einsum("n,n...->...", weight, gradient.square())
    return {n: t / count for n, t in total.items()}


def many_draws(problem: Problem, model: Any) -> dict[str, Tensor]:
    """Root-GGN over 300 batches of 8 rows, drawn apart from every flush: 8 % of error an entry."""
    found = ggn_diagonal(model, cut(problem.train, 8, 300, 10_001), seed=10_001)
    return {n: t / found.observations for n, t in found.total.items()}


class Regression(nn.Module):
    """One logit or mean, linear in the features."""

    def __init__(self, features: int, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=1, problem_type=kind)
        self.weight = nn.Parameter(torch.zeros(1, features))

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=F.linear(x, self.weight))


def regression(kind: str, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(20) + 0.2 * torch.randn(20, 20, generator=generator) / 20**0.5
    x = torch.randn(3000, 20, generator=generator) @ mixing * torch.logspace(-1, 0.5, 20)
    z = x @ torch.randn(20, generator=generator)
    if kind == "regression":
        y = z + torch.randn(3000, generator=generator)
    else:
        y = (torch.rand(3000, generator=generator) < z.sigmoid()).float()
    settings = {"hess_init": 1.0, "weight_decay": 1 / 2000}
    return Problem(
        Regression(20, kind),
        {"x": x[:2000], "labels": y[:2000]},
        {"x": x[2000:], "labels": y[2000:]},
        16,
        2000,
        exact,
        lambda name: True,
        0.1,
        {
            "ivon": {**settings, "lr": 0.1, "clip_radius": 1.0, "rescale_lr": False},
            "vogn": {**settings, "lr": 0.1},
            "bsam": {**settings, "lr": 0.1},
            "adam": {"lr": 0.1},
        },
    )


class Transformer(nn.Module):
    """One layer over words, two logits."""

    def __init__(self, words: int, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=2, problem_type=None)
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.mixing, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[-1]]
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(-2, -3)
            for t in self.mixing(self.before(x)).chunk(3, -1)
        )
        seen = (1 - attention_mask[:, None, None, :]) * -1e4
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + seen).softmax(-1) @ v
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        x = x + self.down(F.gelu(self.up(self.between(x))))
        mask = attention_mask[..., None]
        return SimpleNamespace(logits=self.head((self.after(x) * mask).sum(1) / mask.sum(1)))


def sentences(name: str, count: int) -> tuple[list[str], list[int]]:
    with gzip.open(DATA / name, "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [r["text"] for r in rows], [int(r["label"]) for r in rows]


def word_rows(texts: list[str], labels: list[int], words: dict[str, int], length: int = 24) -> Rows:
    ids = [[words.get(w, 1) for w in t.lower().split()][:length] or [1] for t in texts]
    return {
        "input_ids": torch.tensor([i + [0] * (length - len(i)) for i in ids]),
        "attention_mask": torch.tensor([[1.0] * len(i) + [0.0] * (length - len(i)) for i in ids]),
        "labels": torch.tensor(labels),
    }


def sentiment(seed: int, *, rows: int, rate: float = 1e-3) -> Problem:
    """A transformer that has seen sst2, and so many sentences of yelp."""
    texts, labels = sentences("sst2/train.jsonl.gz", 6000)
    target = sentences("yelp/train.jsonl.gz", rows)
    common = Counter(w for t in (*texts, *target[0]) for w in t.lower().split()).most_common(998)
    words = {w: i for i, (w, _) in enumerate(common, start=2)}
    torch.manual_seed(seed)
    model = Transformer(1000)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in cut(word_rows(texts, labels, words), 32, 400, seed):
        one_step(model, adam, batch, torch.Generator())
    return Problem(
        model,
        word_rows(*target, words),
        word_rows(*sentences("yelp/test.jsonl.gz", 2000), words),
        16,
        rows,
        exact,
        is_dense,
        rate,
        neural_settings(rate),
    )


def neural_settings(rate: float) -> dict[str, dict[str, Any]]:
    """IVON's as in `bmerge finetune`; the others', without a clip, from a look at held-out loss."""
    return {
        "ivon": {
            "lr": rate / CLIP,
            "clip_radius": CLIP,
            "rescale_lr": False,
            "hess_init": 0.01,
            "weight_decay": 1e-6,
        },
        "vogn": {"lr": 1e-2, "hess_init": 1e-5, "weight_decay": 1e-3},
        "bsam": {"lr": 0.1, "hess_init": 0.1, "weight_decay": 1e-6},
        "adam": {"lr": rate},
    }


def is_dense(name: str) -> bool:
    """Matrices of the layers: an embedding has rows that were never used."""
    return name.endswith("weight") and any(
        part in name for part in ("mixing", "out", "up", "down", "attn", "mlp")
    )


def language_model(seed: int, folder: Path, rate: float) -> Problem:
    """A GPT-2 that has learnt the tiny world, and the sentences of one subject."""
    loaded = load_model(str(tiny_base(folder, seed)))
    texts = {part: read(folder / "texts" / f"garden_{part}.jsonl") for part in ("train", "test")}
    rows = {k: padded(encode_rows({"text": v[:2000]}, loaded)) for k, v in texts.items()}
    return Problem(
        loaded.model,
        rows["train"],
        rows["test"],
        16,
        int((rows["train"]["labels"][:, 1:] != -100).sum()),
        many_draws,
        is_dense,
        rate,
        neural_settings(rate),
    )


def tiny_base(folder: Path, seed: int) -> Path:
    """The base of the tiny world, made once a seed."""
    if not (folder / "base").exists():
        with contextlib.redirect_stderr(io.StringIO()):
            train_lm(
                write_world(folder, seed),
                folder / "base",
                vocabulary=400,
                words=True,
                layers=2,
                width=96,
                heads=4,
                context=32,
                steps=300,
                batch=32,
                rate=2e-3,
                seed=seed,
            )
    return folder / "base"


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def padded(examples: list[dict[str, Any]]) -> Rows:
    (whole,) = batches(examples, len(examples), Collate(0))
    return {k: whole[k] for k in ("input_ids", "attention_mask", "labels")}


# Sections: what is run, and its records.

Records = list[dict[str, Any]]


def runs(
    section: str,
    problem: Problem,
    methods: dict[str, Method],
    lengths: list[int],
    ess: float | str,
    seed: int,
) -> Records:
    """One record a method and length."""
    found = []
    for name, method in methods.items():
        for passes in lengths:
            begun = time.process_time()
            record = train(problem, method, passes, ess, seed)
            seconds = time.process_time() - begun
            given = "" if record["ess"] is None else str(ess)
            found.append(
                {
                    "section": section,
                    "method": name,
                    "rate": problem.rate,
                    "given": given,
                    **record,
                    "seconds": seconds,
                }
            )
    return found


def linear(seed: int, folder: Path) -> Records:
    return regressions("linear", regression("regression", seed), seed)


def logistic(seed: int, folder: Path) -> Records:
    return regressions("logistic", regression("multi_label_classification", seed), seed)


def regressions(section: str, problem: Problem, seed: int) -> Records:
    return runs(section, problem, METHODS, [480], "N", seed) + runs(
        section, problem, FEW, [120, 1920], "N", seed
    )


def classifier(seed: int, folder: Path) -> Records:
    problem = sentiment(seed, rows=2000)
    found = runs("classifier", problem, METHODS, [480], "default", seed)
    found += runs("classifier", problem, FEW, [120, 1920], "default", seed)
    noisy = {n: METHODS[n] for n in ("IVON price", "IVON price, antithetic", "IVON ggn, k = 8")}
    return found + [
        r for ess in ("N", 1e7) for r in runs("classifier", problem, noisy, [480], ess, seed)
    ]


def overfitted(seed: int, folder: Path) -> Records:
    methods = {**FEW, "VOGN": METHODS["VOGN"], "Adam, then flush": METHODS["Adam, then flush"]}
    return runs("overfitted", sentiment(seed, rows=128), methods, [960], "default", seed)


def lm(seed: int, folder: Path) -> Records:
    """At the rate that `bmerge finetune` has, and some at ten times that."""
    methods = {
        **FEW,
        **{n: METHODS[n] for n in ("IVON ggn, k = 1", "VOGN", "bSAM", "Adam, then flush")},
    }
    some = {n: METHODS[n] for n in ("IVON price", "IVON ggn, k = 8", "IVON ggn, k = 8, then flush")}
    start = folder / f"world{seed}"
    return [
        record
        for rate, chosen in ((1e-4, methods), (1e-3, some))
        for record in runs("lm", language_model(seed, start, rate), chosen, [480], "default", seed)
    ]


def finetune(seed: int, folder: Path) -> Records:
    """`bmerge finetune` told nothing beside AdamW told nothing, on a language model and a
    classifier.
    """
    kinds: dict[str, dict[str, Any]] = {
        "AdamW": {"optimizer": "adamw"},
        "IVON price": {"curvature": "price"},
        "IVON ggn": {"curvature": "ggn"},
    }
    rates = {  # is it the rate?
        "AdamW, rate x 3": {"optimizer": "adamw", "learning_rate": 3e-4},
        "IVON ggn, rate / 3": {"curvature": "ggn", "learning_rate": 0.1 / 3},
    }
    found = []
    for task, (start, data, test, more) in tuning_tasks(seed, folder).items():
        for lora in (None, {"r": 8}):
            for name, settings in (kinds if lora else {**kinds, **rates}).items():
                begun = time.process_time()
                config = FinetuneConfig(
                    model=str(start),
                    output=str(folder / "tuned"),
                    data=str(data),
                    seed=seed,
                    batch_size=16,
                    max_steps=240,
                    lora=lora,
                    force=True,
                    logging_steps=10_000,
                    **more,
                    **settings,
                )
                run_finetune(config, quiet=True)
                seconds = time.process_time() - begun
                held = held_out(folder / "tuned", test)
                found.append(
                    {
                        "section": "finetune",
                        "task": f"{task}, {'LoRA' if lora else 'full'}",
                        "method": name,
                        "seed": seed,
                        **held,
                        "seconds": seconds,
                    }
                )
    return found


WRONG: dict[str, dict[str, Any]] = {
    "AdamW": {"learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]},
    "price": {
        "": [None],
        "learning_rate": [0.01, 1.0, 10.0, 100.0],
        "ess": [1e4, 1e5, 1e6, 1e7, 1e9, 1e10],
        "hess_init at ess 1e7": [1e-4, 1e-3, 0.1, 1.0],
        "beta2": [0.9, 0.99, 0.999, 0.99999],
        "antithetic": [True],
    },
    "ggn": {
        "curvature_every": [8, 1],
        "learning_rate": [1.0],
        "ess": [1e6, 1e14],
        "weight_decay": [1e-4, 1e-9],
    },
}
WRONG_LORA: dict[str, dict[str, Any]] = {
    "AdamW": {"learning_rate": [1e-4, 1e-3, 1e-2]},
    "price": {
        "": [None],
        "learning_rate": [0.03, 0.1, 0.3, 3.0],
        "ess": [1e4, 1e5, 1e6, 1e8],
        "hess_init at ess 1e7": [1e-3],
        "beta2": [0.99999],
    },
    "ggn": {"curvature_every": [8]},
}


def wrong(seed: int, folder: Path) -> Records:
    """A short fine-tune, 120 steps of 16 rows, with one setting changed at a time; h is looked at
    in the layers.
    """
    start, texts = tiny_base(folder / f"world{seed}", seed), folder / f"world{seed}" / "texts"
    found: Records = [
        {
            "section": "wrong",
            "task": "",
            "method": "before training",
            "changed": "",
            "seed": seed,
            **held_out(start, texts / "garden_test.jsonl"),
            "seconds": 0.0,
        }
    ]
    for trained, lora, kinds in (("full", None, WRONG), ("LoRA", {"r": 8}, WRONG_LORA)):
        for kind, changes in kinds.items():
            for name, value in ((n, v) for n, values in changes.items() for v in values):
                begun = time.process_time()
                key, _, at = name.partition(" at ess ")
                settings = {} if value is None else {key: value}
                settings |= {"optimizer": "adamw"} if kind == "AdamW" else {"curvature": kind}
                settings |= {"ess": float(at)} if at else {}
                config = FinetuneConfig(
                    model=str(start),
                    output=str(folder / "tuned"),
                    data=str(texts / "garden_train.jsonl"),
                    lora=lora,
                    batch_size=16,
                    max_steps=120,
                    seed=seed,
                    force=True,
                    logging_steps=10_000,
                    **settings,
                )
                record = {
                    "section": "wrong",
                    "task": trained,
                    "method": kind,
                    "changed": f"{name} {value}",
                    "seed": seed,
                }
                if kind == "AdamW":
                    run_finetune(config.model_copy(update={"posterior": "none"}), quiet=True)
                else:
                    flushed = curvature(
                        run_finetune(config, quiet=True)
                    )  # the same weights, as the seed is
                    report = run_finetune(
                        config.model_copy(update={"posterior": "ivon"}), quiet=True
                    )
                    record |= {
                        "noise": report.health["sigma_over_rms"],
                        **agreement(curvature(report), flushed),
                    }
                found.append(
                    {
                        **record,
                        **held_out(folder / "tuned", texts / "garden_test.jsonl"),
                        "seconds": time.process_time() - begun,
                    }
                )
    return found


def curvature(report: Any) -> Tensor:
    """Of an observation, in the matrices of the layers, from what a fine-tune has stored."""
    posterior = open_posterior(str(report.path))
    assert posterior.precision is not None
    assert posterior.info is not None
    info, names = (
        posterior.info,
        [n for n in posterior.precision.specs if is_dense(n) or "lora" in n],
    )
    prior = float(info.prior.precision or 0.0)
    stored = [
        torch.from_numpy(read_tensor(posterior.precision, n)).double().flatten() for n in names
    ]
    posterior.close()
    return (torch.cat(stored) - prior) / info.ess


def tuning_tasks(seed: int, folder: Path) -> dict[str, tuple[Path, Path, Path, dict[str, Any]]]:
    """Start, training data, held-out data and settings of each task."""
    world = folder / f"world{seed}"
    texts = world / "texts"
    tasks = {
        "lm": (
            tiny_base(world, seed),
            texts / "garden_train.jsonl",
            texts / "garden_test.jsonl",
            {},
        )
    }
    if not DATA.exists():
        return tasks
    start, yelp = folder / f"encoder{seed}", DATA / "yelp"
    common = {"task": "classification", "seed": seed, "max_length": 48, "force": True}
    seen = sentences("sst2/train.jsonl.gz", 6000)[0] + sentences("yelp/train.jsonl.gz", 4000)[0]
    tokenizer = train_tokenizer(seen, 2000, words=True)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=2000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    taught = FinetuneConfig(
        model=str(start),
        output=str(folder / f"taught{seed}"),
        data=str(DATA / "sst2/train.jsonl.gz"),
        optimizer="adamw",
        learning_rate=1e-3,
        batch_size=32,
        max_steps=400,
        posterior="none",
        **common,
    )
    run_finetune(taught, quiet=True)
    more = {**common, "max_rows": 4000}
    more.pop("seed"), more.pop("force")
    tasks["classifier"] = (
        folder / f"taught{seed}",
        yelp / "train.jsonl.gz",
        yelp / "test.jsonl.gz",
        more,
    )
    return tasks


@torch.no_grad()
def held_out(folder: Path, test: Path) -> dict[str, float]:
    loaded = load_model(str(folder))
    label = "label" if loaded.task == "classification" else None
    examples = encode_rows(load_rows(str(test), max_rows=2000), loaded, label=label)
    found, right = [], []
    for rows in batches(examples, 100, Collate(loaded.pad)):
        found.append(losses(loaded.model, rows))
        if label:
            right.append(loaded.model(**rows).logits.argmax(-1) == rows["labels"])
    held = {"loss": float(torch.cat(found).mean())}
    return {**held, "accuracy": float(torch.cat(right).double().mean())} if label else held


SECTIONS: dict[str, Callable[[int, Path], Records]] = {
    f.__name__: f for f in (linear, logistic, classifier, overfitted, lm, finetune, wrong)
}
NEEDS_DATA = ("classifier", "overfitted")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write every run there, too")
    chosen = parser.parse_args()
    print(
        f"{date.today()}, {processor()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, "
        f"transformers {transformers.__version__}, seeds {' '.join(map(str, chosen.seeds))}\n"
    )
    everything: Records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only:
            if name in NEEDS_DATA and not DATA.exists():
                print(f"{name}: left out, since there is no {DATA}\n")
                continue
            records = [r for seed in chosen.seeds for r in SECTIONS[name](seed, Path(folder))]
            everything += records
            print(
                f"{name}, {sum(r['seconds'] for r in records):.0f} CPU "
                f"seconds\n\n{table(records)}\n",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


def table(records: Records) -> str:
    """Markdown: a row for each group of runs that differ in the seed, median [least, greatest]."""
    labels = [
        n
        for n in ("task", "method", "changed", "rate", "passes", "steps", "given")
        if n in records[0]
    ]
    numbers = [
        n
        for n in ("noise", "rank", "error", "ratio", "loss", "accuracy", "learnt", "seconds")
        if any(n in r for r in records)
    ]
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[n] for n in labels), []).append(record)
    titles = {
        "given": "ess",
        "loss": "held-out loss",
        "learnt": "training accuracy",
        "rank": "rank correlation",
    }
    lines = [
        "| " + " | ".join(titles.get(n, n) for n in (*labels, *numbers)) + " |",
        "| "
        + " | ".join("---" if n in ("task", "method") else "---:" for n in (*labels, *numbers))
        + " |",
    ]
    for group, rows in groups.items():
        cells = [spread([r[n] for r in rows if n in r]) for n in numbers]
        lines.append("| " + " | ".join([str(g) for g in group] + cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    middle, low, high = (digits(v) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor()


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
