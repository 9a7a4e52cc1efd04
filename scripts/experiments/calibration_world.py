"""The world of the experiment on calibration: its texts, its models, and what each predicts.

Whatever is made lies in a folder of its own, as in `sentiment_world`. A prediction is the
log-probabilities of the classes of all rows, one array for each draw of the weights.
"""

import gzip
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentiment_world import BATCH, Step, new_start, write_rows

from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.metrics.classification import class_probabilities
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.places import Place
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# Each set, and the set of another domain on which the shift is measured.
SETS = {"sst2": "sentiment/sst2", "davidson": "toxicity/davidson"}
SHIFTED = {"sst2": "sentiment/yelp", "davidson": "toxicity/olid"}
PARTS = ("valid", "test", "shift")
TOKENS = 64
RHO = 0.05  # of SAM, the radius of its authors
JSON = dict[str, Any]

# Settings of `bmerge finetune` beside epochs, batch size, length and seed.
METHODS: dict[str, JSON] = {
    "adamw": {"optimizer": "adamw"},
    "adamw, a third of the rate": {"optimizer": "adamw", "learning_rate": 1e-4 / 3},
    "ivon": {},
    # Cong et al. (2024) for adapters of Llama-2: rate, clip, start, beta2, decay and ess; not their
    # batch of 4 and 10,000 steps.
    "ivon, published": {
        "curvature": "price",
        "learning_rate": 3e-5,
        "ess": 1e7,
        "hess_init": 1e-3,
        "beta2": 0.99999,
        "weight_decay": 0.0,
        "posterior": "ivon",
    },
    "ivon, former defaults": {"learning_rate": 1e-4, "damping": 0.0},
    "ivon, cheaper": {"curvature_every": 16, "flush_batches": 16},
    "ivon, no flush": {"curvature_every": 16, "posterior": "ivon"},
    "ivon, no noise": {"ess": 1e16, "damping": 0.01, "posterior": "none"},
    "sam": {"optimizer": "sam"},
}


@dataclass(frozen=True)
class Cell:
    """How much is trained on, and how.

    Attributes:
        rows: Of the training.
        epochs: Passes over them.
        lora: Whether an adapter is trained.
    """

    rows: int
    epochs: int
    lora: bool = False

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.epochs}" + ", LoRA" * self.lora


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        seeds: Of heads, of the order of rows and of noise.
        cells: What every set is trained on; the second one also by the rarer methods.
        rows: Of each part that is predicted, at most.
        few: Draws of the weights.
        many: Draws on the test rows after training by the defaults.
        grid: Standard deviations among which the validation rows choose.
        examples: Rows of a Laplace posterior.
        flush_batches: Of a training; None for the default.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    cells: tuple[Cell, ...] = (
        *(Cell(500, 3), Cell(500, 10)),
        *(Cell(500, 1), Cell(2000, 3), Cell(500, 10, lora=True)),
    )
    rows: tuple[int, int, int] = (200, 500, 200)
    few: int = 8
    many: int = 32
    grid: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    examples: int = 400
    flush_batches: int | None = None


SIZES = {
    "default": Size(),
    "tiny": Size(
        seeds=(0,),
        cells=(Cell(32, 1), Cell(32, 2)),
        rows=(40, 60, 40),
        few=2,
        many=3,
        grid=(0.01, 0.02),
        examples=16,
        flush_batches=2,
    ),
}


@dataclass(frozen=True)
class World:
    """The work folder, and all that can be made in it.

    Attributes:
        work: The folder.
        size: Of everything.
    """

    work: Path
    size: Size

    @cached_property
    def held_out(self) -> dict[str, dict[str, tuple[list[str], list[int]]]]:
        """Texts and labels of each set and part."""
        found: dict[str, dict[str, tuple[list[str], list[int]]]] = {}
        for name, place in SETS.items():
            files = (f"{place}/valid", f"{place}/test", f"{SHIFTED[name]}/test")
            found[name] = {}
            for part, file, most in zip(PARTS, files, self.size.rows, strict=True):
                rows = read(file, most)
                found[name][part] = ([r["text"] for r in rows], [int(r["label"]) for r in rows])
        return found

    def text(self, name: str, rows: int) -> Step:
        """The rows of a training."""

        def make(folder: Path) -> None:
            found = read(f"{SETS[name]}/train", rows)
            write_rows(
                folder / "rows.jsonl", [{"text": r["text"], "label": r["label"]} for r in found]
            )

        return Step(self.work, f"text-{name}", {"text": name, "rows": rows}, make)

    def trained(self, name: str, cell: Cell, method: str, seed: int) -> Step:
        """The encoder after a training."""
        start, rows = new_start(self.work, seed), self.text(name, cell.rows)
        settings = {"epochs": cell.epochs, "batch_size": BATCH, "max_length": TOKENS, "seed": seed}
        settings |= METHODS[method] | ({"lora": {}} if cell.lora else {})
        if self.size.flush_batches is not None:
            settings["flush_batches"] = self.size.flush_batches
        if settings.get("optimizer") in ("adamw", "sam"):
            settings |= {"posterior": "none"}

        def make(folder: Path) -> None:
            data = rows.folder / "rows.jsonl"
            if method == "sam":
                train_sam(start.model, data, folder / "model", cell.epochs, seed)
                return
            config = {"model": str(start.model), "output": str(folder / "model"), **settings}
            config |= {"data": str(data)}
            run_finetune(FinetuneConfig.model_validate(config), quiet=True)

        label = f"{name}-{cell}-{method}-{seed}".replace(", ", "-").replace(" ", "-")
        return Step(self.work, label, {"set": name, **settings}, make, (start, rows))

    def laplace(self, model: Step, name: str, seed: int) -> Step:
        """The root-GGN precision at a model on the rows of its training."""
        settings = {"estimator": "ggn", "examples": self.size.examples, "seed": seed}

        def make(folder: Path) -> None:
            config = settings | {
                "model": str(model.model),
                "data": str(model.needs[1].folder / "rows.jsonl"),
                "output": str(folder / "precision"),
                "max_length": TOKENS,
                "batch_size": 8,
            }
            run_precision(PrecisionConfig.model_validate(config), quiet=True)

        return Step(self.work, f"laplace-{model.name}", settings, make, (model,))

    def predict(self, loaded: Loaded, name: str, part: str, most: int | None = None) -> np.ndarray:
        """Log-probabilities, (rows, classes), at the present weights."""
        texts = self.held_out[name][part][0][:most]
        return class_probabilities(
            loaded.model, loaded.tokenizer, texts, max_length=TOKENS, batch_size=32
        )

    def labels(self, name: str, part: str) -> np.ndarray:
        """(rows,), the classes."""
        return np.array(self.held_out[name][part][1])


