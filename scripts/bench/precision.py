"""What a precision costs: its peak of memory, and its seconds beside the passes that it needs.

    python scripts/bench/precision.py --memory [--parameters 100 500]
    python scripts/bench/precision.py [--parameters 2 22] [--rows 1000] [--repeats 3]

Models are random, of Llama's kind, in millions of parameters. Each measurement is a process of its
own with one thread.

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
from datetime import date
from pathlib import Path

GOAL_MEMORY = 1.25  # of the model's bytes, beside the activations
SHAPES = {  # by millions of parameters: width, layers, inner width, vocabulary
    100: (768, 12, 2048, 16384),
    500: (1536, 16, 4096, 32768),
}
KEEPINGS = ("forward", "row", "entries", "entries, on disk")
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
TOKENS = 256  # of the batch whose memory is measured


def main() -> None:
    """Run what is asked for and print its table; with a hidden flag, measure and print numbers."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--memory", action="store_true", help="measure memory")
    arguments.add_argument("--parameters", type=int, nargs="+", choices=SHAPES)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(measure_memory(given.parameters[0], given.one)))
        return
    print(f"{date.today()}, {cpu()}, one thread, {versions()}\n")
    show_memory(given.parameters or [100, 500])


def show_memory(sizes: list[int]) -> None:
    """Print peaks in bytes of the model."""
    print(
        "| parameters | activations | row | entries | entries, on disk | row, glibc | row, goal |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for size in sizes:
        found = {kind: alone(size, kind, **AT_ONCE) for kind in KEEPINGS}
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


def alone(size: int, kind: str, **variables: str) -> dict[str, float]:
    """Measure in a process of its own, with these variables in its environment."""
    done = subprocess.run(
        [sys.executable, __file__, "--parameters", str(size), "--one", kind],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    if done.returncode:
        raise SystemExit(f"{kind} of {size} M: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


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
