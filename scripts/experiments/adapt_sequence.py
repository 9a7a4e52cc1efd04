"""Ten edits in a row by `bmerge adapt`, each on the output of the last: how far does it drift?

    OMP_NUM_THREADS=1 python scripts/experiments/adapt_sequence.py -o runs/sequence
        [--size small|tiny] [--seed 0] [--only WAY ...]

A language model has learnt the world of `tiny_world.py`. Edits then teach it tales, each a grammar
of its own over the same words; every third edit removes the oldest tale again. After each edit the
model is compared with joint training: the base trained on all rows that now count, those of the
base and of the tales that were added and not removed. Each way to hold the model makes the same
edits by the same settings. An addition takes all its steps; a removal ends when the loss on a tenth
of its rows, which is held out, has risen by 5 nats a token, about what joint training loses there.

    nothing       no K-prior
    posterior     the stored precision, S_0 + H_add - H_remove, which each edit hands on
    rows          the same, averaged over each row of a matrix
    memory        KL divergence on a few rows of all that counted before the edit, drawn at random
    both          memory and stored precision

Printed after each edit, in nats a token on test text: the loss above joint training's on the base's
world, on the tales that are there and on those that were removed (below 0: not forgotten), and the
drift KL(joint || model) on world and tales. The last column is the seconds that the edit took.

Everything is kept in the output folder, so that a run that is stopped goes on where it was. `small`
takes some ten minutes on one core.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_world import COLOURS, DEEDS, FOODS, KIND, PLANTS, ROLES, write_rows, write_world
from train_tiny_lm import train, train_tokenizer

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.models.encode import Collate, Example, batches, encode_rows
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import PrecisionConfig


@dataclass(frozen=True)
class Size:
    """How large an experiment is.

    Attributes:
        world: Rows that the base is trained on.
        tale: Rows of a tale.
        test: Test rows of the world and of each tale.
        memory: Rows of the memory.
        base_steps: Steps of the base's training.
        joint_steps: Steps of joint training from the base.
        steps: Steps of an edit.
        edits: Number of edits.
    """

    world: int
    tale: int
    test: int
    memory: int
    base_steps: int
    joint_steps: int
    steps: int
    edits: int


SIZES = {
    "small": Size(6000, 300, 150, 256, 700, 300, 80, 10),
    "tiny": Size(400, 60, 30, 32, 60, 20, 6, 3),
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {"prior": "none"},
    "posterior": {"prior": "stored"},
    "rows": {"prior": "stored", "pool": "row"},
    "memory": {"prior": "none"},
    "both": {"prior": "stored"},
}
PRIOR = 100.0  # of the base, 1/weight^2: weights are of the size of 0.1
RATE = 1e-3  # of edits, and of joint training at its start
RISE = 5.0  # goal of a removal: what a tale costs a model that never heard it, nats a token
WITH_MEMORY = ("memory", "both")


@dataclass(frozen=True)
class Edit:
    """One edit, and what counts after it.

    Attributes:
        kind: "add" or "remove".
        tale: Number of the tale.
        present: Tales that count afterwards.
        removed: Tales that were removed so far.
    """

    kind: str
    tale: int
    present: tuple[int, ...]
    removed: tuple[int, ...]


def plan(edits: int) -> list[Edit]:
    """Add two tales, remove the oldest one, and so on."""
    present: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    result, told = [], 0
    for number in range(1, edits + 1):
        if number % 3 == 0:
            tale, present = present[0], present[1:]
            removed = (*removed, tale)
            result.append(Edit("remove", tale, present, removed))
        else:
            present = (*present, told)
            result.append(Edit("add", told, present, removed))
            told += 1
    return result


def tell(number: int, seed: int, count: int) -> list[str]:
    """Sentences of one tale: its role does its own deeds to its own plants and foods."""
    choose = random.Random(1000 * seed + number)
    colours, plants, foods = (choose.sample(words, 3) for words in (COLOURS, PLANTS, FOODS))
    deeds, moods = choose.sample(DEEDS, 2), choose.sample(KIND, 3)
    pick = choose.choice
    return [
        f"{ROLES[number]} {pick(deeds)} , so the {pick(colours)} {pick(plants)} is {pick(moods)} "
        f"and the {pick(foods)} {pick(colours)} ."
        for _ in range(count)
    ]


class Experiment:
    """All files and models of one run.

    Args:
        folder: Where everything is kept.
        size: How large it is.
        seed: Seed of texts and training.
    """

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.edits = plan(size.edits)
        tales = 1 + max(edit.tale for edit in self.edits)
        write_world(folder, seed)
        texts = folder / "texts"
        draw = random.Random(seed)
        world = _read(texts / "all_train.jsonl")
        draw.shuffle(world)
        self.world = world[: size.world]
        test = [
            text
            for kind in ("kind", "rude", "garden", "kitchen")
            for text in _read(texts / f"{kind}_test.jsonl")
        ]
        draw.shuffle(test)
        self.world_test = test[: size.test]
        told = [tell(number, seed, size.tale + size.test) for number in range(tales)]
        self.tales = [rows[: size.tale] for rows in told]
        self.tale_tests = [rows[size.tale :] for rows in told]
        write_rows(texts / "world.jsonl", self.world)
        for number, rows in enumerate(self.tales):
            write_rows(texts / f"tale_{number}.jsonl", rows)
        self.base = folder / "base"

    def make_base(self) -> None:
        """Train the base, unless it is there, and store its precision.

        Its tokenizer knows all words of the tales.
        """
        if not (self.base / "posterior").exists():
            everything = self.world + [text for rows in self.tales for text in rows]
            settings = {"layers": 2, "width": 96, "heads": 4, "context": 32, "batch": 32}
            train(
                self.world,
                self.base,
                tokenizer=train_tokenizer(everything, 400, words=True),
                steps=self.size.base_steps,
                rate=2e-3,
                seed=self.seed,
                **settings,
            )
            data = str(self.folder / "texts" / "world.jsonl")
            run_precision(
                PrecisionConfig(
                    model=str(self.base), data=data, prior=PRIOR, batch_size=8, seed=self.seed
                )
            )

    def joint(self, number: int) -> Path:
        """The base trained on all that counts after an edit; of itself alone before the first."""
        folder = self.folder / "joint" / str(number)
        if not (folder / "config.json").exists():
            present = self.edits[number - 1].present
            rows = self.world + [text for tale in present for text in self.tales[tale]]
            _train_on(self.base, rows, folder, self.size.joint_steps, self.seed)
        return folder

    def edited(self, way: str, number: int) -> tuple[Path, float]:
        """The output of an edit, which is made unless it is there, and its seconds."""
        folder = self.folder / way / str(number)
        record = self.folder / way / f"{number}.json"
        if not record.exists():
            edit, before = self.edits[number - 1], self.folder / way / str(number - 1)
            settings: dict[str, Any] = {
                "model": str(self.base if number == 1 else before),
                "output": str(folder),
                edit.kind: {"data": str(self.folder / "texts" / f"tale_{edit.tale}.jsonl")},
                "max_steps": self.size.steps,
                "learning_rate": RATE,
                "posterior": "flush" if WAYS[way]["prior"] == "stored" else "none",
                "seed": self.seed + number,
                "force": True,
                **WAYS[way],
            }
            if edit.kind == "remove":
                settings |= {"until": {"held_out_rise": RISE}, "check_every": 4}
            if way in WITH_MEMORY:
                settings["memory"] = {"data": str(self._memory(number))}
            if way == "memory":
                settings["base_observations"] = self._observations(number)
            begun = time.perf_counter()
            report = run_adapt(AdaptConfig.model_validate(settings), quiet=True)
            seconds = time.perf_counter() - begun
            record.write_text(
                json.dumps({"seconds": seconds, "report": report.model_dump(mode="json")})
            )
        return folder, json.loads(record.read_text())["seconds"]

    def _counted_before(self, number: int) -> list[str]:
        """All rows that count before an edit; of a removal without those that it removes."""
        present = self.edits[number - 2].present if number > 1 else ()
        edit = self.edits[number - 1]
        tales = [tale for tale in present if edit.kind == "add" or tale != edit.tale]
        return self.world + [text for tale in tales for text in self.tales[tale]]

    def _memory(self, number: int) -> Path:
        rows = self._counted_before(number)
        chosen = random.Random(self.seed + number).sample(rows, self.size.memory)
        path = self.folder / "texts" / f"memory_{number}.jsonl"
        write_rows(path, chosen)
        return path

    def _observations(self, number: int) -> int:
        rows = self._counted_before(number)
        return sum(len(row.split()) + 1 for row in rows)  # a word is a token, and one ends the row

    def measure(self, way: str, number: int) -> dict[str, Any]:
        """One line of the table."""
        folder, seconds = self.edited(way, number)
        edit = self.edits[number - 1]
        joint, model = load_model(str(self.joint(number))), load_model(str(folder))
        sets = {
            "world": self.world_test,
            "present": [t for tale in edit.present for t in self.tale_tests[tale]],
            "removed": [t for tale in edit.removed for t in self.tale_tests[tale]],
        }
        line: dict[str, Any] = {"way": way, "edit": number, "kind": edit.kind, "seconds": seconds}
        for name, texts in sets.items():
            line[name], line[f"{name}_kl"] = _compare(joint, model.model, texts)
        return line


def _read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def _train_on(base: Path, rows: Sequence[str], folder: Path, steps: int, seed: int) -> None:
    """Train a copy of the base on rows, by AdamW at a rate that falls to 0."""
    loaded = load_model(str(base))
    examples = encode_rows({"text": rows}, loaded)
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(
        loaded.model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99)
    )
    collate = Collate(loaded.pad)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        batch = collate(order.choices(examples, k=32))
        loss = loaded.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _compare(joint: Loaded, model: Module, texts: Sequence[str]) -> tuple[float, float]:
    """Loss above joint training's and KL(joint || model), nats a token; 0 without texts."""
    if not texts:
        return 0.0, 0.0
    examples: list[Example] = list(encode_rows({"text": list(texts)}, joint))
    rise = divergence = 0.0
    tokens = 0
    for batch in batches(examples, 64, Collate(joint.pad)):
        labels = batch.pop("labels")[:, 1:]
        scored = labels != -100
        log_p, log_q = (
            m(**batch).logits[:, :-1][scored].log_softmax(-1) for m in (joint.model, model)
        )
        at_label = labels[scored][:, None]
        rise += float((log_p - log_q).gather(-1, at_label).sum())
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += int(scored.sum())
    return rise / tokens, divergence / tokens


