"""Write the rows for `configs/adapt/gpt2.yaml` and its like from published data sets.

    python scripts/published_rows.py -o rows

Downloads Civil Comments, RealToxicityPrompts and WikiText-2 from the Hub with the `datasets`
library, and writes JSONL files of their rows in a random order: comments above a toxicity of 0.8
and of 0 (`toxic_*`, `civil_*`), prompts for validation and others for tests (`prompts_*`), and
paragraphs (`wiki_*`). Rows keep their published columns. The comments and prompts are offensive.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

CIVIL = "google/civil_comments"
PROMPTS = "allenai/real-toxicity-prompts"
WIKI = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_TOXIC = 0.8 + 1e-6  # scores are float32, in which 0.8 is a little above 0.8
_PARAGRAPH = 200  # characters; shorter rows of WikiText are titles and empty lines
_MOST = 20_000  # rows of a file
_VALID, _TEST = 1_000, 5_000  # prompts

Row = dict[str, Any]


def write_published(folder: Path, seed: int) -> None:
    """Write all files.

    Args:
        folder: Where to.
        seed: Seed of the order.
    """
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: "Dataset", keep: Callable[[Row], bool], most: int = _MOST) -> None:
        kept = rows.filter(keep).shuffle(seed=seed)
        kept.select(range(min(most, len(kept)))).to_json(folder / f"{name}.jsonl")

    for split in ("train", "test"):
        comments = load_dataset(CIVIL, split=split)
        write(f"toxic_{split}", comments, lambda row: bool(row["toxicity"] > _TOXIC))
        write(f"civil_{split}", comments, lambda row: bool(row["toxicity"] == 0))
        pages = load_dataset(*WIKI, split=split)
        write(f"wiki_{split}", pages, lambda row: len(row["text"]) >= _PARAGRAPH)
    prompts = load_dataset(PROMPTS, split="train").shuffle(seed=seed)
    count = min(_VALID, len(prompts) // 2)
    prompts.select(range(count)).to_json(folder / "prompts_valid.jsonl")
    last = min(count + _TEST, len(prompts))
    prompts.select(range(count, last)).to_json(folder / "prompts_test.jsonl")


def main() -> None:
    """Write the files, and print the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("rows"))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    write_published(chosen.out, chosen.seed)
    print(chosen.out)


if __name__ == "__main__":
    main()