def read(name: str, most: int) -> list[JSON]:
    """The first rows of a file of the data."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for _, line in zip(range(most), file, strict=False)]


@contextmanager
def posterior_draws(
    loaded: Loaded,
    model: Path,
    samples: int,
    *,
    precision: Path | None = None,
    prior: float | None = None,
    control: str | None = None,
) -> Iterator[PosteriorDraws]:
    """Draws from a stored posterior, as those of `bmerge evaluate --samples`, or of a control."""
    place = None if precision is None else str(precision)
    with open_samplable(str(model), precision=place, prior=prior) as posterior:
        draws = DRAWS[control](loaded.model, posterior, samples, prior=prior)
        with draws:
            yield draws


class Permuted(PosteriorDraws):
    """Draws whose deviations are those of the posterior, at other entries of the same tensor."""

    def _deviation(self, place: Place) -> np.ndarray:
        deviation = super()._deviation(place)
        seed = int.from_bytes(place.name.encode(), "little")
        order = np.random.default_rng(seed).permutation(deviation.size)
        return deviation.reshape(-1)[order].reshape(deviation.shape)


class PerTensor(PosteriorDraws):
    """Draws with one deviation for each tensor, the root of the mean variance of its entries."""

    def _deviation(self, place: Place) -> np.ndarray:
        deviation = super()._deviation(place)
        return np.full_like(deviation, np.sqrt(np.mean(np.square(deviation, dtype=np.float64))))


# Which draws a name means; None is the posterior itself.
DRAWS = {None: PosteriorDraws, "permuted": Permuted, "per tensor": PerTensor}
CONTROLS = ("permuted", "per tensor")


@contextmanager
def flat_draws(loaded: Loaded, samples: int, sigma: float) -> Iterator[Iterator[int]]:
    """Draws of every trained weight with one standard deviation."""
    parameters = dict(loaded.model.named_parameters())
    means = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def each() -> Iterator[int]:
        for k in range(samples):
            generator = torch.Generator().manual_seed(k)
            for name, p in parameters.items():
                p.copy_(means[name] + sigma * torch.randn(p.shape, generator=generator))
            yield k

    try:
        yield each()
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(means[name])


def opened(folder: Path) -> Loaded:
    """A trained model, in eval mode."""
    loaded = load_model(str(folder))
    loaded.model.eval()
    return loaded


def train_sam(start: Path, data: Path, out: Path, epochs: int, seed: int) -> None:
    """SAM (Foret et al., ICLR 2021) over AdamW, with the rate and schedule of the other rows.

        e = rho g / |g|,   the step of AdamW by the gradient at w + e

    Args:
        start: The model.
        data: The rows.
        out: Where it is written.
        epochs: Passes over them.
        seed: Of their order.
    """
    transformers.set_seed(seed)
    rows = [json.loads(line) for line in data.open()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-6)
    batches = list(shuffled(rows, epochs, seed))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(batches))

    def backward(batch: Sequence[JSON]) -> None:
        encoded = tokenizer(
            [r["text"] for r in batch],
            truncation=True,
            max_length=TOKENS,
            padding=True,
            return_tensors="pt",
        )
        model(**encoded, labels=torch.tensor([r["label"] for r in batch])).loss.backward()

    for batch in batches:
        state = torch.get_rng_state()
        backward(batch)
        with torch.no_grad():
            trained = [p for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            moves = [p.grad * (RHO / (norm + 1e-12)) for p in trained]
            torch._foreach_add_(trained, moves)
        optimizer.zero_grad()
        torch.set_rng_state(state)  # the same units are dropped in both passes
        backward(batch)
        with torch.no_grad():
            torch._foreach_sub_(trained, moves)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def shuffled(rows: Sequence[JSON], epochs: int, seed: int) -> Iterator[list[JSON]]:
    """Batches of the rows in another order in each epoch."""
    order = random.Random(seed)
    for _ in range(epochs):
        mixed = list(rows)
        order.shuffle(mixed)
        yield from (mixed[i : i + BATCH] for i in range(0, len(mixed), BATCH))


def stamp(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
