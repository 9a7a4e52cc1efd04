"""What a merge of adapters costs in their core space, beside the same through dense weights.

    python scripts/bench/adapters.py [--d 1024] [--rank 16] [--adapters 8] [--repeats 3]
    python scripts/bench/adapters.py --files [--layers 24] [--d 2048] [--adapters 8]
    python scripts/bench/adapters.py --peft

Adapters are random, float32. One thread; each row is a process of its own.

A layer: the CPU seconds to merge one layer of d x d of some adapters. "Files": from adapters of a
few layers on disk to the merged adapter on disk, in core space and through whole models, which are
the merge of BASE+ADAPTER by the same method and the cut of what it changed. "In memory": from
factors to the factors of the merge, with all products formed at once, merged by the same code as
whole models are and cut by the same randomised decomposition as a merge by precision; the least
that the dense way can cost. A rule for matrices is given products in float64 there: in float32
rounding leaves as many directions as the weight has, which TSV-M and Iso-C take for the adapters'
(--rounded shows it).

The fewest seconds of some repetitions, in which all take their turn; what takes a minute is done
once. The difference is that of the uncut merges in memory, relative to the dense one, where both
mean the same. PEFT's row is the combination "svd" of its `add_weighted_adapter`, which is task
arithmetic, against the core's. The goal is a factor of 50 between files.

Files: CPU seconds, wall seconds and peak of memory of whole merges of adapters of a model with some
layers of seven matrices of d x d each.

PEFT: by how much the change of what `add_weighted_adapter` makes differs from the sum of the
changes, each as PEFT itself folds it, relative to that sum, in float64; and whether what it makes
of two adapters loads again once it is saved.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

GOAL = 50.0  # times less than through dense weights
METHODS = ("task_arithmetic", "ties", "dare_ties", "sce", "iso_c", "tsv_m")
PEFT = "PEFT's svd"
NAMES = "qkvogud"  # of the seven matrices of a layer
ONCE = 60.0  # seconds from which a way is not repeated
LEAST = 3  # repetitions of what takes less than a second
CHUNK = 1 << 20  # entries of a compiled pass
FUSED = 512  # d from which it is worth to compile
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def main() -> None:
    """Print the tables that are asked for; with a hidden flag, measure one row."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--d", type=int, help="rows and columns of a weight")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--adapters", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--layers", type=int, help="of the files; by default 8, or 24")
    arguments.add_argument("--methods", nargs="+", default=(*METHODS, PEFT))
    arguments.add_argument("--files", action="store_true", help="measure whole merges of files")
    arguments.add_argument(
        "--rounded", action="store_true", help="give rules for matrices products in float32"
    )
    arguments.add_argument("--peft", action="store_true", help="compare with PEFT's own folds")
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    given.d = given.d or (2048 if given.files else 1024)
    given.layers = given.layers or (24 if given.files else 8)
    if given.one:
        print(json.dumps(measure(given)))
        return
    from machine import commit, cpu

    load = os.getloadavg()[0]
    print(f"{date.today()}, {cpu()}, one thread, load {load:.1f}, {versions()}, {commit()}\n")
    if given.files:
        show_files(given)
    elif given.peft:
        show_peft(given)
    else:
        show_layers(given)


def show_layers(given: argparse.Namespace) -> None:
    """Print a row for each method."""
    print(f"d = {given.d:,}, {given.adapters} adapters of rank {given.rank}\n")
    print(
        "| method | in memory: core, CPU s | dense, CPU s | factor | files: core, CPU s "
        "| whole models, CPU s | factor | goal | difference |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ADAPTERS"] = folder
        alone(given, "write one")
        for method in given.methods:
            found = alone(given, method)
            if "refused" in found:
                print(f"| {method} | {found['refused']} |" + " |" * 7, flush=True)
                continue
            cells = [method, *_cells(found["core"], found["dense"])]
            if method == PEFT:
                cells += ["", "", "", "", ""]
            else:
                factor = found["models"] / found["files"]
                goal = f"at least {GOAL:g}: {'met' if factor >= GOAL else 'MISSED'}"
                same = "another rule" if found["apart"] is None else f"{found['apart']:.0e}"
                cells += [*_cells(found["files"], found["models"]), goal, same]
            print(f"| {' | '.join(cells)} |", flush=True)


def _cells(core: float, dense: float) -> list[str]:
    return [f"{core:.4f}", f"{dense:.2f}", f"{dense / core:,.0f}"]


