"""What weighing by a precision is worth when a change is extracted as an adapter.

    python scripts/experiments/extraction.py matrices --size 2048
    python scripts/experiments/extraction.py encoder --work WORK --task sst2 --seed 0

`matrices` takes random changes and precisions, and compares the weighted loss of the plain SVD with
those of rows x columns and of sweeps. `encoder` fine-tunes the encoder of the experiment on
addition, extracts its change by the SVD and by three precisions, and measures what each adapter
really costs: the loss on the rows of the training, and the test's.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentiment_world import ROWS, SIZES, World, read_rows

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.extract.approximate import Limits, approximate
from mergekit_bayes.extract.run import run_extract
from mergekit_bayes.extract.settings import ExtractConfig
from mergekit_bayes.extract.weighting import by_entry, entry_loss, uniform
from mergekit_bayes.lora import open_model

ESTIMATORS = ("ggn", "inputs", "kronecker")
LOOKED_AT = 400  # rows of the training on which a loss is measured
TOKENS = 64


def matrices(size: int, seed: int, rank: int) -> dict[str, Any]:
    """A change with a decaying spectrum, and precisions of which rows and columns explain two
    thirds of the log's variance."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(size, size // 8)))[0] for _ in range(2))
    change = (u * np.exp(-np.arange(size // 8) / 40)) @ v.T + 2e-4 * rng.normal(size=(size, size))
    change = change.astype(np.float32)
    logs = rng.normal(size=(size, 1)) + rng.normal(size=(1, size)) + rng.normal(size=(size, size))
    weighting = by_entry(np.exp(logs).astype(np.float32))
    assert weighting.entries is not None
    found: dict[str, Any] = {"seed": seed, "size": size, "rank": rank}
    for name, by, sweeps in (
        ("svd", uniform((size, size)), 0),
        ("rows x columns", weighting, 0),
        ("sweeps", weighting, 8),
    ):
        begun = time.process_time()
        made = approximate(change, by, Limits(rank, None, sweeps, "F32"), weight_norm=1.0)
        seconds = time.process_time() - begun
        lost = entry_loss(weighting.entries, change - made.left @ made.right)
        share = lost / entry_loss(weighting.entries, change)
        found[name] = {"lost": round(share, 4), "seconds": round(seconds, 2), "n": made.sweeps}
    return found


class Measured:
    """The tuned model, and what it costs to put other weights into its layers."""

    def __init__(self, world: World, task: str, seed: int) -> None:
        tuned = world.tuned(task, seed).done()
        rows = read_rows(world.text(task).done().folder / ROWS)
        auto = transformers.AutoModelForSequenceClassification
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(tuned.model)
        self._model = auto.from_pretrained(tuned.model).eval()
        self._tuned = {name: t.clone() for name, t in self._model.state_dict().items()}
        self._train = [r["text"] for r in rows[:LOOKED_AT]], [r["label"] for r in rows[:LOOKED_AT]]
        self._test = world.rows(task, "test")
        self._share = len(rows) / LOOKED_AT

    @torch.no_grad()
    def losses(self, weights: dict[str, Any]) -> dict[str, float]:
        """Loss in nats, summed over the rows of the training, and the mean of the test."""
        self._model.load_state_dict(self._tuned)
        state = self._model.state_dict()
        for name, values in weights.items():
            state[name].copy_(torch.as_tensor(values))
        train, test = self._nll(*self._train), self._nll(*self._test)
        return {"train": self._share * float(train.sum()), "test": float(test.mean())}

    def _nll(self, texts: list[str], labels: list[int]) -> torch.Tensor:
        logits = []
        for start in range(0, len(texts), 50):
            batch = self._tokenizer(
                texts[start : start + 50],
                truncation=True,
                max_length=TOKENS,
                padding=True,
                return_tensors="pt",
            )
            logits.append(self._model(**batch).logits.log_softmax(-1))
        chosen = torch.cat(logits).gather(1, torch.tensor(labels)[:, None])
        return -chosen.squeeze(1)


def encoder(work: Path, task: str, seed: int, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Adapters of several ranks by the SVD and by each precision, with their measured losses."""
    world = World(work, SIZES["default"])
    tuned, base = world.tuned(task, seed).done(), world.base(seed).done()
    places = {e: world.precision(tuned, task, e, seed).done().precision for e in ESTIMATORS}
    measured = Measured(world, task, seed)
    start = measured.losses({})
    for rank in ranks:
        for name, place in (("svd", None), *places.items()):
            out = work / "extracted"
            begun = time.process_time()
            report = run_extract(
                ExtractConfig(
                    model=str(tuned.model),
                    base=str(base.model),
                    out=str(out),
                    rank=rank,
                    weights="precision" if place else "uniform",
                    precision=str(place) if place else None,
                    force=True,
                )
            )
            seconds = time.process_time() - begun
            names = [f"{module}.weight" for module in report.layers]
            with open_model(f"{base.model}+{out}") as model:
                weights = {n: read_tensor(model.mean, n) for n in names}
            losses = measured.losses(weights)  # of the layers alone: all else is the tuned model's
            layers = report.layers.values()
            yield {
                "seed": seed,
                "rank": rank,
                "weights": name,
                "unit": report.unit,
                "change": sum(layer.change or 0.0 for layer in layers),
                "lost": sum(layer.lost or 0.0 for layer in layers),
                "measured nats": losses["train"] - start["train"],
                "test loss": losses["test"],
                "test loss of the tuned model": start["test"],
                "seconds": round(seconds, 1),
            }


def main() -> None:
    """Print one line of JSON for each result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    random = kinds.add_parser("matrices")
    random.add_argument("--size", type=int, default=2048)
    random.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    random.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    real = kinds.add_parser("encoder")
    real.add_argument("--work", type=Path, required=True)
    real.add_argument("--task", default="sst2")
    real.add_argument("--seed", type=int, default=0)
    real.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    if args.kind == "matrices":
        for seed in args.seeds:
            for rank in args.ranks:
                print(json.dumps(matrices(args.size, seed, rank)), flush=True)
        return
    for found in encoder(args.work, args.task, args.seed, args.ranks):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
