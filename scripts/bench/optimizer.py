"""What an optimizer step costs: AdamW, ivon-opt and ours, in CPU seconds and in memory.

    python scripts/bench/optimizer.py [--parameters 50000000] [--repeats 7] [--device cpu]

Each row is a process of its own with one thread: parameters in ten matrices, gradients that are
given (the passes of a model are not measured), a step of a small tensor and two of these to warm
up, then the repeats. Printed are the least CPU seconds of a step with all its samples (on a GPU
wall seconds), their ratio to AdamW (foreach; on a GPU fused), and the peak of memory during the
steps beyond parameters and gradients, as a multiple of the parameters' size.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date

import machine

ROWS = {
    "AdamW foreach": {"kind": "adamw", "foreach": True},
    "AdamW fused": {"kind": "adamw", "fused": True},
    "ivon-opt": {"kind": "ivon-opt"},
    "IVON": {"kind": "ivon"},
    "IVON, redraw": {"kind": "ivon", "restore": "redraw"},
    "IVON, antithetic": {"kind": "ivon", "mc_samples": 2, "antithetic": True},
    "IVON, ggn": {"kind": "ivon", "curvature": "ggn"},
    "AdamW foreach, bf16": {"kind": "adamw", "foreach": True, "dtype": "bfloat16"},
    "IVON, bf16": {"kind": "ivon", "dtype": "bfloat16"},
    "IVON, bf16, redraw": {"kind": "ivon", "restore": "redraw", "dtype": "bfloat16"},
}
MANY = {
    "AdamW foreach, 148 small parameters": {"kind": "adamw", "foreach": True},
    "AdamW fused, 148 small parameters": {"kind": "adamw", "fused": True},
    "ivon-opt, 148 small parameters": {"kind": "ivon-opt"},
    "IVON, 148 small parameters": {"kind": "ivon"},
    "IVON, antithetic, 148 small parameters": {
        "kind": "ivon",
        "mc_samples": 2,
        "antithetic": True,
    },
    "IVON, ggn, 148 small parameters": {"kind": "ivon", "curvature": "ggn"},
    "IVON, bf16, 148 small parameters": {"kind": "ivon", "dtype": "bfloat16"},
}


def main() -> None:
    """Run all rows and print the table; with the hidden `--row`, run one and print its numbers."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--parameters", type=int, default=50_000_000)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--row", choices=[*ROWS, *MANY], help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.row:
        many = given.row in MANY
        sizes = small_model() if many else [(given.parameters // 10,)] * 10
        repeats = given.repeats * (10 if many else 1)
        row = (MANY if many else ROWS)[given.row]
        print(json.dumps(measure(row, sizes, repeats, given.device)))
        return
    import torch

    gpu = given.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device.")
    results = {}
    for name in (*ROWS, *MANY):
        line = [sys.executable, __file__, "--row", name, "--parameters", str(given.parameters)]
        done = subprocess.run(
            [*line, "--repeats", str(given.repeats), "--device", given.device],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        results[name] = json.loads(done.stdout)
    where, clock = (
        (torch.cuda.get_device_name(), "wall") if gpu else (f"{machine.cpu()}, one thread", "CPU")
    )
    against = "AdamW fused" if gpu else "AdamW foreach"
    print(f"{date.today()}, {given.parameters:,} parameters, {where}, torch {torch.__version__}\n")
    print(
        f"| optimizer | {clock} seconds a step | to {against} | memory, of the parameters "
        "| after the step |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, row in ((name, row) for name, row in results.items() if name in ROWS):
        ratio = row["seconds"] / results[against]["seconds"] if against in results else float("nan")
        print(
            f"| {name} | {row['seconds']:.{5 if gpu else 3}f} | {ratio:.2f} | {row['peak']:.1f} "
            f"| {row['after']:.1f} |"
        )
    print(f"\n| optimizer | {clock} ms a step | to AdamW foreach |\n| --- | ---: | ---: |")
    first = results.get(next(iter(MANY)), {"seconds": float("nan")})
    for name in (name for name in MANY if name in results):
        seconds = results[name]["seconds"]
        print(f"| {name} | {1e3 * seconds:.2f} | {seconds / first['seconds']:.2f} |")


def small_model(width: int = 16) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2 of twelve layers, with 64 tokens and 32 places."""
    layer = [(width,)] * 2 + [(width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,)] * 2 + [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(64, width), (32, width), *(12 * layer), (width,), (width,)]


def measure(
    row: dict, shapes: list[tuple[int, ...]], repeats: int, device: str
) -> dict[str, float]:
    """The least seconds of a step, and the memory at its peak and after it, over the parameters."""
    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, row.get("dtype", "float32"))
    options = {k: v for k, v in row.items() if k not in ("kind", "dtype")}
    samples = options.get("mc_samples", 1)
    small = [torch.nn.Parameter(torch.zeros(10, dtype=dtype, device=device))]
    step(
        row["kind"], make(row["kind"], small, options), small, [torch.ones_like(small[0])], samples
    )  # loads code
    start = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    parameters = [torch.nn.Parameter(values.mul_(0.02)) for values in start]
    gradients = [torch.randn_like(p) * 1e-3 for p in parameters]
    optimizer = make(row["kind"], parameters, options)
    before, clock = resident(device), time.process_time if device == "cpu" else finished
    times = []
    reset_peak(device)
    for _ in range(repeats + 2):
        begun = clock()
        step(row["kind"], optimizer, parameters, gradients, samples)
        times.append(clock() - begun)
    unit = sum(p.nbytes for p in parameters)
    return {
        "seconds": min(times[2:]),
        "peak": (peak(device) - before) / unit,
        "after": (resident(device) - before) / unit,
    }


def finished() -> float:
    """Wall seconds when the GPU has done all that it was given."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def make(kind: str, parameters: list, options: dict):
    """The optimizer of a row."""
    import torch

    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, **options)
    if kind == "ivon-opt":
        import ivon

        return ivon.IVON(parameters, lr=1e-4, ess=1e7, hess_init=1e-2)
    from mergekit_bayes.optim.ivon import IVON

    return IVON(
        parameters, lr=1e-4, ess=1e7, hess_init=1e-2, clip_radius=1e-3, rescale_lr=False, **options
    )


def step(kind: str, optimizer, parameters: list, gradients: list, samples: int) -> None:
    """One step on given gradients, with all its samples."""
    if kind == "adamw":
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
        return
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            if getattr(optimizer, "curvature_due", False):
                # One draw's squares, without the backward that computes them.
                pairs = zip(parameters, gradients, strict=True)
                optimizer._transient.squares = {p: g.float().square() for p, g in pairs}
                optimizer._transient.observations = 1
    optimizer.step()


def resident(device: str) -> int:
    """Bytes of memory in use."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def reset_peak(device: str) -> None:
    """Let the peak of memory start again from what is in use."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    machine.reset_peak()


def peak(device: str) -> int:
    """Bytes of memory at the peak since `reset_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return machine.status("VmHWM")


if __name__ == "__main__":
    main()