def show_files(given: argparse.Namespace) -> None:
    """Print whole merges of adapter files, by space and method."""
    print(
        f"{given.layers} layers of 7 matrices, d = {given.d:,}, {given.adapters} adapters of rank "
        f"{given.rank}\n"
    )
    print("| merge | CPU s | wall s | peak, MiB | of all files, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ADAPTERS"] = folder
        size = alone(given, "write")["bytes"]
        for way in ("product", "core task_arithmetic", "core ties", "core tsv_m", "concat"):
            found = alone(given, f"merge {way}")
            print(
                f"| {way} | {found['cpu']:.2f} | {found['wall']:.2f} "
                f"| {found['peak'] / 2**20:.0f} | {size / 2**20:.0f} |",
                flush=True,
            )


def show_peft(given: argparse.Namespace) -> None:
    """Print how far PEFT's combined adapters are from the sum of the changes."""
    from adapters_peft import WEIGHTS

    columns = [", ".join(f"{w:g}" for w in weights) for weights in WEIGHTS]
    print(f"| adapters | combination | weights {' | '.join(columns)} | loads again |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for row in alone(given, "peft"):
        print(f"| {' | '.join(row)} |")


def alone(given: argparse.Namespace, one: str) -> dict:
    """Measure in a process of its own, by one thread."""
    sizes = {"d": given.d, "rank": given.rank, "adapters": given.adapters}
    sizes |= {"repeats": given.repeats, "layers": given.layers}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    flags += ["--rounded"] * given.rounded
    done = subprocess.run(
        [sys.executable, __file__, *flags, "--one", one],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    if done.returncode:
        raise SystemExit(f"{one}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(given: argparse.Namespace) -> object:
    """One row, in this process."""
    if given.one == "write":
        return write_adapters(
            given, [f"layers.{i}.{n}" for i in range(given.layers) for n in NAMES]
        )
    if given.one == "write one":
        return write_adapters(given, [f"layers.{i}.q" for i in range(given.layers)], with_base=True)
    if given.one.startswith("merge "):
        return measure_files(given.one.split()[1:])
    if given.one == "peft":
        from adapters_peft import errors

        return errors()
    return measure_layer(given)


def measure_layer(given: argparse.Namespace) -> dict:
    """The fewest CPU seconds of one layer by both ways, and how far their merges are apart."""
    factors = random_factors(given.d, given.rank, given.adapters)
    if given.one == PEFT:
        try:
            from adapters_peft import combine
        except ImportError:
            return {"refused": "peft is not installed"}
        name = "task_arithmetic"

        def dense() -> object:
            return combine(factors, given.rank)
    else:
        name = given.one
        warm_up(name)

        def dense() -> object:
            return by_dense(name, factors, given.rank, rounded=given.rounded)

    ways: dict[str, Callable[[], object]] = {
        "core": lambda: by_core(name, factors, given.rank),
        "dense": dense,
    }
    if given.one != PEFT:
        ways |= {"files": lambda: by_files(name), "models": lambda: by_models(name, given.rank)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    last: dict[str, object] = {}
    for again in range(max(given.repeats, LEAST)):
        for way, work in ways.items():
            is_slow = bool(seconds[way]) and seconds[way][0] > ONCE
            if again and (is_slow or (again >= given.repeats and seconds[way][0] > 1)):
                continue
            begun = time.process_time()
            last[way] = work()
            seconds[way].append(time.process_time() - begun)
    found = {way: min(each) for way, each in seconds.items()}
    found |= {way: found[way] / given.layers for way in ("files", "models") if way in found}
    return found | {"apart": None if given.one == PEFT else apart(name, last)}


def random_factors(d: int, rank: int, count: int) -> list:
    """Pairs of float32 factors with entries of ordinary sizes."""
    import numpy as np

    from mergekit_bayes.lora.layers import Factors

    rng = np.random.default_rng(0)
    return [
        Factors(*(rng.normal(0, 0.02, s).astype(np.float32) for s in ((rank, d), (d, rank))))
        for _ in range(count)
    ]


def by_core(name: str, factors: list, rank: int) -> tuple:
    """The factors of a merge in core space, and the merge itself."""
    import numpy as np

    from mergekit_bayes.kernels.arrays import Arrays, facts_of, merge_arrays, totals_of
    from mergekit_bayes.lora.core import core_space
    from mergekit_bayes.lora.truncate import truncate_core
    from mergekit_bayes.methods import METHODS, settings_of

    method = METHODS[name]
    settings = settings_of(method, {})
    left = np.concatenate([b for _, b in factors], axis=1, dtype=np.float64)
    right = np.concatenate([a for a, _ in factors], dtype=np.float64)
    is_published = not method.is_equivariant(settings)
    ranks = [len(a) for a, _ in factors]
    space = core_space(left, right, ranks, by_singular_vectors=is_published)
    arrays = Arrays(np.zeros_like(space.cores[0]), space.cores)
    facts = facts_of(method, settings, len(factors), totals_of(method, [arrays]))
    scales = (1.0,) * len(factors)
    keys = [np.uint64(t) for t in range(len(factors))] if method.random else ()
    merged = merge_arrays(method, settings, arrays, scales, facts, keys)
    return truncate_core(space.left, merged, space.right, rank), (space.left, merged, space.right)


def by_dense(name: str, factors: list, rank: int, *, rounded: bool) -> tuple:
    """The factors of a merge through dense weights, and the merge itself."""
    import numpy as np

    from mergekit_bayes.kernels.arrays import Arrays, merge_arrays
    from mergekit_bayes.lora.truncate import truncate_dense
    from mergekit_bayes.methods import METHODS, settings_of

    method = METHODS[name]
    settings = settings_of(method, {})
    d = len(factors[0].b)
    real = np.float32 if rounded or method.matrix is None else np.float64
    changes = np.zeros((1 + len(factors), d, d), real)  # the base's first, which is zero
    for change, (a, b) in zip(changes[1:], factors, strict=True):
        np.matmul(b.astype(real), a.astype(real), out=change)
    scales = (1.0,) * len(factors)
    if method.matrix is not None:
        wide = [change.astype(np.float64, copy=False) for change in changes]
        merged = merge_arrays(method, settings, Arrays(wide[0], tuple(wide[1:])), scales)
        merged = merged.astype(np.float32)
    elif method.tensor is not None:
        arrays = Arrays(changes[0], tuple(changes[1:]))
        merged = merge_arrays(method, settings, arrays, scales).astype(np.float32)
    else:
        merged = by_passes(method, settings, changes.reshape(len(changes), -1)).reshape(d, d)
    return truncate_dense(merged, rank), merged


def by_passes(method, settings, means):
    """Merge flat changes by the passes that merge files of whole models."""
    import numpy as np

    from mergekit_bayes.kernels import Chunk, Kind, Numbers, Tally, can_fuse, elementwise
    from mergekit_bayes.kernels.arrays import facts_of
    from mergekit_bayes.kernels.passes import first_pass
    from mergekit_bayes.methods.histogram import BINS

    count, size = len(means) - 1, means.shape[1]
    fused = can_fuse(count) and size >= FUSED**2
    kind = Kind(method, weighs=False, has_base=True, anchored=False, removes=False)
    keys = tuple(np.uint64(t) for t in range(count)) if method.random else ()
    zeros = (0.0,) * (1 + count)
    numbers = Numbers((1.0,) * count, None, zeros, zeros, zeros, zeros, zeros, zeros, zeros, keys)
    merged, empty = np.empty(size, np.float32), np.zeros((1 + count, 0), np.float32)

    def chunks():
        for start in range(0, size, CHUNK):
            piece = np.ascontiguousarray(means[:, start : start + CHUNK])
            n, extras = piece.shape[1], np.zeros((1 + count, 1), np.float32)
            into = merged[start : start + n]
            yield Chunk(piece, empty, extras, n, n, start, into, np.zeros(0, np.float32))

    totals = np.zeros(0)
    if method.reduction is not None:
        totals = np.zeros((method.reduction.count(count), BINS), np.int64)
        for chunk in chunks():
            first_pass(kind, fused=fused)(chunk, numbers.cast(np.float32), totals)
    facts = facts_of(method, settings, count, totals)
    numbers = numbers._replace(facts=facts).cast(np.float32)
    for chunk in chunks():
        elementwise(kind, fused=fused)(chunk, numbers, Tally(1 + count))
    return merged


def warm_up(name: str) -> None:
    """Load and compile what both ways need, which a merge of many layers does once."""
    small = random_factors(FUSED, 2, 3)
    by_core(name, small, 2)
    by_dense(name, small, 2, rounded=False)


def by_files(name: str) -> None:
    """Merge adapter files in core space."""
    from mergekit_bayes.lora import merge_adapters

    folder = Path(os.environ["ADAPTERS"])
    refs = sorted(map(str, folder.glob("a*")))
    merge_adapters(refs, folder / "core", space="core", method=name, force=True)


def by_models(name: str, rank: int) -> None:
    """Merge the base with each adapter folded in, and cut what the merge changed of the base."""
    import numpy as np

    from mergekit_bayes.checkpoint.codec import read_tensor
    from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
    from mergekit_bayes.lora.truncate import truncate_dense
    from mergekit_bayes.merge import MergeConfig, run_merge

    folder = Path(os.environ["ADAPTERS"])
    base, out = folder / "base", folder / "merged"
    models = tuple(f"{base}+{ref}" for ref in sorted(folder.glob("a*")))
    config = MergeConfig(models=models, base=str(base), method=name, out=str(out), force=True)
    run_merge(config, threads=1)
    files = [[folder / "model.safetensors"] for folder in (base, out)]
    with SafetensorsSource(files[0]) as before, SafetensorsSource(files[1]) as after:
        for name in before.specs:
            change = read_tensor(after, name)
            truncate_dense(np.subtract(change, read_tensor(before, name), out=change), rank)


def apart(name: str, last: dict) -> float | None:
    """The distance of both merges, relative to the dense one; None where they are two rules."""
    import numpy as np

    from mergekit_bayes.methods import METHODS, settings_of

    if not METHODS[name].is_equivariant(settings_of(METHODS[name], {})):
        return None
    (_, (left, core, right)), (_, dense) = last["core"], last["dense"]
    found = left.times(core) @ right.times(np.eye(right.size)).T
    return float(np.linalg.norm(found - dense) / np.linalg.norm(dense))


def write_adapters(
    given: argparse.Namespace, modules: list[str], *, with_base: bool = False
) -> dict:
    """Write adapters and perhaps their base; return the size of the adapters."""
    import numpy as np

    from mergekit_bayes.checkpoint.codec import encode
    from mergekit_bayes.checkpoint.sink import SafetensorsSink
    from mergekit_bayes.checkpoint.specs import TensorSpec

    size, rng = 0, np.random.default_rng(0)
    if with_base:
        base = Path(os.environ["ADAPTERS"]) / "base" / "model.safetensors"
        base.parent.mkdir()
        spec = TensorSpec("F32", (given.d, given.d))
        with SafetensorsSink(base, {f"{m}.weight": spec for m in modules}, {}) as sink:
            for module in modules:
                weight = rng.normal(0, 0.02, spec.size).astype(np.float32)
                sink.write_bytes(f"{module}.weight", 0, encode(weight, "F32"))
    for t in range(given.adapters):
        folder = Path(os.environ["ADAPTERS"]) / f"a{t}"
        folder.mkdir()
        specs = {}
        for module in modules:
            stem = f"base_model.model.{module}"
            specs[f"{stem}.lora_A.weight"] = TensorSpec("F32", (given.rank, given.d))
            specs[f"{stem}.lora_B.weight"] = TensorSpec("F32", (given.d, given.rank))
        with SafetensorsSink(folder / "adapter_model.safetensors", specs, {}) as sink:
            for name, spec in specs.items():
                data = encode(rng.normal(0, 0.02, spec.size).astype(np.float32), "F32")
                sink.write_bytes(name, 0, data)
                size += len(data)
        config = {"peft_type": "LORA", "r": given.rank, "lora_alpha": 2 * given.rank}
        config["target_modules"] = list(NAMES)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return {"bytes": size}


def measure_files(way: list[str]) -> dict:
    """The seconds and the peak of memory of one merge of files."""
    from machine import reset_peak, status

    from mergekit_bayes.lora import merge_adapters

    folder = Path(os.environ["ADAPTERS"])
    space, *method = way
    refs = sorted(map(str, folder.glob("a*")))
    reset_peak()
    before = status("VmRSS")
    begun = time.process_time(), time.perf_counter()
    out = folder / "out"
    merge_adapters(refs, out, space=space, method=method[0] if method else None, force=True)
    return {
        "cpu": time.process_time() - begun[0],
        "wall": time.perf_counter() - begun[1],
        "peak": status("VmHWM") - before,
    }


def versions() -> str:
    """The versions that matter."""
    import numpy as np

    import mergekit_bayes

    return (
        f"bmerge {mergekit_bayes.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
