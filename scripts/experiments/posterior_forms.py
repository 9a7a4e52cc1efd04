"""What an addition and a removal lose by a posterior that is stored in a coarser form.

    python scripts/tiny_world.py -o runs/tiny
    OMP_NUM_THREADS=1 python scripts/experiments/posterior_forms.py -o runs/forms [--seeds 3]
    OMP_NUM_THREADS=1 python scripts/experiments/posterior_forms.py -o runs/forms-real \
        --real runs/without-data/2.1M

The base of the tiny world gets a precision by entry. For each seed it is fine-tuned by IVON on
garden and on kitchen, which are added (scale 1 each), and on insults, which are subtracted at
several scales. Every posterior is then stored as two vectors a matrix, one number a row, and one a
tensor, and merged. Printed in nats a token on held-out text, mean and standard deviation over
seeds:

    added      the loss on garden and kitchen together, and on other text
    removed    what other text loses where insults have lost 0.3 nats, between scales

`uniform` is task arithmetic: what the precision by entry gains over it is what a coarser form can
lose. Everything is kept in the output folder; a run that is stopped goes on. With `--real` the
models are those of without_data.py, whose work folder for one size is named, with its root-GGN on
held-out text: the same addition, and the same removal at the same rise of the removed text.
"""

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from real_merges import ADDED, KEPT, World, add, make_precision, subtract
from without_data import kinds, make_base, precisions_to_add, precisions_to_subtract, world_at

from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.posterior.pooling import PosteriorForm, write_pooled
from mergekit_bayes.posterior.stored import StoredPrecisions
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import PrecisionConfig

FORMS: tuple[PosteriorForm, ...] = ("entries", "row-column", "row")
KINDS = (*FORMS, "tensor", "uniform")
TASKS = {"garden": 60, "kitchen": 60, "rude": 40}  # steps, as in the demo
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
REMOVED = 0.3  # nats a token that insults have lost where the cost is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--world", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real", type=Path, help="work folder of without_data.py for one size")
    parser.add_argument("--rows", type=int, default=1000, help="with --real: of a precision")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_libraries(bars=False):
        found = [measure(options, seed) for seed in range(options.seeds)]
    show(found)


Numbers = dict[str, dict[str, float]]


def measure(options: argparse.Namespace, seed: int) -> Numbers:
    """The numbers of one seed by kind of precision and name."""
    file = options.out / f"seed-{seed}.json"
    if not file.exists():
        measured = (
            measure_real(options.out, world_at(options.real), seed, options.rows)
            if options.real
            else measure_tiny(options.out, options.world, seed)
        )
        file.write_text(json.dumps(measured, indent=1))
    result: Numbers = json.loads(file.read_text())
    return result


def measure_tiny(out: Path, world: Path, seed: int) -> Numbers:
    """The numbers of a seed of the tiny world."""
    models = {name: fine_tuned(out, world, name, seed) for name in TASKS}
    precision = base_precision(out, world)
    return {kind: measure_kind(out, world, precision, models, kind) for kind in KINDS}


def measure_real(out: Path, world: World, seed: int, rows: int) -> Numbers:
    """The numbers of a base of real text."""
    reference, base = kinds(rows)[0], make_base(world, seed)
    folder = world.work / f"precisions-{seed}"
    folder.mkdir(exist_ok=True)
    one = reference, make_precision(world, base, reference, rows, folder / "0")
    to_add = precisions_to_add(world, seed, one, rows)
    to_subtract = precisions_to_subtract(world, seed, one, rows)
    found = {}
    for kind in KINDS:
        form = next((form for form in FORMS if form == kind), "entries")
        stored = {m: stored_as(out, m, p, form) for m, p in (to_add | to_subtract).items()}
        weights = [
            {model: stored[model] for model in models} if kind != "uniform" else None
            for models in (to_add, to_subtract)
        ]
        pool = "tensor" if kind == "tensor" else None
        read = add(world, seed, weights[0], pool=pool)
        paid = subtract(world, seed, weights[1], pool)
        nats, tokens = (
            {text: sum(read[text][count]) for text in read} for count in ("nats", "tokens")
        )
        found[kind] = {
            "bytes": mean_bytes(stored.values()),
            "added": sum(nats[t] for t in ADDED) / sum(tokens[t] for t in ADDED),
            **{f"added, {text}": nats[text] / tokens[text] for text in read},
            **{f"removed, {text}": paid[text] if paid else np.nan for text in KEPT},
        }
    return found


def fine_tuned(out: Path, world: Path, name: str, seed: int) -> Path:
    """A fine-tune of the base, with its posterior."""
    folder = out / f"{name}-{seed}"
    if not folder.exists():
        run_finetune(
            FinetuneConfig(
                model=str(world / "base"),
                data=str(world / "texts" / f"{name}_train.jsonl"),
                output=str(folder),
                max_steps=TASKS[name],
                batch_size=16,
                seed=seed,
                **({"curvature": "price"} if name == "rude" else {}),
            )
        )
    return folder


