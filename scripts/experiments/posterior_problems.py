"""The problems of `posterior_quality`: where a run starts, what it learns, and its truth."""

import contextlib
import gzip
import io
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from mergekit_bayes.curvature import ggn_diagonal
from mergekit_bayes.curvature.outputs import likelihood, scored_logits
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_world import write_world
from train_tiny_lm import train as train_lm

Rows = dict[str, Tensor]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "sentiment"
CLIP = 1e-3  # clip radius of IVON's direction, the default of bmerge finetune


@dataclass(frozen=True)
class Problem:
    """Where every run starts, what it learns from, and which entries are compared.

    Attributes:
        start: The model before training.
        train: Training rows.
        test: Held-out rows.
        batch: Rows a batch.
        observations: Observations in the training rows: examples, or tokens of a language model.
        truth: Gives the exact curvature of an observation at a model's weights.
        compared: Whether a parameter of this name is compared.
        rate: The furthest that IVON or Adam moves a weight in a step.
        settings: Settings of each optimizer.
    """

    start: nn.Module
    train: Rows
    test: Rows
    batch: int
    observations: int
    truth: Callable[["Problem", Any], dict[str, Tensor]]
    compared: Callable[[str], bool]
    rate: float
    settings: dict[str, dict[str, Any]]

    def ess(self, setting: float | str, floor: float) -> float:
        """The effective sample size of a setting.

        Args:
            setting: A number, `N`, or `default` as in `bmerge finetune`: a first noise of at most
                5 % of the median matrix.
            floor: Curvature an observation that the noise starts from.
        """
        if not isinstance(setting, str):
            return setting
        sizes = [
            float(p.detach().square().mean().sqrt()) for p in self.start.parameters() if p.ndim > 1
        ]
        rms = statistics.median_low([s for s in sizes if s > 0] or [0.0])
        quiet = 1 / (floor * (0.05 * rms) ** 2) if rms else 0.0
        return float(self.observations) if setting == "N" else max(float(self.observations), quiet)


def losses(model: Any, rows: Rows) -> Tensor:
    """The loss of each observation: an example, or a token of a language model."""
    labels = rows["labels"]
    scored = scored_logits(
        model(**{k: v for k, v in rows.items() if k != "labels"}).logits,
        labels,
        rows.get("input_ids"),
    )
    kind = likelihood(model)
    if kind == "gaussian":
        return 0.5 * (scored[:, 0] - labels) ** 2
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(scored[:, 0], labels, reduction="none")
    if labels.ndim > 1:
        labels = labels[:, 1:][labels[:, 1:] != -100]
    return F.cross_entropy(scored, labels, reduction="none")


def cut(rows: Rows, size: int, count: int, seed: int) -> Iterator[Rows]:
    """`count` random batches of `size` rows, epoch by epoch."""
    generator, total = torch.Generator().manual_seed(seed), len(rows["labels"])
    order = torch.tensor([], dtype=torch.long)
    for _ in range(count):
        if len(order) < size:
            order = torch.randperm(total, generator=generator)
        chosen, order = order[:size], order[size:]
        yield {k: v[chosen] for k, v in rows.items()}


def exact(problem: Problem, model: Any) -> dict[str, Tensor]:
    """The GGN diagonal of the mean loss, where the likelihood has one degree of freedom.

        F = mean_n w_n (grad s_n)^2

    with s = z and w = 1 for a squared error, and w = p (1 - p) for a logit s = z or s = z_1 - z_0.
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
    """Root-GGN over 300 batches of 8 rows, other draws than any flush: 8 % of error an entry."""
    estimate = ggn_diagonal(model, cut(problem.train, 8, 300, 10_001), seed=10_001)
    return {n: t / estimate.observations for n, t in estimate.total.items()}


class Regression(nn.Module):
    """One logit or mean, linear in the features."""

    def __init__(self, features: int, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=1, problem_type=kind)
        self.weight = nn.Parameter(torch.zeros(1, features))

    def forward(self, x: Tensor) -> Any:
        """Logits of shape (rows, 1), in an object as of transformers."""
        return SimpleNamespace(logits=F.linear(x, self.weight))


def regression(kind: str, seed: int) -> Problem:
    """A linear or a logistic regression on 20 correlated features."""
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
        """Logits of shape (rows, 2), in an object as of transformers."""
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
    """The first `count` texts and labels of a set."""
    with gzip.open(DATA / name, "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [r["text"] for r in rows], [int(r["label"]) for r in rows]


def word_rows(texts: list[str], labels: list[int], words: dict[str, int], length: int = 24) -> Rows:
    """Texts as word ids, cut and padded to one length; 1 stands for an unknown word."""
    ids = [[words.get(w, 1) for w in t.lower().split()][:length] or [1] for t in texts]
    return {
        "input_ids": torch.tensor([i + [0] * (length - len(i)) for i in ids]),
        "attention_mask": torch.tensor([[1.0] * len(i) + [0.0] * (length - len(i)) for i in ids]),
        "labels": torch.tensor(labels),
    }


def sentiment(seed: int, *, rows: int, rate: float = 1e-3) -> Problem:
    """A transformer trained on sst2, and this number of sentences of yelp."""
    texts, labels = sentences("sst2/train.jsonl.gz", 6000)
    target = sentences("yelp/train.jsonl.gz", rows)
    common = Counter(w for t in (*texts, *target[0]) for w in t.lower().split()).most_common(998)
    words = {w: i for i, (w, _) in enumerate(common, start=2)}
    torch.manual_seed(seed)
    model = Transformer(1000)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in cut(word_rows(texts, labels, words), 32, 400, seed):
        adam.zero_grad()
        losses(model, batch).mean().backward()
        adam.step()
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
    """IVON's as in `bmerge finetune`; the others', without a clip, chosen by held-out loss."""
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
    """Whether a parameter is a matrix of a layer: embeddings have rows that were never used."""
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
    """The texts of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def padded(examples: list[dict[str, Any]]) -> Rows:
    """All examples in one batch."""
    (batch,) = batches(examples, len(examples), Collate(0))
    return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
