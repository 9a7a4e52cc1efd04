"""What sampling and rolling perplexity cost beside `transformers`' generate and lm-eval.

    python scripts/bench/evaluate.py [--sizes 2,124] [--batches 1,8,64,256] [--rounds 3] [--quick]
        [--json FILE]

Models of random weights in GPT-2's shapes, of 2.1 M parameters with a vocabulary of 4,096 and of
124 M with GPT-2's own of 50,257. Each side runs in a process of its own with one thread, and they
take turns workload by workload and round by round, so that a busy machine disturbs all alike. A
first pass of a smaller workload does not count. Ratios are of CPU seconds within a round, of which
the median counts; they include tokenising and decoding, but not loading.

- Sampling: continuations of 20 tokens at top_p 0.9 and temperature 1, 16 of each prompt. Neither
  side has an EOS, so that all have 20 tokens. `generate` gets a padded batch of prompts (on the
  left, sorted by length) with `num_return_sequences`, a cache, and no top-k; a batch smaller than
  16 continues one prompt. `sample_continuations` gets the same batch size; it never pads, but draws
  prompts of one length together. "Equal" prompts have 11 words each, "mixed" ones 4 to 18: 64
  prompts for batches of 64 and more at 2 M, as an evaluation has, or those of "one batch", which
  it has to draw in parts. "Peaked" ones are mixed, and the weights are scaled so that a step has
  about the entropy of a trained model: random ones leave nearly all tokens in the nucleus.
- Rolling perplexity: documents of 10 to 400 words, of which some exceed the window. lm-eval's
  `loglikelihood_rolling` gets the same texts, window and batch size, in the order of the texts, as
  its tasks do, and once more with the longest text first, which saves it padding. The numbers of
  both must agree.

Exits with 1 if a goal is missed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import machine
from evaluate_models import EACH, SHAPES, Models, Workload

NEW, TOP_P = 20, 0.9
SAMPLE_GOAL = {"2": 0.28, "124": 1.0}  # CPU seconds over those of generate, at most
RATE_GOAL = 1.5  # tokens a CPU second over those of lm-eval, at least


def workloads(size: str, batches: list[int], quick: bool) -> Iterator[Workload]:
    """The lines of a model size."""
    for batch in batches:
        one = -(-batch // EACH)  # prompts of one batch
        kinds = {"equal": max(4, one), "mixed": max(4, one) if batch < 64 else 64}
        if batch >= 64:
            kinds["mixed, one batch"] = one
        if batch == 64:
            kinds["peaked"] = 64
        if size == "124":
            kinds = dict.fromkeys(kinds if batch == 64 else ["mixed"], one)
            kinds.pop("mixed, one batch", None)
        for kind, items in kinds.items():
            yield Workload("sample", kind, batch, one if quick else items)
    for batch in [b for b in batches if b <= (64 if size == "2" else 8)]:
        for kind in ("as given", "longest first"):
            yield Workload("perplexity", kind, batch, 6 if quick else 200 if size == "2" else 12)


def main() -> None:
    """Run all lines and print the table; with the hidden `--side`, answer on standard input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="2,124", help="millions of parameters: 2, 124")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a small workload")
    parser.add_argument("--json", type=Path, help="write the table to this file, too")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        serve(given.side, given.sizes)
        return
    sizes = given.sizes.split(",")
    if unknown := sorted(set(sizes) - set(SHAPES)):
        parser.error(f"--sizes {unknown[0]}: expected 2, 124 or both.")
    try:
        batches = [int(b) for b in given.batches.split(",")]
    except ValueError:
        parser.error(f"--batches {given.batches}: expected numbers with commas between them.")
    if min(batches) < 1 or given.rounds < 1:
        parser.error("--batches and --rounds: expected 1 or more.")
    table = []
    for size in sizes:
        lines = list(workloads(size, batches, given.quick))
        with side("ours", size) as ours, side("theirs", size) as theirs:
            rounds = [
                {w: (ours(w), theirs(w)) for w in lines} for _ in range(rounds_of(size, given))
            ]
        table += [summary(size, w, [r[w] for r in rounds]) for w in lines]
    report(table, given)
    if given.json:
        given.json.write_text(json.dumps(table, indent=2) + "\n")
    sys.exit(any(row["missed"] for row in table))


def rounds_of(size: str, given: argparse.Namespace) -> int:
    """One round fewer at 124 M, which takes most of the time."""
    return 1 if given.quick else max(1, given.rounds - (size == "124"))


@contextlib.contextmanager
def side(name: str, size: str) -> Iterator[Callable[[Workload], dict[str, Any]]]:
    """A process of one side, as a function that measures a workload there."""
    line = [sys.executable, __file__, "--side", name, "--sizes", size]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **settings},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(workload: Workload) -> dict[str, Any]:
        print(json.dumps(workload), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} failed at {workload}.")
        found: dict[str, Any] = json.loads(answer)
        print(f"{size} M {name} {workload}: {found}", file=sys.stderr)
        if "error" in found:
            raise SystemExit(1)
        return found

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def serve(name: str, size: str) -> None:
    """Measure the workloads that come in, one a line."""
    import torch

    torch.set_num_threads(1)
    models = Models(size)
    work = {
        ("ours", "sample"): ours_sample,
        ("theirs", "sample"): generate,
        ("ours", "perplexity"): ours_perplexity,
        ("theirs", "perplexity"): lm_eval_perplexity,
    }
    for line in sys.stdin:
        workload = Workload(*json.loads(line))
        function = work[name, workload.task]
        try:
            function(models, workload._replace(items=1 if workload.task == "sample" else 4))
            machine.reset_peak()
            start = time.perf_counter(), time.process_time()
            tokens, value = function(models, workload)
            cpu = time.process_time() - start[1]
            wall = time.perf_counter() - start[0]
            found = {
                "tokens": tokens,
                "value": value,
                "cpu": cpu,
                "wall": wall,
                "mib": machine.status("VmHWM") / 2**20,
            }
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


