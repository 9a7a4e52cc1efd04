"""The world of the experiment on removal: its sizes, its texts, its bases and their fine-tunes."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from scripts.train_tiny_lm import read_texts, train, train_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CONDITIONS = {
    "trained": "the removed text (toxic half of civil) is part of the base's training, and the "
    "base records what it stands for",
    "other": "the removed text (offensive tweets of olid) is other text of the same kind, and "
    "corrections start from a base that records nothing",
}
SCORERS = {"trained": ("olid", "davidson"), "other": ("civil", "davidson")}  # the first decides
OWN_SCORER = {"trained": "civil", "other": "olid"}  # of the removed text's source, for filters
TEXTS = {"related": "comments", "unrelated": "wiki sentences", "yelp": "yelp sentences"}
CONTEXT = 64
PRIOR = 1000.0  # 1/weight^2: about one over the square of the typical weight of these bases


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        layers: Of the bases.
        width: Of the bases.
        vocabulary: Tokens of the tokenizer.
        steps: Training steps of a base.
        seeds: Seeds of base and run of the main methods; the other methods use the first alone.
        looks: At most this many looks a method, from the front.
        step_share: Factor on the steps of fine-tunes and adaptations.
        precision_rows: Rows of the base's precision.
        prompts: Test prompts; half as many for validation.
        continuations: Of each prompt.
        rows: Documents of each text at most.
        kept_rows: Rows of each training text at most; None is all.
        pool: Rows of each text that memories of several sizes are chosen from.
        self_generated: Texts of a memory that the model writes itself.
        memory_sizes: Blocks of those memories.
        scorer_rows: Rows that a scorer is fitted on; None is all.
        resamples: Bootstrap resamples.
        other: Methods that are run in the condition `other`; None is all.
    """

    layers: int = 3
    width: int = 192
    vocabulary: int = 4096
    steps: int = 2500
    seeds: tuple[int, ...] = (0, 1, 2)
    looks: int = 5
    step_share: float = 1.0
    precision_rows: int = 4000
    prompts: int = 250
    continuations: int = 4
    rows: int = 500
    kept_rows: int | None = None
    pool: int = 1500
    self_generated: int = 600
    memory_sizes: tuple[int, ...] = (32, 128, 512)
    scorer_rows: int | None = None
    resamples: int = 1000
    other: tuple[str, ...] | None = None

    def has(self, method: str, condition: str) -> bool:
        """Whether a method is run in a condition at this size."""
        return condition != "other" or self.other is None or method in self.other

    def times(self, steps: int) -> int:
        """This number of steps at this size."""
        return max(1, round(self.step_share * steps))


SIZES = {
    "small": Size(),
    "tiny": Size(
        layers=2,
        width=64,
        vocabulary=512,
        steps=60,
        seeds=(0,),
        looks=2,
        step_share=0.04,
        precision_rows=32,
        prompts=16,
        continuations=2,
        rows=24,
        kept_rows=300,
        pool=60,
        self_generated=24,
        memory_sizes=(8,),
        scorer_rows=1500,
        resamples=100,
        other=("task_arithmetic", "adapt"),
    ),
}


