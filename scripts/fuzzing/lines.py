"""The command lines of `scripts/fuzz.py`: each ends with exit code 0 on the unbroken world."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """A command line and the files that a case may break.

    Attributes:
        name: Its name in tables; the first word is the command.
        words: Arguments of `bmerge`, relative to the folder of a case.
        needs: Entries of the world that are copied for it.
        out: What it writes; None if it writes nothing.
        weight: How often it is drawn, beside the others.
        weights: Whether the same tensors must come out if only side files differ.
        kept: Entries beside `out` that may be there after a refusal, as the documents say.
        broken: The only entries of `needs` that are broken; all of them by default.
        hub: Whether a Hub's answers are broken instead.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    out: str | None = None
    weight: float = 2.0
    weights: bool = False
    kept: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    hub: bool = False


def _line(name: str, words: str, needs: str, out: str | None = None, **options: object) -> Line:
    given = (name.split()[0], *words.split())
    return Line(name, given, tuple(needs.split()), out, **options)  # type: ignore[arg-type]


_SAMPLED = "--continuations 2 --new-tokens 3 --bootstrap 20"
_REMOVAL = "--base base --weights precision --scale 1 --scale=-0.5"
_LABELS = "--scorer model:classifier#LABEL_1"
_FILES = "a.safetensors a.posterior b.safetensors b.posterior"


def _merge(name: str, words: str, needs: str, out: str = "out", **options: object) -> Line:
    options = {"weight": 3.0, "weights": True, "kept": (f"{out}.partial",)} | options
    return _line(f"merge {name}", f"{words} -o {out}", needs, out, **options)


def _convert(name: str, words: str, needs: str, out: str = "out", **options: object) -> Line:
    return _line(f"convert {name}", f"{words} -o {out}", needs, out, weights=True, **options)


LINES = (
    _merge("average", "a b", "a b"),
    _merge("precision", "a b --weights precision", "a b"),
    _merge("removal", f"a b {_REMOVAL}", "base a b"),
    _merge("ties", "a b --base base --method ties", "base a b"),
    _merge("files", "a.safetensors b.safetensors --weights precision", _FILES, "out.safetensors"),
    _merge("adapters", "adapter other-adapter", "adapter other-adapter"),
    _merge("adapted", "base+adapter b --base base", "base adapter b"),
    _merge("sharded", "sharded a --max-shard-size 8KB", "sharded a"),
    _merge("recipe", "recipe.yaml", "recipe.yaml a b"),
    _merge("verified", "recipe.yaml --verify", "recipe.yaml a b"),
    _merge("resumed", "a b --weights precision", "a b out.partial", broken=("out.partial",)),
    _merge("joined", "a b", "a b joined.partial", "joined", broken=("joined.partial",)),
    _line("merge plan", "a b --base base --weights precision --dry-run", "base a b"),
    _merge("from the Hub", "org/a org/b --weights precision", "", hub=True),
    _line("inspect", "a", "a", weight=3.0),
    _line("inspect on the Hub", "org/a", "", hub=True, weight=1.0),
    _line("inspect pair", "a sharded", "a sharded"),
    _line("inspect file", "a.safetensors --precision a/posterior", "a a.safetensors", weight=1.0),
    _line("inspect adapter", "adapter --json", "adapter", weight=1.0),
    _convert("folder", "pickled", "pickled", weight=4.0),
    _convert("shards", "pickled-shards", "pickled-shards", weight=4.0),
    _convert("file", "pickled/pytorch_model.bin", "pickled", "out.safetensors"),
    _line("push", "merged org/x --dry-run", "merged", weight=3.0),
    _line("push json", "a org/x --dry-run --json", "a"),
    _line("push adapter", "adapter org/x --dry-run", "adapter"),
    _line("push tuned", "tuned org/x --dry-run", "tuned"),
    _line("push posterior", "merged org/x --dry-run --posterior-only", "merged", weight=1.0),
    _line("push to the Hub", "a org/new", "a", hub=True),
    _line("precision", "a --data rows.jsonl --examples 4 -o out", "a rows.jsonl", "out"),
    _line(
        "precision beside", "b --data rows.csv --examples 4 --force", "b rows.csv", "b/posterior"
    ),
    _line("evaluate text", "a --perplexity rows.jsonl -o out", "a rows.jsonl", "out"),
    _line("evaluate parquet", "a --perplexity rows.parquet", "a rows.parquet", weight=1.0),
    _line("evaluate folder", "a --perplexity texts", "a texts", weight=1.0),
    _line("evaluate plain", "a --perplexity rows.txt --samples 2 --prior 1", "a rows.txt"),
    _line(
        "evaluate toxicity",
        f"a --toxicity rows.csv --scorer words:words.txt {_SAMPLED}",
        "a rows.csv words.txt",
    ),
    _line(
        "evaluate by a model",
        f"a --toxicity rows.jsonl {_LABELS} {_SAMPLED}",
        "a classifier rows.jsonl",
    ),
    _line("evaluate labels", "classifier --classify labelled.jsonl", "classifier labelled.jsonl"),
    _line(
        "finetune",
        "finetune.yaml",
        "finetune.yaml a rows.jsonl",
        "out",
        kept=("out.checkpoints",),
        weight=0.5,
    ),
    _line(
        "finetune labels",
        "labels.yaml",
        "labels.yaml classifier labelled.jsonl",
        "out",
        weight=0.5,
    ),
    _line(
        "finetune resumed",
        "finetune.yaml --resume",
        "finetune.yaml a rows.jsonl out.checkpoints",
        "out",
        kept=("out.checkpoints",),
        broken=("out.checkpoints",),
        weight=0.5,
    ),
    _line(
        "detox",
        "detox.yaml",
        "detox.yaml base rows.jsonl words.txt",
        "removed",
        kept=("removed",),
        weight=0.2,
    ),
    _line(
        "detox again",
        "detox.yaml",
        "detox.yaml base rows.jsonl words.txt removed",
        "removed",
        kept=("removed",),
        broken=("removed",),
        weight=1.0,
    ),
)


def files_of(line: Line, root: Path) -> list[str]:
    """The files and folders of a line that a case may break, relative to the world."""
    found = []
    for name in line.broken or line.needs:
        path = root / name
        found.append(name)
        if path.is_dir():
            found += [p.relative_to(root).as_posix() for p in sorted(path.rglob("*"))]
    return found


def side_file(name: str) -> bool:
    """Whether a merge or conversion copies a file and takes nothing from it."""
    parts = Path(name).parts
    known = ("README.md", "LICENSE", "chat_template.jinja", "special_tokens_map.json")
    return "1_Pooling" in parts or parts[-1] in (*known, "evaluation.json", "tokenizer_config.json")
