"""What a preview of many scales costs beside merging and evaluating at each.

    python scripts/bench/preview.py [--parameters 2 22] [--vectors 100] [--rounds 3] [--method NAME]

A base and two tasks of random weights, of Llama's kind and in float32, each with a precision an
entry, in millions of parameters; 16 documents of 32 words. One process with one thread, in which
the kinds take their turns round by round; the first round, which compiles and warms caches, does
not count. CPU seconds, of which the median of the rounds counts:

- preview: `run_preview` of the recipe and a grid, with all that it reads, loads and writes.
- merge: one `run_merge`, with its precision and without.
- evaluation: one `run_evaluate` of a written merge, which loads it.
- scoring: the same without loading: only what the model computes on the texts.

The goal: 100 vectors cost at most two merges and 100 evaluations. The sum with 100 scorings in
place of evaluations is what is left if loading cost nothing. Exits with 1 if the goal is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from machine import cpu

SHAPES = {  # by millions of parameters: width, layers, inner width, vocabulary
    0.03: (16, 2, 32, 300),
    2: (128, 4, 512, 4096),
    22: (384, 9, 1024, 8192),
}
DOCUMENTS, WORDS = 16, 32
EVALUATIONS = 5  # measured in a round, of the many


def main() -> int:
    """Measure each size and print its row; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, nargs="+", choices=SHAPES, default=[2, 22])
    parser.add_argument("--vectors", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="gradient_matching")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    print(f"{date.today()}, {cpu()}, one thread, torch {torch.__version__}, {given.method}\n")
    print(
        "| parameters | preview | of it forming one | merge | its mean alone | evaluation | "
        "scoring | over 2 merges + evaluations | over 2 merges + scorings |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    found = {}
    for size in given.parameters:
        with tempfile.TemporaryDirectory() as folder:
            found[size] = measure(Path(folder), size, given.vectors, given.rounds, given.method)
        show(size, found[size], given.vectors)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return any(ratio(costs, given.vectors, "evaluation") > 1 for costs in found.values())


def show(size: float, costs: dict[str, float], vectors: int) -> None:
    """Print the row of a size."""
    kinds = ("preview", "forming", "merge", "mean", "evaluation", "scoring")
    numbers = [f"{costs[kind]:.3f}" for kind in kinds]
    ratios = [f"{ratio(costs, vectors, kind):.2f}" for kind in ("evaluation", "scoring")]
    print(f"| {size:g} M | {' | '.join([*numbers, *ratios])} |", flush=True)


def ratio(costs: dict[str, float], vectors: int, each: str) -> float:
    """CPU seconds of the preview over two merges and one of `each` a vector."""
    return costs["preview"] / (2 * costs["merge"] + vectors * costs[each])


def measure(folder: Path, size: float, vectors: int, rounds: int, method: str) -> dict[str, float]:
    """CPU seconds of each kind, the median over the rounds."""
    from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
    from mergekit_bayes.merge import MergeConfig, run_merge
    from mergekit_bayes.preview import PreviewConfig, run_preview

    make(folder, SHAPES[size])
    recipe = {"models": ["a", "b"], "base": "base", "method": method}
    os.chdir(folder)
    Path("recipe.yaml").write_text(json.dumps(recipe))
    grid = [round(2 * i / vectors, 6) for i in range(1, vectors + 1)]
    preview = PreviewConfig(
        recipe="recipe.yaml",
        data={"texts": "texts.csv"},
        scales=[(x, 2.5 - x) for x in grid if x != 1.0][: vectors - 1],
        output="preview",
        force=True,
    )
    merge = MergeConfig(**recipe, out="merged", force=True)
    evaluate = EvaluateConfig(model="merged", perplexity={"texts": "texts.csv"}, bootstrap=0)
    score = scorer(evaluate) if run_merge(merge, threads=1) else None
    kinds: dict[str, Callable[[], object]] = {
        "preview": lambda: run_preview(preview),
        "merge": lambda: run_merge(merge, threads=1),
        "mean": lambda: run_merge(
            merge.model_copy(update={"out": "mean", "posterior": False}), threads=1
        ),
        "evaluation": lambda: [run_evaluate(evaluate) for _ in range(EVALUATIONS)],
        "scoring": lambda: [score() for _ in range(EVALUATIONS)],
    }
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "forming")}
    for turn in range(rounds + 1):
        for kind, work in kinds.items():
            begun = time.process_time()
            result = work()
            spent = time.process_time() - begun
            if turn:
                times[kind].append(spent / (len(result) if isinstance(result, list) else 1))
            if turn and kind == "preview":
                assert len(result.points) == vectors
                formed = [point.form_seconds for point in result.points[1:]]
                times["forming"].append(statistics.median(formed))
    return {kind: statistics.median(spent) for kind, spent in times.items()}


def scorer(config) -> Callable[[], object]:
    """Scores the texts with a model that is loaded once."""
    from mergekit_bayes.evaluate.predictions import predict
    from mergekit_bayes.evaluate.texts import read_texts
    from mergekit_bayes.metrics.base import PRESENT
    from mergekit_bayes.models.load import load_model

    loaded, texts = load_model(config.model), read_texts(config)
    return lambda: predict(config, loaded, texts, {}, PRESENT, lambda *_: None)


def make(folder: Path, shape: tuple[int, int, int, int]) -> None:
    """Write the base, the tasks with their precisions, and the texts."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mergekit_bayes.checkpoint.layout import checkpoint_files
    from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
    from mergekit_bayes.posterior import PosteriorInfo, identify, save_posterior

    width, layers, inner, vocabulary = shape
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        rng = np.random.default_rng(seed)
        with SafetensorsSource(checkpoint_files(folder / name)) as source:
            info = PosteriorInfo(
                estimator="ggn",
                unit="token",
                observations=1000,
                ess=1000,
                mean=identify(source, full=False),
            )
            precision = {
                n: np.exp(rng.standard_normal(spec.shape, np.float32))
                for n, spec in source.specs.items()
            }
        save_posterior(folder / name, precision, info)
    rng = np.random.default_rng(7)
    documents = rng.integers(3, vocabulary, (DOCUMENTS, WORDS))
    lines = [" ".join(f"w{i}" for i in document) for document in documents]
    (folder / "texts.csv").write_text("\n".join(["text", *lines]) + "\n")
    shutil.rmtree(folder / "preview", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