@dataclass(frozen=True)
class World:
    """The work folder of an experiment, and where everything lies in it."""

    work: Path
    size: Size

    def rows(self, name: str) -> str:
        """A file of rows: `removed-trained`, `matched-trained`, `memory` and so on."""
        return str(self.work / "data" / f"{name}.jsonl")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all models."""
        return self.work / "tokenizer"

    def base(self, seed: int) -> Path:
        """A base as it was trained."""
        return self.work / f"base-{seed}"

    def oracle(self, seed: int) -> Path:
        """The same, trained without the toxic text."""
        return self.work / f"oracle-{seed}"

    def start(self, seed: int, *, proper: bool = False) -> Path:
        """The base with its precision: what all methods start from.

        Args:
            seed: Of the base.
            proper: Whether the precision contains a prior.
        """
        return self.work / (f"start-proper-{seed}" if proper else f"start-{seed}")

    def tuned(self, text: str, seed: int) -> Path:
        """The base fine-tuned on `removed-trained`, `matched-other` and so on."""
        return self.work / f"tuned-{text}-{seed}"

    def models(self, method: str, condition: str, seed: int) -> Path:
        """The models of a curve, while it is measured."""
        return self.work / "models" / f"{method}-{condition}-{seed}"

    def looks(self, method: str, condition: str, seed: int) -> Path:
        """What was measured of a curve: a file for each look."""
        return self.work / "looks" / condition / method / str(seed)


def write_texts(world: World) -> None:
    """Write all texts of the experiment into the work folder, once."""
    size, keep = world.size, world.size.kept_rows
    comments = _texts("lm/comments/train")[:keep]
    yelp = _texts("lm/yelp_sentences/train")[:keep]
    civil, olid = (_labelled(f"toxicity/{name}/train") for name in ("civil", "olid"))
    toxic = civil[1][:keep]
    memory = size.pool // 5  # of each text: 284 blocks in all
    texts = {
        "clean": comments + yelp,
        "base": comments + yelp + toxic * 3,
        "removed-trained": toxic,
        "matched-trained": civil[0][:keep],
        "removed-other": olid[1][:keep],
        "matched-other": olid[0][:keep],
        "memory": comments[:memory] + yelp[:memory],
        "pool": comments[: size.pool] + yelp[: size.pool],
        "novels": _texts("lm/novels/train")[: max(2, round(0.14 * memory))],  # long rows
        "test-related": _texts("lm/comments/test")[: size.rows],
        "test-unrelated": _texts("lm/wiki_sentences/test")[: size.rows],
        "test-yelp": _texts("sentiment/yelp/test")[: size.rows],
        "test-removed-trained": _labelled("toxicity/civil/test")[1][: size.rows // 2],
        "test-removed-other": _labelled("toxicity/olid/test")[1][: size.rows // 2],
        "prompts-valid": _valid_prompts(size.prompts // 2),
        "prompts-test": _texts("toxicity/prompts/test")[: size.prompts],
    }
    texts |= {f"relearn-{c}": texts[f"removed-{c}"][:100] for c in CONDITIONS}
    folder = world.work / "data"
    with replacing(folder, force=False) as unfinished:
        unfinished.mkdir()
        for name, rows in texts.items():
            lines = (json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in rows)
            (unfinished / f"{name}.jsonl").write_text("".join(lines))


def read_rows(world: World, name: str) -> list[str]:
    """The texts of one of these files."""
    return [json.loads(line)["text"] for line in Path(world.rows(name)).open()]


def _texts(name: str, where: str = "") -> list[str]:
    return read_texts(f"{DATA / name}.jsonl.gz{where}")


def _labelled(name: str) -> tuple[list[str], list[str]]:
    """Texts of label 0 and of label 1."""
    return _texts(name, "?label=0"), _texts(name, "?label=1")


def _valid_prompts(count: int) -> list[str]:
    """The first 4 to 10 words of comments, half of them toxic, as the test prompts are made."""
    civil, wikitalk = (_labelled(f"toxicity/{name}/valid") for name in ("civil", "wikitalk"))
    clean = [t for pair in zip(civil[0], wikitalk[0], strict=False) for t in pair]
    draw = random.Random(0)
    prompts = []
    for pair in zip(clean, civil[1], strict=False):
        for words in map(str.split, pair):
            length = draw.randint(4, 10)
            if len(words) > length:
                prompts.append(" ".join(words[:length]))
    return prompts[:count]


def train_bases(world: World, kind: str, seed: int) -> None:
    """Train a base, or an oracle: the same passes over the same texts without the toxic ones."""
    size = world.size
    clean, everything = read_rows(world, "clean"), read_rows(world, "base")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(world.tokenizer)

    def tokens(texts: Sequence[str]) -> int:
        return sum(len(i) + 1 for i in tokenizer(texts, add_special_tokens=False)["input_ids"])

    is_base = kind == "base"
    share = 1.0 if is_base else tokens(clean) / tokens(everything)
    with replacing(world.base(seed) if is_base else world.oracle(seed), force=False) as folder:
        train(
            everything if is_base else clean,
            folder,
            tokenizer=tokenizer,
            layers=size.layers,
            width=size.width,
            steps=round(size.steps * share),
            seed=seed,
        )


def write_tokenizer(world: World) -> None:
    """Train the tokenizer of all models, on the texts of the base."""
    tokenizer = train_tokenizer(read_rows(world, "base"), world.size.vocabulary, words=False)
    with replacing(world.tokenizer, force=False) as folder:
        tokenizer.save_pretrained(folder)


def write_start(world: World, seed: int, proper: bool) -> None:
    """Copy a base, and store its precision beside the weights, with a prior if it is `proper`."""
    with replacing(world.start(seed, proper=proper), force=False) as folder:
        shutil.copytree(world.base(seed), folder)
        run_precision(
            PrecisionConfig(
                model=str(folder),
                data=world.rows("base"),
                examples=world.size.precision_rows,
                batch_size=4,
                max_length=CONTEXT,
                prior=PRIOR if proper else 0.0,
                seed=seed,
            ),
            quiet=True,
        )


def finetune(world: World, text: str, seed: int) -> None:
    """Fine-tune a base on one of the texts, as what merges add or subtract."""
    run_finetune(
        FinetuneConfig(
            model=str(world.start(seed)),
            output=str(world.tuned(text, seed)),
            data=world.rows(text),
            optimizer="adamw",
            learning_rate=1e-4,
            max_steps=world.size.times(300),
            batch_size=16,
            max_length=CONTEXT,
            pack="joined",
            seed=seed,
        ),
        quiet=True,
    )
