"""Toxicity scorers by source, each fitted on one data set: TF-IDF and logistic regression.

They are hooks for `--scorer detox_scorers:davidson` and the like. A fitted scorer is kept in the
folder that the variable DETOX_SCORERS names, so that each is fitted once in an experiment.
"""

import functools
import os
import pickle
from pathlib import Path
from typing import Any

from tweet_scorer import read, unfitted

from mergekit_bayes.checkpoint.replacing import replacing

SCORERS = ("davidson", "olid", "civil")
FOLDER, ROWS = "DETOX_SCORERS", "DETOX_SCORER_ROWS"


def davidson(texts: list[str]) -> list[float]:
    """Probability that a text is offensive, after the tweets of Davidson et al. (2017)."""
    return _score("davidson", texts)


def olid(texts: list[str]) -> list[float]:
    """Probability that a text is offensive, after the tweets of OLID (2019)."""
    return _score("olid", texts)


def civil(texts: list[str]) -> list[float]:
    """Probability that a text is a toxic comment of Civil Comments and no clean one of Wikipedia.

    Civil's own other half is borderline and not clean.
    """
    return _score("civil", texts)


def _score(name: str, texts: list[str]) -> list[float]:
    return [float(p) for p in fitted(name).predict_proba(texts)[:, 1]]


@functools.cache
def fitted(name: str) -> Any:
    """The scorer of this source, from the folder of DETOX_SCORERS or fitted anew."""
    folder = os.environ.get(FOLDER)
    file = Path(folder) / f"{name}.pickle" if folder else None
    if file is not None and file.exists():
        return pickle.loads(file.read_bytes())  # our own work folder
    texts, labels = _rows(name)
    limit = int(os.environ.get(ROWS) or len(texts))
    model = unfitted().fit(texts[:limit], labels[:limit])
    if file is not None:
        with replacing(file, force=True) as unfinished:
            unfinished.write_bytes(pickle.dumps(model))
    return model


def _rows(name: str) -> tuple[list[str], list[int]]:
    """Texts and labels, mixed."""
    if name != "civil":
        return read(name, "train")
    toxic = [t for t, label in zip(*read("civil", "train"), strict=True) if label]
    clean = [t for t, label in zip(*read("wikitalk", "train"), strict=True) if not label]
    pairs = [
        pair for two in zip(toxic, clean, strict=False) for pair in zip(two, (1, 0), strict=True)
    ]
    return [t for t, _ in pairs], [label for _, label in pairs]
