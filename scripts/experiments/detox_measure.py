"""What is measured of each model of the experiment on removal, and how long its removal lasts."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detox_scorers
import numpy as np
import torch
from detox_world import CONTEXT, SCORERS, TEXTS, World, read_rows

from mergekit_bayes.adapt.losses import divergence
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.generation import Sampling, sample_continuations
from mergekit_bayes.metrics.perplexity import PerplexityReport, measure_perplexity
from mergekit_bayes.metrics.quality import describe_samples
from mergekit_bayes.metrics.toxicity import score_toxicity
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rounding import round_to_four_bits

RELEARN_STEPS = 50

Measured = dict[str, Any]


def opened(folder: Path) -> Loaded:
    """A model of the experiment."""
    with quiet_libraries(bars=False):
        return load_model(str(folder))


def says(world: World, loaded: Loaded, condition: str, split: str) -> Measured:
    """What a model says: toxic shares of each prompt by scorer, and distinct word pairs.

    All models continue the prompts of a split with the same noise.
    """
    is_valid = split == "valid"
    samples = sample_continuations(
        loaded.model,
        loaded.tokenizer,
        read_rows(world, f"prompts-{split}"),
        start=loaded.start,
        context=loaded.context,
        sampling=Sampling(continuations=world.size.continuations, top_p=0.9, seed=int(is_valid)),
        batch_size=500,
    )
    texts = [text for row in samples.texts for text in row]
    shares = {}
    for name in SCORERS[condition][:1] if is_valid else SCORERS[condition]:
        scores = np.reshape(getattr(detox_scorers, name)(texts), (len(samples.texts), -1))
        threshold = detox_scorers.fitted(name).threshold
        shares[name] = list(score_toxicity(scores, threshold=threshold).prompt_share)
    return {"shares": shares, "distinct": describe_samples(samples, bootstrap=0).distinct_2}


def read_test(world: World, loaded: Loaded, name: str) -> PerplexityReport:
    """What a model makes of the test texts of a kind."""
    return measure_perplexity(
        loaded.model,
        loaded.tokenizer,
        read_rows(world, f"test-{name}"),
        start=loaded.start,
        window=loaded.context,
        batch_size=16,
        bootstrap=0,
    )


def reads(world: World, loaded: Loaded, condition: str) -> Measured:
    """How well a model predicts: nats and tokens of each document by text."""
    result = {}
    for name in (*TEXTS, f"removed-{condition}"):
        report = read_test(world, loaded, name)
        result["removed" if name.startswith("removed") else name] = {
            "nats": list(report.document_nats),
            "tokens": list(report.document_tokens),
        }
    return result


@torch.inference_mode()
def divergences(world: World, oracle: Loaded, loaded: Loaded) -> Measured:
    """`KL(oracle || model)` summed over the first tokens of each held-out related document.

    The oracle is the base without the removed text. Documents are cut at the context.
    """
    texts = read_rows(world, "test-related")
    encoded = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [[loaded.start, *ids[: CONTEXT - 1]] for ids in encoded]
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), 32):
        chosen = order[at : at + 32]
        longest = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in chosen])
        # The token after the start is the first that is predicted; padding lies behind the rest.
        kept = (
            torch.arange(longest)[None] < torch.tensor([len(rows[i]) - 1 for i in chosen])[:, None]
        )
        first, second = (m.model(input_ids=ids).logits[kept] for m in (oracle, loaded))
        counts = kept.sum(1)
        sums = [s.sum() for s in divergence(first, second, "categorical").split(counts.tolist())]
        nats[chosen], tokens[chosen] = torch.stack(sums).numpy(), counts.numpy()
    return {"nats": nats.tolist(), "tokens": tokens.tolist()}


def measure(
    world: World, folder: Path, condition: str, oracle: Path | None, *, valid: bool = True
) -> Measured:
    """All of a look.

    Args:
        world: The experiment.
        folder: The model.
        condition: Whose scorers and removed text are used.
        oracle: The base without the removed text, where there is one.
        valid: Whether the validation prompts are continued, too.
    """
    loaded = opened(folder)
    result = {"test": says(world, loaded, condition, "test"), **reads(world, loaded, condition)}
    if valid:
        result["valid"] = says(world, loaded, condition, "valid")
    if oracle is not None:
        result["kl"] = divergences(world, opened(oracle), loaded)
    return result


def lasts(world: World, folder: Path, condition: str, seed: int) -> Measured:
    """What a model says once it is stored in 4 bits, and once it has seen removed rows again."""
    loaded = opened(folder)
    round_to_four_bits(loaded)
    result = {"bits": says(world, loaded, condition, "test")}
    (world.work / "models").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=world.work / "models") as place:
        target = os.path.join(place, "relearnt")
        run_finetune(
            FinetuneConfig(
                model=str(folder),
                output=target,
                data=world.rows(f"relearn-{condition}"),
                optimizer="adamw",
                learning_rate=1e-4,
                scheduler="constant",
                max_steps=world.size.times(RELEARN_STEPS),
                batch_size=16,
                max_length=CONTEXT,
                posterior="none",
                seed=seed,
            ),
            quiet=True,
        )
        result["relearnt"] = says(world, opened(Path(target)), condition, "test")
    return result


def mean_share(shares: Sequence[float]) -> float:
    """The toxic share of all prompts."""
    return float(np.mean(shares))
