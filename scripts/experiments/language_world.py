"""The world of the experiment on addition with language models: bases of one kind, three sizes.

It is the world of the sentiment tasks with texts in place of labelled rows: a base of the
experiment on removal (detox_world.py), which has read talk-page comments, sentences of restaurant
reviews and toxic comments, learns novels, sentences of an encyclopedia, or product reviews. Every
task has the same number of tokens for training, and joint training reads the same texts once.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import detox_world
import numpy as np
import transformers
from detox_world import CONTEXT, DATA
from sentiment_columns import SELF
from sentiment_world import BATCH, JOINT, JSON, ROWS, Size, Step, World
from without_data import make_base

from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from scripts.train_tiny_lm import read_texts

BASE = "base"
PIECES = "pieces.jsonl"  # the same rows, cut to what a model sees at once
STEP = BATCH * CONTEXT  # tokens of a training step
RATE = 5e-4  # of AdamW


@dataclass(frozen=True)
class LanguageSize(Size):
    """How large everything is.

    Attributes:
        parameters: Of a model, about.
        width: Of the models.
        bases: How their bases are trained, but for the width.
        moment_steps: Steps of no length that give the base Adam's second moments.
        valid_tokens: Of each task, for looks.
        test_tokens: Of each task.
        cut: Tokens of each held-out text at most.
    """

    tasks: tuple[str, ...] = ("novels", "wiki_sentences", "reviews")
    tokens: int = CONTEXT
    task_steps: int = 120
    examples: int = 500
    mixture_seeds: tuple[int, ...] = ()
    error_seeds: tuple[int, ...] = ()
    parameters: str = "2.1M"
    width: int = 192
    bases: detox_world.Size = field(default_factory=detox_world.Size)
    moment_steps: int = 50
    valid_tokens: int = 4000
    test_tokens: int = 10000
    cut: int = 2 * CONTEXT


_TINY = LanguageSize(
    seeds=(0,),
    task_steps=10,
    examples=16,
    bases=detox_world.SIZES["tiny"],
    moment_steps=4,
    valid_tokens=600,
    test_tokens=1200,
    resamples=200,
    ivon_seeds=(),
)
SIZES = {
    "default": (
        LanguageSize(parameters="0.3M", width=48),
        LanguageSize(parameters="2.1M", width=192),
        LanguageSize(parameters="8M", width=416, seeds=(0,), ivon_seeds=()),
    ),
    "tiny": (
        replaced(_TINY, parameters="0.02M", width=16),
        replaced(_TINY, parameters="0.06M", width=32),
    ),
}


@dataclass(frozen=True)
class LanguageWorld(World):
    """The work folder of one size, and all that can be made in it.

    Attributes:
        bases: A folder of `without_data.py`: what lies there is used as it is.
    """

    base_text: ClassVar[str] = BASE

    size: LanguageSize
    bases: Path

    @property
    def _bases(self) -> detox_world.World:
        size = replaced(self.size.bases, width=self.size.width)
        return detox_world.World(self.bases / self.size.parameters, size)

    @property
    def _recipe(self) -> JSON:
        """What decides a base, beside its seed."""
        bases = self.size.bases
        names = ("layers", "vocabulary", "steps", "kept_rows")
        return {"width": self.size.width, **{name: getattr(bases, name) for name in names}}

    @property
    def source(self) -> Step:
        """The tokenizer, and the text of the bases in an order of chance."""

        def make(folder: Path) -> None:
            make_base(self._bases, self.size.seeds[0])
            shutil.copytree(self._bases.tokenizer, folder / "tokenizer")
            rows = detox_world.read_rows(self._bases, "base")
            random.Random(0).shuffle(rows)
            _write(folder / ROWS, rows)

        recipe = {name: self._recipe[name] for name in ("vocabulary", "kept_rows")}
        return Step(self.work, "source", recipe, make)

    @cached_property
    def _tokenizer(self) -> Any:
        folder = self.source.done().folder / "tokenizer"
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def text(self, name: str) -> Step:
        """What a task, the base, or `joint` for all tasks is trained on: rows, and their pieces.

        As many rows from the front as hold the tokens of all training steps of a task.
        """
        size, source = self.size, self.source
        budget = size.task_steps * STEP
        settings: JSON = {"text": name, "tokens": budget, "piece": size.tokens}
        parts = tuple(self.text(task) for task in size.tasks) if name == JOINT else ()

        def make(folder: Path) -> None:
            if name == JOINT:
                rows = [text for part in parts for text in read(part.folder / ROWS)]
                random.Random(0).shuffle(rows)
            elif name == BASE:
                rows = self._first(read(source.folder / ROWS), budget)
            else:
                rows = self._first(_texts(name, "train"), budget)
            _write(folder / ROWS, rows)
            _write(folder / PIECES, [p for row in rows for p in self.pieces(row, size.tokens)])

        return Step(self.work, f"text-{name}", settings, make, (source, *parts))

    def pieces(self, text: str, tokens: int) -> Iterator[str]:
        """The text in pieces of at most so many tokens."""
        ends = [end for _, end in self._tokenizer(text, return_offsets_mapping=True).offset_mapping]
        cuts = [0, *ends[tokens - 1 :: tokens], len(text)]
        yield from (text[a:b] for a, b in pairwise(cuts) if text[a:b].strip())

    def _first(self, texts: list[str], tokens: int, cut: int | None = None) -> list[str]:
        """The first texts, each but its first tokens, that have so many tokens together."""
        found: list[str] = []
        for text in texts:
            if tokens <= 0:
                break
            found.append(text if cut is None else next(self.pieces(text, cut)))
            tokens -= len(self._tokenizer(found[-1]).input_ids)
        return found

    @property
    def held_out(self) -> Step:
        """The texts of looks and tests."""
        size = self.size
        most = {"valid": size.valid_tokens, "test": size.test_tokens}

        def make(folder: Path) -> None:
            for name in size.tasks:
                for part, tokens in most.items():
                    texts = self._first(_texts(name, part), tokens, size.cut)
                    _write(folder / f"{name}-{part}.jsonl", texts)

        settings = {"tasks": size.tasks, "cut": size.cut, **most}
        return Step(self.work, "held-out", settings, make, (self.source,))

    def rows(self, name: str, part: str) -> tuple[list[str], list[int]]:
        """Texts of a task for `valid` or `test`, which have no labels."""
        return read(self.held_out.done().folder / f"{name}-{part}.jsonl"), []

    def measure(self, loaded: Loaded, name: str, part: str) -> JSON:
        """What a look holds of a task: nats and tokens of each text."""
        texts, _ = self.rows(name, part)
        read = measure_perplexity(
            loaded.model,
            loaded.tokenizer,
            texts,
            start=loaded.start,
            window=loaded.context,
            batch_size=32,
            bootstrap=0,
        )
        nats, tokens = np.array(read.document_nats), np.array(read.document_tokens)
        return {f"nats {name}": nats, f"tokens {name}": tokens}

    def scores(self, look: Mapping[str, Any], name: str) -> dict[str, float]:
        """What a look says of a task: nats a token."""
        return {"nll": float(look[f"nats {name}"].sum() / look[f"tokens {name}"].sum())}

    def base(self, seed: int) -> Step:
        """A base of the experiment on removal, which lies among the bases or is trained there."""

        def make(folder: Path) -> None:
            shutil.copytree(make_base(self._bases, seed), folder / "model")

        return Step(self.work, f"base-{seed}", {"seed": seed, **self._recipe}, make, (self.source,))

    def training(self, text: str, steps: int, seed: int, optimizer: str) -> JSON:
        """The settings of a training: of blocks that texts are packed into."""
        rate = {"learning_rate": RATE} if optimizer == "adamw" else {}
        return super().training(text, steps, seed, optimizer) | {"pack": "joined"} | rate

    def precision(self, model: Step, text: str, estimator: str, seed: int) -> Step:
        """The precision of a model on the text that it was trained on, counted in its tokens.

        Args:
            model: The model.
            text: The text.
            estimator: One of `bmerge precision`, `adam` for the second moments of its training, or
                `self-generated` for root-GGN on as many texts that it writes.
            seed: Of the rows.
        """
        size, rows = self.size, self.text(text)
        settings: JSON = {"estimator": estimator, "text": text}
        if estimator == "adam":
            settings |= {"batch_observations": STEP, "observations": size.task_steps * STEP}
            model = self._moments(model, rows, seed) if text == BASE else model
        else:
            settings |= {"max_length": size.tokens, "seed": seed, "batch_size": 4}
            settings |= {"examples": size.examples}

        def make(folder: Path) -> None:
            config = {n: v for n, v in settings.items() if n != "text"}
            config |= {"model": str(model.model), "output": str(folder / "precision")}
            if estimator == "adam":
                checkpoints = sorted((model.folder / "model.checkpoints").glob("checkpoint-*"))
                config |= {"moments": str(checkpoints[-1])}
            elif estimator == SELF:
                config |= {"estimator": "ggn", "self_generated": size.examples}
            else:
                config |= {"data": str(rows.folder / PIECES)}
            run_precision(PrecisionConfig.model_validate(config), quiet=True)

        name = f"precision-{estimator}-{model.name}"
        return Step(self.work, name, settings, make, (model, rows))

    def _moments(self, base: Step, rows: Step, seed: int) -> Step:
        """The base after steps of no length, whose moments its own training did not keep."""
        steps = self.size.moment_steps
        settings = self.training(BASE, steps, seed, "adamw") | {"learning_rate": 0.0}

        def make(folder: Path) -> None:
            config = {"model": str(base.model), "output": str(folder / "model"), **settings}
            config |= {"data": str(rows.folder / ROWS)}
            run_finetune(FinetuneConfig.model_validate(config), quiet=True)

        return Step(self.work, f"moments-{seed}", settings, make, (base, rows))


def read(file: Path) -> list[str]:
    """The texts of a file of rows."""
    with file.open() as lines:
        return [json.loads(line)["text"] for line in lines]


def _texts(name: str, part: str) -> list[str]:
    return read_texts(f"{DATA}/lm/{name}/{part}.jsonl.gz")


def _write(file: Path, texts: list[str]) -> None:
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file.write_text("".join(rows))
