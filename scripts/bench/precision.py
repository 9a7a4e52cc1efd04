"""What a precision costs: its seconds beside the passes that it needs, and its peak of memory.

    python scripts/bench/precision.py [--parameters 2 22] [--rows 64] [--repeats 5]
    python scripts/bench/precision.py --batch-sizes [--parameters 2]
    python scripts/bench/precision.py --memory [--parameters 100 500]

Models are random, of Llama's kind, in millions of parameters; rows have 128 random tokens. One
thread; each size is a process of its own.

Seconds: for 1,000 rows in batches of 8, from the fewest CPU and wall seconds that some rows took in
a few rounds, in which each kind takes its turn. A forward and backward pass of the same batches is
that of the summed loss, whose gradients are kept and thrown away; a step of the Trainer is one of
AdamW on a batch, with all that the Trainer does. The goal for entries, rows and tensors (which are
the means of rows) is at most 1.15 times the forward and backward pass.

Batch sizes: the CPU seconds of the rows, the squared error of their sums, and the product of the
two: what a given accuracy costs. The error is that of entries, relative to the mean square, from
two estimates over different rows.

Memory: the peak of the process while it runs, beyond what torch took before the model was built, in
bytes of the model (float32). "Activations" are those of one forward pass whose graph is kept. The
goal for one number a row is at most 1.25 times the model, and the activations. Memory goes back
to the system as it is freed (MALLOC_MMAP_THRESHOLD_=65536), but in the column "row, glibc" the C
library keeps some of it, as it does by default.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

GOAL_MEMORY = 1.25  # of the model's bytes, beside the activations
GOAL_SECONDS = 1.15  # of a forward and backward pass of the same batches
SHAPES = {  # by millions of parameters: width, layers, inner width, vocabulary
    2: (128, 4, 512, 4096),
    22: (384, 9, 1024, 8192),
    100: (768, 12, 2048, 16384),
    500: (1536, 16, 4096, 32768),
}
KEEPINGS = ("forward", "row", "entries", "entries, on disk")
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
PASSES = ("entries", "row, tensor")
BATCH, LENGTH = 8, 128  # rows, and tokens of a row
TOKENS = 256  # of the batch whose memory is measured


def main() -> None:
    """Run what is asked for and print its table; with a hidden flag, measure and print numbers."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--memory", action="store_true", help="measure memory")
    arguments.add_argument("--batch-sizes", action="store_true", help="compare batch sizes")
    arguments.add_argument("--parameters", type=int, nargs="+", choices=SHAPES)
    arguments.add_argument("--rows", type=int, default=64, help="rows that are timed")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        size = given.parameters[0]
        if given.one == "seconds":
            found = measure_seconds(size, given.rows, given.repeats)
        elif given.one == "batch sizes":
            found = measure_batch_sizes(size, given.rows, given.repeats)
        else:
            found = measure_memory(size, given.one)
        print(json.dumps(found))
        return
    print(f"{date.today()}, {cpu()}, one thread, {versions()}\n")
    if given.memory:
        show_memory(given.parameters or [100, 500])
    elif given.batch_sizes:
        show_batch_sizes(given.parameters or [2], given.rows, given.repeats)
    else:
        show_seconds(given.parameters or [2, 22], given.rows, given.repeats)


