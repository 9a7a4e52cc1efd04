"""Which faulty precisions a merge refuses or labels, and how often it is wrong about good ones.

    python scripts/experiments/planted_precisions.py -o runs/planted

Small models of twelve families are trained for seconds (planted_world.py). Each gets good
precisions, by `bmerge precision` with other rows, batches, seeds and priors, and ten faulty ones,
made of a good one: nine are files whose record says that they belong to the model, and two are
those of another step and of another model with their own records. Every precision is judged by an
average of the model with itself half-way through its training, which has a good precision: a merge
that is refused, or whose notes doubt this precision, has found the fault.

The thresholds in `mergekit_bayes.posterior.information` and `mergekit_bayes.stream.worth` were
fixed on the first seven families, whose statistics `--half fitting` prints. The others were counted
once, `--half counting`. Exits with 1 if a fault of the counting half is not found, or a good
precision is doubted.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from planted_world import COUNTING, FITTING, Model, make_model, make_texts

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.merge import MergeConfig
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import PosteriorInfo, Prior, open_posterior, save_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.stream.worth import notes_on_precisions

Tensors = dict[str, NDArray[np.float32]]
_ALARM = re.compile(r"is doubtful|times that of")
# Rows, batch size and file of the good precisions; the last one has a prior inside.
_GOOD = (
    (1000, 8, "held_out"),
    (1000, 8, "held_out"),
    (1000, 32, "held_out"),
    (500, 4, "held_out"),
    (400, 8, "kind"),
    (200, 8, "held_out"),
    (200, 1, "held_out"),
    (64, 8, "held_out"),
    (64, 1, "held_out"),
    (300, 8, "held_out"),
)
_PRIOR = 0.1  # of the last one, times the median curvature


class Verdict(NamedTuple):
    """What a merge makes of one precision.

    Attributes:
        kind: `good`, or the name of the fault.
        model: Family and seed.
        found: `refused`, `labelled` or `nothing`.
        words: The first message.
    """

    kind: str
    model: str
    found: str
    words: str


def estimate(model: Path, out: Path, *, rows: int, batch: int, data: Path, seed: int) -> Path:
    """A precision by `bmerge precision`, unless an earlier run made it."""
    if not out.exists():
        run_precision(
            PrecisionConfig(
                model=str(model),
                data=str(data),
                output=str(out),
                examples=rows,
                batch_size=batch,
                seed=seed,
            ),
            quiet=True,
        )
    return out


def read(model: Path, precision: Path) -> tuple[Tensors, PosteriorInfo]:
    """The tensors of a precision, and its record."""
    with open_posterior(str(model), precision=str(precision)) as posterior:
        source, info = posterior.precision, posterior.info
        assert source is not None
        assert info is not None
        return {name: read_tensor(source, name) for name in source.specs}, info


def good_precisions(model: Model, texts: Path, work: Path) -> Iterator[Path]:
    """Ten good precisions of a model."""
    for i, (rows, batch, data) in enumerate(_GOOD):
        out = estimate(
            model.folder,
            work / f"good-{i}",
            rows=rows,
            batch=batch,
            data=texts / f"{data}.jsonl",
            seed=model.seed * 100 + i,
        )
        if i + 1 == len(_GOOD):
            tensors, info = read(model.folder, out)
            logs = np.concatenate([t[t > 0].ravel() for t in tensors.values()])
            prior = _PRIOR * float(np.median(logs))
            out = write(
                model.folder,
                {name: t + np.float32(prior) for name, t in tensors.items()},
                info.model_copy(update={"prior": Prior(kind="isotropic", precision=prior)}),
                work / "good-prior",
            )
        yield out


def write(model: Path, tensors: Tensors, info: PosteriorInfo, out: Path) -> Path:
    """Store a precision with this record."""
    save_posterior(model, tensors, info, out=out, force=True)
    return out


def _noise(tensor: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    logs = np.log(tensor[tensor > 0]) if (tensor > 0).any() else np.zeros(1)
    return np.exp(draw.normal(logs.mean(), logs.std(), tensor.shape)).astype(np.float32)


def _permuted(tensor: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    return draw.permutation(tensor.ravel()).reshape(tensor.shape)


def _turned(tensor: NDArray[np.float32], draw: np.random.Generator) -> NDArray[np.float32]:
    """Transposed where the shape stays, since any other is refused by its shape."""
    is_square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    return tensor.T if is_square else tensor


_Change = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.float32]]
# Faults that change the numbers and leave the record.
_NUMBERS: dict[str, _Change] = {
    "constant": lambda t, draw: np.full_like(t, t.mean()),
    "hess_init only": lambda t, draw: (100 * draw.normal(1, 1e-3, t.shape)).astype(np.float32),
    "transposed": _turned,
    "permuted": _permuted,
    "noise": _noise,
    "half zero": lambda t, draw: t * (draw.random(t.shape) < 0.5),
}


def faulty_precisions(
    model: Model, other: Model, good: Path, texts: Path, work: Path
) -> Iterator[tuple[str, Path]]:
    """Ten faulty precisions of a model, with the name of the fault."""
    tensors, info = read(model.folder, good)
    draw = np.random.default_rng(model.seed)
    for name, change in _NUMBERS.items():
        changed = {n: np.ascontiguousarray(change(t, draw), np.float32) for n, t in tensors.items()}
        yield name, write(model.folder, changed, info, work / name.replace(" ", "-"))
    data = texts / "held_out.jsonl"
    for name, source in (("of another step", model.earlier), ("of another model", other.folder)):
        yield (
            name,
            estimate(source, work / name.replace(" ", "-"), rows=1000, batch=8, data=data, seed=1),
        )
    count = float(info.observations or 1)
    if info.unit == "token":  # for tokens, but counted by texts
        texts_in_data = len(data.read_text().splitlines())
        scaled = {n: t * np.float32(texts_in_data / count) for n, t in tensors.items()}
        yield "another unit", write(model.folder, scaled, info, work / "another-unit")
    else:
        record = info.model_copy(update={"unit": "token"})
        yield "another unit", write(model.folder, tensors, record, work / "another-unit")
    factor = np.float32(count if model.seed % 2 else 1 / count)
    scaled = {name: t * factor for name, t in tensors.items()}
    yield "off by N", write(model.folder, scaled, info, work / "off-by-N")


def judge(kind: str, model: Model, precision: Path, second: Path) -> Verdict:
    """What an average of the model with its earlier self makes of a precision."""
    label = f"{model.family} {model.seed}"
    config = MergeConfig(
        models=(str(model.folder), str(model.earlier)),
        weights="precision",
        precision={str(model.folder): str(precision), str(model.earlier): str(second)},
        out=str(precision.parent / "never-written"),
    )
    try:
        with plan_merge(config) as plan:
            notes = [*plan.notes, *notes_on_precisions(plan)]
    except BmergeError as error:
        return Verdict(kind, label, "refused", str(error))
    alarms = [note for note in notes if _ALARM.search(note)]
    return Verdict(kind, label, "labelled" if alarms else "nothing", next(iter(alarms), ""))


def run(families: tuple[str, ...], seeds: tuple[int, ...], out: Path) -> Iterator[Verdict]:
    """Judge the good and the faulty precisions of these families and seeds."""
    texts = out / "texts"
    rows = make_texts(texts)
    for family in families:
        models = [make_model(family, seed, rows, out) for seed in (*seeds, seeds[-1] + 1)]
        for model, other in pairwise(models):
            work = out / "precisions" / f"{family}-{model.seed}"
            work.mkdir(parents=True, exist_ok=True)
            data = texts / "held_out.jsonl"
            second = estimate(
                model.earlier, work / "second", rows=1000, batch=8, data=data, seed=model.seed
            )
            goods = list(good_precisions(model, texts, work))
            for good in goods:
                found = judge("good", model, good, second)
                _show(model, good, found)
                yield found
            for kind, faulty in faulty_precisions(model, other, goods[0], texts, work):
                found = judge(kind, model, faulty, second)
                _show(model, faulty, found)
                yield found


def _show(model: Model, precision: Path, verdict: Verdict) -> None:
    """The statistics of a precision, on which thresholds are fixed."""
    found = run_inspect(str(model.folder), precision=str(precision)).precision
    assert found is not None
    numbers = "no entries"
    if (known := found.information) is not None:
        values = known.model_dump(include={"deviation", "explained", "aligned", "zeros"})
        numbers = ", ".join(f"{n} {v:.2f}" for n, v in values.items() if v is not None)
    print(
        f"{verdict.model:14} {verdict.kind:18} {verdict.found:9} {numbers}  {verdict.words[:160]}",
        file=sys.stderr,
        flush=True,
    )


def table(verdicts: list[Verdict]) -> str:
    """How many precisions of each kind were refused, labelled, or neither."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for verdict in verdicts:
        counts[verdict.kind][verdict.found] += 1
    lines = ["| precisions | number | refused | labelled | neither |", "| --- " * 5 + "|"]
    for kind, found in counts.items():
        cells = [sum(found.values()), found["refused"], found["labelled"], found["nothing"]]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Judge the precisions of one half and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/planted"))
    parser.add_argument("--half", choices=("fitting", "counting"), default="counting")
    parser.add_argument("--json", type=Path, help="Where every verdict goes.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    families, seeds = (FITTING, (0,)) if chosen.half == "fitting" else (COUNTING, (1, 2))
    verdicts = list(run(families, seeds, chosen.out))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([v._asdict() for v in verdicts], indent=1) + "\n")
    print(table(verdicts))
    wrong = [v for v in verdicts if (v.kind == "good") != (v.found == "nothing")]
    for verdict in wrong:
        print(f"wrong: {verdict.model}, {verdict.kind}: {verdict.words or 'nothing'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