def main() -> None:
    """Make the edits, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=list(WAYS))
    chosen = parser.parse_args()
    with quiet_libraries(bars=False):
        run(chosen.out, SIZES[chosen.size], chosen.seed, chosen.only)


def run(
    out: Path, size: Size, seed: int, ways: Sequence[str] = tuple(WAYS)
) -> list[dict[str, Any]]:
    """Make all edits in all ways; print a line for each, and return them."""
    experiment = Experiment(out / f"seed-{seed}", size, seed)
    experiment.make_base()
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, seed {seed}, {size}")
    print(
        f"{'':22}{'loss above joint training':>27}{'KL(joint || model)':>22}\n"
        f"{'way':10}{'edit':>12}{'world':>9}{'tales':>9}{'removed':>9}{'world':>11}{'tales':>11}"
        f"{'s':>7}"
    )
    lines = []
    for number, edit in enumerate(experiment.edits, 1):
        for way in ways:
            line = experiment.measure(way, number)
            lines.append(line)
            print(
                f"{way:10}{f'{number} {edit.kind} {edit.tale}':>12}{line['world']:9.3f}"
                f"{line['present']:9.3f}{line['removed']:9.3f}{line['world_kl']:11.4f}"
                f"{line['present_kl']:11.4f}{line['seconds']:7.1f}",
                flush=True,
            )
    (experiment.folder / "table.json").write_text(json.dumps(lines))
    return lines


if __name__ == "__main__":
    main()
