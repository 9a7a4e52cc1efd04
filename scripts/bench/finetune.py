"""What a fine-tune with IVON costs beside the same one with AdamW, from start to end of training.

    python scripts/bench/finetune.py [--repeats 3] [--steps 24] [--rows 8] [--tokens 64]
        [--device cpu]

A language model of 21 M random parameters in GPT-2's shapes is trained by `run_finetune` on rows of
random words. Each row of the table runs in its own process with one thread, round after round, so
that a busy machine disturbs all alike. `Trainer.train` alone is timed, without imports and loading.
Ratios are of CPU seconds, which other work disturbs least, and on a GPU of wall seconds. The
curvature after training is timed apart, since its length does not depend on that of the run: the
last column adds its 64 batches to an epoch of `--epoch` steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import machine

LAYERS, WIDTH, VOCABULARY = 10, 384, 8192
FLUSH = 64  # batches, the default of `bmerge finetune`
ROWS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "IVON, price": {"curvature": "price"},
    "IVON, ggn every 8 steps": {"curvature": "ggn", "curvature_every": 8},
    "IVON, antithetic pairs": {"curvature": "price", "antithetic": True},
}


def main() -> None:
    """Run all rows and print the table; with the hidden `--row`, run one and print its seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=24, help="a multiple of 8, so that ggn has its share"
    )
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument(
        "--epoch", type=int, default=1000, help="steps of the run that the flush is added to"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the table to this file, too")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given, ROWS[given.row])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), given)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
        for _ in range(given.repeats):
            for name in ROWS:
                seconds[name].append(run(name, given, Path(folder)))
    report(seconds, given)


def make_model(folder: Path, given: argparse.Namespace) -> None:
    """Write a model of random weights, a tokenizer of numbered words, and rows of them."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"</s>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="</s>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=6,
        n_positions=given.tokens,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", bos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder / "model")
    draws = np.random.default_rng(0).integers(
        1, VOCABULARY, (given.steps * given.rows, given.tokens)
    )
    rows = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in draws)
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def run(name: str, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Measure one row in its own process."""
    line = [sys.executable, __file__, "--row", name, "--work", str(folder)]
    for option in ("steps", "rows", "tokens", "device"):
        line += [f"--{option}", str(getattr(given, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")
    print(f"{name}: {done.stdout.strip()}", file=sys.stderr)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def measure(given: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """Seconds of one training, and of the curvature after it over the batches of the data."""
    import torch
    import transformers

    from mergekit_bayes.finetune import FinetuneConfig, store
    from mergekit_bayes.finetune.run import run_finetune

    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device.")
    spent: dict[str, float] = {}

    def timed(name: str, function: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            if given.device == "cuda":
                torch.cuda.synchronize()
            spent[f"{name}_wall"] = time.perf_counter() - start[0]
            spent[f"{name}_cpu"] = time.process_time() - start[1]
            return result

        return inner

    transformers.Trainer.train = timed("train", transformers.Trainer.train)
    store.final_curvature = timed("flush", store.final_curvature)
    with tempfile.TemporaryDirectory() as out:
        config = FinetuneConfig(
            model=str(given.work / "model"),
            data=str(given.work / "rows.jsonl"),
            output=f"{out}/out",
            batch_size=given.rows,
            max_length=given.tokens,
            flush_batches=given.steps,
            **row,
            posterior="none" if row.get("optimizer") == "adamw" else "flush",
        )
        run_finetune(config, quiet=True)
    return spent


def report(seconds: dict[str, list[dict[str, float]]], given: argparse.Namespace) -> None:
    """Print the table, and write it if asked."""
    import torch
    import transformers

    clock = "wall" if given.device == "cuda" else "cpu"

    def ratios(name: str, part: str = "train") -> list[float]:
        """Seconds over those of AdamW in the same round, for the same number of batches."""
        pairs = zip(seconds[name], seconds["AdamW"], strict=True)
        return [row.get(f"{part}_{clock}", 0.0) / adamw[f"train_{clock}"] for row, adamw in pairs]

    table = []
    for name, rounds in seconds.items():
        walls = [r["train_wall"] / given.steps for r in rounds]
        ratio = statistics.median(ratios(name))
        table.append(
            {
                "row": name,
                "seconds": statistics.median(walls),
                "range": [min(walls), max(walls)],
                "cpu": statistics.median(r["train_cpu"] / given.steps for r in rounds),
                "ratio": ratio,
                "ratio_range": [min(ratios(name)), max(ratios(name))],
                "with_flush": ratio
                + statistics.median(ratios(name, "flush")) * FLUSH / given.epoch,
            }
        )
    place = f"{machine.cpu()}, one thread"
    if given.device == "cuda":
        place = torch.cuda.get_device_name()
    print(
        f"{date.today()}, {place}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {given.steps} steps of {given.rows} x {given.tokens} tokens, "
        f"{given.repeats} rounds\n"
    )
    print(
        "| | s a step | range | CPU s a step | to AdamW | range "
        f"| with a flush, {given.epoch:,} steps |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in table:
        cells = [
            r["row"],
            f"{r['seconds']:.3f}",
            f"{r['range'][0]:.3f} to {r['range'][1]:.3f}",
            f"{r['cpu']:.3f}",
            f"{r['ratio']:.3f}",
            f"{r['ratio_range'][0]:.3f} to {r['ratio_range'][1]:.3f}",
            "" if r["row"] == "AdamW" else f"{r['with_flush']:.3f}",
        ]
        print(f"| {' | '.join(cells)} |")
    if given.json:
        given.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
