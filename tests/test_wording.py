"""What a posterior says of itself in words: counts, priors and anchors that read as they are."""

import pytest

from bmerge_cli.main import app
from mergekit_bayes.posterior import Anchor, Identity, MergeTrace, PosteriorInfo, Prior, Term
from mergekit_bayes.posterior.wording import (
    anchor_in_words,
    observations_in_words,
    prior_in_words,
)
from tests import three_models
from tests.pushing import RUN
from tests.three_models import merge

world = three_models.world
MEAN = Identity(blocks="0")


def info(observations=None, unit="token", **more):
    return PosteriorInfo(
        estimator="ggn", unit=unit, observations=observations, ess=observations, mean=MEAN, **more
    )


UNDONE = {"prior": Prior(kind="base"), "merge": MergeTrace(common_count=1.0)}
ON_BASE = UNDONE | {"terms": (Term(label="a", mean=MEAN, scale=0.001),)}
COUNTS = [
    (info(None), "an unknown number of tokens"),
    (info(None, unit=None), "an unknown number of observations"),
    (info(48_030.0), "48,030 tokens"),
    (info(1.0, unit="example"), "1 example"),
    (info(2.5), "2.5 tokens"),
    (info(15_653.5, **ON_BASE), "15,654 tokens in addition to those of its base"),
    (info(-15_653.5, **ON_BASE), "15,654 tokens fewer than the data of its base"),
    (info(0.3, **ON_BASE), "0.3 tokens in addition to those of its base"),
    (info(1e-10, **ON_BASE), "as many tokens as its base: equally many were added and removed"),
    (info(1e-10, **UNDONE), "the data of its base: what was added to them was removed again"),
    (info(100.0, merge=MergeTrace(common_count=1.0)), "100 tokens"),  # an average
]


@pytest.mark.parametrize(("record", "text"), COUNTS, ids=[text for _, text in COUNTS])
def test_a_count_reads_as_what_it_counts(record, text):
    assert observations_in_words(record) == text


@pytest.mark.parametrize("kind", ["none", "isotropic", "base", "unknown"])
def test_every_prior_reads_as_a_sentence(kind):
    text = prior_in_words(info(prior=Prior(kind=kind, precision=2.5)))
    assert "prior" in text
    assert "None" not in text
    assert ("2.5" in text) == (kind in ("isotropic", "base"))


@pytest.mark.parametrize("kind", ["none", "zero", "base"])
@pytest.mark.parametrize("precision", [None, 2.5])
def test_every_anchor_reads_as_a_sentence(kind, precision):
    anchor = Anchor(kind=kind, precision=precision)
    text = anchor_in_words(info(anchor=anchor, training={"optimizer": "ivon"}))
    assert text.startswith("the training pulled towards")
    assert "None" not in text
    assert ("2.5" in text) == (kind != "none" and precision is not None)


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.2])
def test_no_screen_shows_a_negative_count(world, scale):
    """A removal, an addition, and their undo."""
    frame = {"base": "base", "weights": "precision"}
    merge("a", **frame, scale=(scale,), out="edited.safetensors")
    merge("edited", "a", **frame, scale=(1.0, -scale), out="undone.safetensors")
    for name, text in (("edited", "of its base"), ("undone", "what was added to them was removed")):
        shown = RUN.invoke(app, ["inspect", f"{name}.safetensors"])
        assert shown.exit_code == 0
        assert f"of these weights, for {'the data' if name == 'undone' else ''}" in shown.stderr
        assert text in shown.stderr
        assert "for -" not in shown.stderr
        assert "for 0 " not in shown.stderr