def ours_sample(models: Models, workload: Workload) -> tuple[int, float]:
    """The number of tokens that `sample_continuations` drew."""
    from mergekit_bayes.generation import Sampling, sample_continuations

    models.scale(workload.kind)
    samples = sample_continuations(
        models.model,
        models.tokenizer,
        models.prompts(workload),
        start=0,
        context=models.shape["n_positions"],
        sampling=Sampling(continuations=workload.continuations, new_tokens=NEW, top_p=TOP_P),
        batch_size=workload.batch,
    )
    return sum(n for row in samples.tokens for n in row), 0.0


def generate(models: Models, workload: Workload) -> tuple[int, float]:
    """The number of tokens that `generate` drew."""
    import torch

    models.scale(workload.kind)
    each, tokens = min(workload.batch, workload.continuations), 0
    encoded = sorted(
        ([0, *ids] for ids in models.tokenizer(models.prompts(workload))["input_ids"]), key=len
    )
    together = max(1, workload.batch // each)
    for i in range(0, len(encoded), together):
        chunk = encoded[i : i + together]
        width = max(map(len, chunk))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in chunk])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk])
        for _ in range(workload.continuations // each):
            drawn = models.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_p=TOP_P,
                top_k=0,
                temperature=1.0,
                num_return_sequences=each,
                max_new_tokens=NEW,
                pad_token_id=0,
                use_cache=True,
            )[:, width:]
            models.tokenizer.batch_decode(drawn, skip_special_tokens=True)
            tokens += drawn.numel()
    return tokens, 0.0


def ours_perplexity(models: Models, workload: Workload) -> tuple[int, float]:
    """The number of scored tokens, and their nats."""
    from mergekit_bayes.metrics.perplexity import measure_perplexity

    models.scale("")
    report = measure_perplexity(
        models.model,
        models.tokenizer,
        models.documents(workload),
        start=0,
        window=models.shape["n_positions"],
        batch_size=workload.batch,
        bootstrap=0,
    )
    return report.tokens, report.nats


def lm_eval_perplexity(models: Models, workload: Workload) -> tuple[int, float]:
    """The same numbers of lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    models.scale("")
    harness = HFLM(
        pretrained=models.model,
        tokenizer=models.tokenizer,
        batch_size=workload.batch,
        max_length=models.shape["n_positions"],
        add_bos_token=False,
        prefix_token_id=0,
    )
    texts = models.documents(workload)
    if workload.kind == "longest first":
        texts.sort(key=len, reverse=True)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    nats = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    return sum(len(text.split()) for text in texts), nats


def summary(
    size: str, workload: Workload, rounds: list[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    """A line of the table from its rounds, each of ours and theirs."""
    for ours, theirs in rounds:
        if ours["tokens"] != theirs["tokens"] or abs(ours["value"] - theirs["value"]) > 1e-5 * abs(
            theirs["value"]
        ):
            raise SystemExit(f"{workload}: ours gives {ours}, theirs {theirs}.")
    ratios = [ours["cpu"] / theirs["cpu"] for ours, theirs in rounds]
    ratio = statistics.median(ratios)
    sampling = workload.task == "sample"
    return {
        "size": size,
        **workload._asdict(),
        "tokens": rounds[0][0]["tokens"],
        "cpu": [statistics.median(r[i]["cpu"] for r in rounds) for i in (0, 1)],
        "wall": [statistics.median(r[i]["wall"] for r in rounds) for i in (0, 1)],
        "mib": [max(r[i]["mib"] for r in rounds) for i in (0, 1)],
        "ratio": ratio,
        "range": [min(ratios), max(ratios)],
        "missed": ratio > SAMPLE_GOAL[size] if sampling else 1 / ratio < RATE_GOAL,
    }


def report(table: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print both tables."""
    import torch
    import transformers

    rounds = " and ".join(f"{rounds_of(s, given)} at {s} M" for s in given.sizes.split(","))
    print(
        f"{date.today()}, {machine.cpu()}, one thread, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; rounds: {rounds}"
    )
    for task, title, rival in (
        ("sample", "prompts", "generate"),
        ("perplexity", "lm-eval's texts", "lm-eval"),
    ):
        print(
            f"\n| M | batch | {title} | tokens | tokens a CPU s | {rival} | CPU s | {rival} "
            f"| CPU s to {rival} | range | MiB | {rival} | |"
        )
        print(f"| ---: | ---: | --- |{' ---: |' * 9} --- |")
        for r in [r for r in table if r["task"] == task]:
            cells = [
                *(r["size"], str(r["batch"]), r["kind"], f"{r['tokens']:,}"),
                *(f"{r['tokens'] / cpu:,.0f}" for cpu in r["cpu"]),
                *(f"{cpu:.2f}" for cpu in r["cpu"]),
                f"{r['ratio']:.2f}",
                f"{r['range'][0]:.2f} to {r['range'][1]:.2f}",
                *(f"{mib:,.0f}" for mib in r["mib"]),
                "**missed**" if r["missed"] else "met",
            ]
            print(f"| {' | '.join(cells)} |")
    print(
        f"\nGoals: CPU seconds to those of generate at most {SAMPLE_GOAL['2']} at 2 M and "
        f"{SAMPLE_GOAL['124']:.0f} at 124 M; {RATE_GOAL} times the tokens a CPU "
        f"second of lm-eval, which is {1 / RATE_GOAL:.2f} of its CPU seconds."
    )


if __name__ == "__main__":
    main()