def show_seconds(sizes: list[int], rows: int, repeats: int) -> None:
    """Print seconds for 1,000 rows, beside those of a forward and backward pass."""
    print("| parameters | pass | CPU seconds | wall seconds | to forward and backward | goal |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for size in sizes:
        found = alone(size, "seconds", rows, repeats)
        bare = found["forward and backward"][0]
        for kind, (cpu_seconds, wall) in found.items():
            ratio, of_us = cpu_seconds / bare, kind in PASSES
            goal = ("met" if ratio <= GOAL_SECONDS else "MISSED") if of_us else ""
            print(
                f"| {size} M | {kind} | {cpu_seconds * 1000 / rows:.1f} "
                f"| {wall * 1000 / rows:.1f} | {ratio:.3f} | {goal} |"
            )


def show_batch_sizes(sizes: list[int], rows: int, repeats: int) -> None:
    """Print what a given accuracy costs by batch size."""
    print("| parameters | rows a batch | CPU seconds | squared error | product, to the best |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for size in sizes:
        found = alone(size, "batch sizes", rows, repeats)
        best = min(seconds * error for seconds, error in found.values())
        for batch_size, (seconds, error) in found.items():
            print(
                f"| {size} M | {batch_size} | {seconds * 1000 / rows:.1f} | {error:.3f} "
                f"| {seconds * error / best:.2f} |"
            )


def show_memory(sizes: list[int]) -> None:
    """Print peaks in bytes of the model."""
    print(
        "| parameters | activations | row | entries | entries, on disk | row, glibc | row, goal |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for size in sizes:
        found = {kind: alone(size, kind, variables=AT_ONCE) for kind in KEEPINGS}
        default = alone(size, "row")["peak"] / found["row"]["model"]
        model = found["forward"]["model"]
        peaks = {kind: numbers["peak"] / model for kind, numbers in found.items()}
        activations = peaks["forward"] - 1
        is_met = peaks["row"] <= GOAL_MEMORY + activations
        print(
            f"| {model / 4e6:.0f} M | {activations:.2f} | {peaks['row']:.2f} "
            f"| {peaks['entries']:.2f} | {peaks['entries, on disk']:.2f} | {default:.2f} "
            f"| {'met' if is_met else 'MISSED'} (at most {GOAL_MEMORY + activations:.2f}) |"
        )


def alone(
    size: int, kind: str, rows: int = 1, repeats: int = 1, variables: dict[str, str] | None = None
) -> dict:
    """Measure in a process of its own, with these variables in its environment."""
    numbers = ["--parameters", str(size), "--rows", str(rows), "--repeats", str(repeats)]
    done = subprocess.run(
        [sys.executable, __file__, *numbers, "--one", kind],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
    )
    if done.returncode:
        raise SystemExit(f"{kind} of {size} M: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_seconds(size: int, rows: int, repeats: int) -> dict[str, tuple[float, float]]:
    """The fewest CPU and wall seconds of each kind of pass over the rows."""
    import torch

    from mergekit_bayes.curvature import Keeping, ggn_diagonal

    torch.set_num_threads(1)
    model = random_model(*SHAPES[size])
    batches = cut(model, rows, BATCH)
    by_row = Keeping({name: 1 for name, _ in model.named_parameters()})
    kinds = {
        "forward and backward": lambda: gradients(model, batches),
        "entries": lambda: ggn_diagonal(model, batches),
        "row, tensor": lambda: ggn_diagonal(model, batches, keep=by_row),
        "training step of the Trainer": lambda: train(model, batches),
    }
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 1):
        for kind, work in kinds.items():
            begun = time.process_time(), time.perf_counter()
            work()
            times[kind].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    return {
        kind: (min(c for c, _ in of_kind[1:]), min(w for _, w in of_kind[1:]))
        for kind, of_kind in times.items()
    }


def measure_batch_sizes(size: int, rows: int, repeats: int) -> dict[int, tuple[float, float]]:
    """CPU seconds of the rows and the squared error of entries, by rows in a batch."""
    import torch

    from mergekit_bayes.curvature import ggn_diagonal

    torch.set_num_threads(1)
    model = random_model(*SHAPES[size])
    found = {}
    for batch_size in (1, 2, 4, 8, 16, 32):
        seconds, errors = [], []
        for seed in range(repeats):
            sums = []
            for half in (0, 1):
                batches = cut(model, rows, batch_size, seed=2 * seed + half)
                begun = time.process_time()
                curvature = ggn_diagonal(model, batches, seed=2 * seed + half)
                seconds.append(time.process_time() - begun)
                totals = curvature.total.values()
                sums.append(torch.cat([t.flatten() / curvature.observations for t in totals]))
            one, other = (sum_.double() for sum_ in sums)
            squared = (one - other).square().sum() / 2
            errors.append(float(squared / ((one + other) / 2).square().sum()))
        found[batch_size] = (min(seconds), sum(errors) / len(errors))
    return found


def gradients(model, batches: list) -> None:
    """Forward and backward passes of the summed loss."""
    import torch

    for inputs in batches:
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = inputs["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        model.zero_grad()


def train(model, batches: list) -> None:
    """A step of AdamW on each batch, by the Trainer."""
    import transformers

    rows = [{"input_ids": row, "labels": row} for b in batches for row in b["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                use_cpu=True,
                per_device_train_batch_size=len(batches[0]["input_ids"]),
                max_steps=len(batches),
                learning_rate=0.0,  # the others' model stays as it is
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=rows,
        ).train()
    model.eval()
    model.zero_grad()


def cut(model, rows: int, batch_size: int, seed: int = 0) -> list[dict]:
    """Batches of random rows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, LENGTH), generator=generator)
    return [{"input_ids": own, "labels": own} for own in ids.split(batch_size)]


def measure_memory(size: int, kind: str) -> dict[str, float]:
    """Bytes of the model, and of the peak beyond what the process had before it was built."""
    import torch

    from mergekit_bayes.curvature import Keeping, ggn_diagonal

    torch.set_num_threads(1)
    run(random_model(*TINY), Keeping())  # loads code
    before = resident()
    model = random_model(*SHAPES[size])
    in_use = resident()
    reset_peak()
    if kind == "forward":
        inputs = {name: t for name, t in batch(model).items() if name != "labels"}
        outputs = model(**inputs)
        found = peak()
        del outputs
    else:
        axes = {name: 1 for name, _ in model.named_parameters()} if kind == "row" else {}
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            place = Path(folder) if "disk" in kind else "device"
            kept = ggn_diagonal(model, [batch(model)] * 3, keep=Keeping(axes, place))
            found = peak()  # while the pages of the file are in use
            del kept
    size_of_model = sum(p.nbytes for p in model.parameters())
    return {"model": size_of_model, "peak": found - before, "loaded": in_use - before}


TINY = (16, 1, 16, 32)


def run(model, keep) -> None:
    """A pass over one batch."""
    from mergekit_bayes.curvature import ggn_diagonal

    ggn_diagonal(model, [batch(model)], keep=keep)


def random_model(width: int, layers: int, inner: int, vocabulary: int):
    """A random model of Llama's kind whose head is its own matrix."""
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    ).eval()


def batch(model) -> dict:
    """One row of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def resident() -> int:
    """Bytes of memory in use, pages of files left out: those are freed when others need them."""
    return status("RssAnon")


def reset_peak() -> None:
    """Let the peak of memory start again from what is in use."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    """Bytes of memory at the peak since `reset_peak`, without the pages of files in use now."""
    return status("VmHWM") - status("RssFile") - status("RssShmem")


def status(name: str) -> int:
    """Bytes of one number of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def cpu() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


def versions() -> str:
    """Of what does the work."""
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    main()