def base_precision(out: Path, world: Path) -> Path:
    """The precision of the base by entry."""
    place = out / "base-precision"
    if not place.exists():
        config = PrecisionConfig(
            model=str(world / "base"),
            data=str(world / "texts" / "all_train.jsonl"),
            output=str(place),
            examples=2000,
            batch_size=4,
        )
        run_precision(config, quiet=True)
    return place


def stored_as(out: Path, model: Path, precision: Path | None, form: PosteriorForm) -> Path:
    """The posterior of a model in a form."""
    place = out / "forms" / form / model.name
    if not place.exists():
        place.mkdir(parents=True)
        with open_posterior(str(model), precision=precision and str(precision)) as opened:
            assert isinstance(opened.precision, StoredPrecisions)
            assert opened.info is not None
            write_pooled(opened.precision, opened.info, place, form)
    return place


def measure_kind(
    out: Path, world: Path, base_precision: Path, models: Mapping[str, Path], kind: str
) -> dict[str, float]:
    """The losses of an addition and of removals with one kind of precision."""
    base, texts = world / "base", world / "texts"
    form = next((form for form in FORMS if form == kind), "entries")
    precision = {str(m): str(stored_as(out, m, None, form)) for m in models.values()}
    precision[str(base)] = str(stored_as(out, base, base_precision, form))

    def merged(tasks: Sequence[str], scale: float) -> dict[str, float]:
        names = [str(models[t]) for t in tasks]
        settings: dict[str, object] = {"weights": "uniform"}
        if kind != "uniform":
            given = {name: precision[name] for name in (str(base), *names)}
            counts = {str(base): "3x"} if scale < 0 else {}
            settings = {"weights": "precision", "precision": given, "observations": counts}
            settings |= {"pool": "tensor"} if kind == "tensor" else {}
            settings |= {"shrink": "0.3"} if scale < 0 else {}
        target = out / "merged"
        run_merge(
            MergeConfig(
                models=tuple(names),
                base=str(base),
                scale=(scale,) * len(names),
                out=str(target),
                force=True,
                **settings,
            )
        )
        return losses(target, texts)

    added = merged(("garden", "kitchen"), 1.0)
    start = losses(base, texts)
    removals = [merged(("rude",), -scale) for scale in SCALES]
    rises = [r["rude"] - start["rude"] for r in removals]
    cost = {
        name: [r[name] - start[name] for r in removals] for name in ("kind", "garden", "crossed")
    }
    reached = max(rises) >= REMOVED
    return {
        "bytes": mean_bytes(Path(place) for place in precision.values()),
        "added": (added["garden"] + added["kitchen"]) / 2,
        "added, kind": added["kind"],
        "added, crossed": added["crossed"],
        **{
            f"removed, {name}": float(np.interp(REMOVED, rises, values)) if reached else np.nan
            for name, values in cost.items()
        },
    }


def mean_bytes(places: Iterable[Path]) -> float:
    """Bytes of a stored precision, without its index and record."""
    return float(np.mean([f.stat().st_size for p in places for f in p.glob("*.posterior")]))


@torch.no_grad()
def losses(model: Path, texts: Path) -> dict[str, float]:
    """Nats a token on the held-out texts."""
    loaded = load_model(str(model))
    found = {}
    for name in ("garden", "kitchen", "rude", "kind", "crossed"):
        lines = (texts / f"{name}_test.jsonl").read_text().splitlines()
        rows = {"text": [json.loads(line)["text"] for line in lines]}
        total = count = 0.0
        for batch in batches(encode_rows(rows, loaded), 64, Collate(loaded.pad)):
            output = loaded.model(**batch)
            scored = int((batch["labels"][:, 1:] != -100).sum())
            total += float(output.loss) * scored
            count += scored
        found[name] = total / count
    return found


def show(found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Print the table."""
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, seeds {len(found)}")
    names = [n for n in found[0]["entries"] if n != "bytes"]
    print(f"{'':12}{'bytes':>10}" + "".join(f"{n:>24}" for n in names))
    for kind in KINDS:
        cells = []
        for name in names:
            values = np.array([seed[kind][name] for seed in found])
            cells.append(
                f"{values.mean():>14.4f} ± {values.std(ddof=1) if len(found) > 1 else 0:.4f}"
            )
        size = found[0][kind]["bytes"] if kind in FORMS else 0
        print(f"{kind:12}{size:>10,.0f}" + "".join(f"{cell:>24}" for cell in cells))
    for kind in ("row-column", "row", "tensor"):
        shares = []
        for name in names:
            lost = np.array([s[kind][name] - s["entries"][name] for s in found])
            gain = np.array([s["uniform"][name] - s["entries"][name] for s in found])
            spread = f" ± {lost.std(ddof=1):.4f}" if len(found) > 1 else ""
            shares.append(f"{name} {lost.mean():+.4f}{spread} of {gain.mean():+.4f}")
        print(f"{kind} loses: " + "; ".join(shares))


if __name__ == "__main__":
    main()
