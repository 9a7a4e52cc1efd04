"""A removal and an addition on bases of real text, with precisions that are made in any way."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detox_measure import opened, read_test
from detox_world import CONTEXT, DATA, World, finetune, write_start

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior, save_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from scripts.train_tiny_lm import read_texts

TUNED = "removed-trained"
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RISE = 0.2  # nats a token on held-out removed text, at which removals are compared
KEPT = {"related": "clean comments", "yelp": "yelp sentences"}  # texts, and what tables say
ADDED = {"wiki": "wiki_sentences", "shakespeare": "tinyshakespeare"}  # which no base has seen

Documents = dict[str, dict[str, list[float]]]
Precisions = Mapping[Path, Path]  # of models


class Kind(NamedTuple):
    """A way to make a precision.

    Attributes:
        label: In tables.
        settings: Of `bmerge precision`, whose `data` is the name of a text.
        estimator: Its estimator.
    """

    label: str
    settings: Mapping[str, Any]
    estimator: str = "ggn"

    def of_text(self, text: str) -> "Kind":
        """The same for a model that was fine-tuned on this text, which is held-out text's place."""
        is_own = str(self.settings.get("data", "")).startswith("held-out")
        return self._replace(settings={**self.settings, "data": text}) if is_own else self


def make_precision(world: World, model: Path, kind: Kind, rows: int, out: Path) -> Path:
    """A precision, unless it is there."""
    if not out.exists():
        settings = dict(kind.settings)
        if "data" in settings:
            settings["data"] = world.rows(settings["data"])
        run_precision(
            PrecisionConfig.model_validate(
                {"model": str(model), "output": str(out), "estimator": kind.estimator}
                | {"examples": rows, "max_length": CONTEXT}
                | settings
            ),
            quiet=True,
        )
    return out


def make_permuted(model: Path, precision: Path, out: Path) -> Path:
    """A precision whose entries change places within each tensor, unless it is there.

    Precisions of models of one shape change places alike: what an entry of one model is to that of
    another stays.
    """
    if not out.exists():
        draw = np.random.default_rng(0)
        with open_posterior(str(model), precision=str(precision)) as posterior:
            assert posterior.precision is not None
            assert posterior.info is not None
            tensors = {
                name: draw.permutation(values.ravel()).reshape(values.shape)
                for name in sorted(posterior.precision.specs)
                for values in [read_tensor(posterior.precision, name)]
            }
            save_posterior(model, tensors, posterior.info, out=out)
    return out


def tuned_on(world: World, text: str, seed: int) -> Path:
    """A base fine-tuned on a text, unless it is there."""
    if not world.tuned(text, seed).exists():
        if not world.start(seed).exists():
            write_start(world, seed, proper=False)
        finetune(world, text, seed)
    return world.tuned(text, seed)


def write_added(world: World) -> None:
    """Training and held-out rows of the texts that are added, unless they are there."""
    for name, source in ADDED.items():
        train, valid, test = (
            read_texts(f"{DATA}/lm/{source}/{part}.jsonl.gz") for part in ("train", "valid", "test")
        )
        rows = {
            name: train[: world.size.kept_rows],
            f"test-{name}": (valid + test)[: world.size.rows],
        }
        for to, texts in rows.items():
            if not Path(world.rows(to)).exists():
                lines = (json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
                Path(world.rows(to)).write_text("".join(lines))


def documents(world: World, folder: Path, names: Sequence[str]) -> Documents:
    """Nats and tokens of each held-out document by text."""
    loaded = opened(folder)
    found = {}
    for name in names:
        report = read_test(world, loaded, name)
        found[name] = {
            "nats": list(report.document_nats),
            "tokens": [float(n) for n in report.document_tokens],
        }
    return found


def losses(world: World, folder: Path) -> dict[str, float]:
    """Nats a token on clean comments, yelp sentences and the removed text, all held out."""
    read = documents(world, folder, (*KEPT, TUNED))
    return {name: sum(text["nats"]) / sum(text["tokens"]) for name, text in read.items()}


def subtract(
    world: World, seed: int, precisions: Precisions | None, pool: str | None = None
) -> dict[str, float] | None:
    """What a removal costs at a rise of `RISE` on the removed text, in nats a token.

    Args:
        world: The experiment.
        seed: Of the base.
        precisions: Of the fine-tune and the base; None is task arithmetic.
        pool: Of the merge.

    Returns:
        The rises on clean comments and yelp sentences, between two scales on straight lines; None
        where no scale reaches the rise.
    """
    base, tuned = str(world.base(seed)), str(world.tuned(TUNED, seed))
    settings = _weights(precisions, pool)
    if precisions is not None:
        settings |= {"shrink": "0.3", "observations": {base: "3x"}}
    curve = [losses(world, world.base(seed))]
    with tempfile.TemporaryDirectory(dir=world.work) as place:
        for scale in SCALES:
            out = Path(place) / str(scale)
            run_merge(
                MergeConfig.model_validate(
                    {"models": (tuned,), "base": base, "scale": (-scale,), "out": str(out)}
                    | {"posterior": False}
                    | settings
                )
            )
            curve.append(losses(world, out))
            if curve[-1][TUNED] - curve[0][TUNED] >= RISE:
                break
        else:
            return None
    rises = [look[TUNED] - curve[0][TUNED] for look in curve]
    return {
        name: float(
            np.interp(RISE, rises[-2:], [look[name] - curve[0][name] for look in curve[-2:]])
        )
        for name in KEPT
    }


def add(
    world: World,
    seed: int,
    precisions: Precisions | None,
    *,
    scale: float = 1.0,
    pool: str | None = None,
) -> Documents:
    """What the base reads once all of `ADDED` is added to it.

    Args:
        world: The experiment.
        seed: Of the base.
        precisions: Of the base and the fine-tunes; None is task arithmetic.
        scale: Of every fine-tune; 1 as nobody would have chosen one.
        pool: Of the merge.
    """
    models = tuple(str(world.tuned(text, seed)) for text in ADDED)
    with tempfile.TemporaryDirectory(dir=world.work) as place:
        out = Path(place) / "added"
        run_merge(
            MergeConfig.model_validate(
                {"models": models, "base": str(world.base(seed)), "out": str(out)}
                | {"scale": (scale,) * len(models), "posterior": False}
                | _weights(precisions, pool)
            )
        )
        return documents(world, out, (*ADDED, *KEPT))


def _weights(precisions: Precisions | None, pool: str | None) -> dict[str, Any]:
    """Settings of a merge by precisions, or by task arithmetic."""
    if precisions is None:
        return {"weights": "uniform"}
    given = {str(model): str(place) for model, place in precisions.items()}
    return {"weights": "precision", "precision": given, "pool": pool}
