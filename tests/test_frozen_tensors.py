"""A tensor without a precision counts as unchanged only if it did not move."""

import numpy as np
import pytest

from mergekit_bayes.errors import PrecisionError
from tests import model_forms, tiny
from tests.model_forms import SHAPES, close, expect, load, merge, model

here = model_forms.here


def frozen(name, base, seed, learnt, *, dtype="F32", prefix=""):
    """A fine-tune of the arrays `base`: only the tensors `learnt` moved and have a precision."""
    moved = {n: x + tiny.arrays(seed, SHAPES)[n] * (n in learnt) for n, x in base.items()}
    kept = {prefix + n: p for n, p in tiny.precisions(seed, SHAPES).items() if n in learnt}
    mean, stored = model(
        name, seed, mean={prefix + n: x for n, x in moved.items()}, precision=kept, dtype=dtype
    )
    stored = {n: stored.get(prefix + n, np.zeros(())) for n in base}
    return {n: mean[prefix + n] for n in base}, stored


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("settings", [{}, {"shrink": "0.3"}, {"pool": "row"}], ids=str)
def test_a_tensor_without_a_precision_that_did_not_move_counts_as_unchanged(settings, prefix):
    base = model("base", 0, dtype="BF16")
    a = frozen("a", base[0], 1, ["h.0.attn.weight"], prefix=prefix)
    b = frozen("b", base[0], 2, ["h.0.attn.weight", "wte.weight"], dtype="F64")
    report = merge("a", "b", **settings, dtype="F32")

    def change(s, shape):
        s = np.broadcast_to(s, shape)
        if "pool" in settings:
            return (
                np.broadcast_to(s.mean(axis=tuple(range(1, s.ndim)), keepdims=True), shape)
                if s.ndim > 1
                else s
            )
        return s + float(settings.get("shrink", 0)) * s.mean()

    each = [(m, {n: change(s, SHAPES[n]) for n, s in p.items()}) for m, p in (base, a, b)]
    mean, precision = expect(each[0], each[1:], (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), precision)
    assert report.copied == dict.fromkeys(
        ("h.0.ln.bias", "h.0.scalar", "h.0.conv"), "no task changed it"
    )
    merged = ("h.0.attn.weight", "wte.weight")
    sums = [sum(np.sum(p[n]) for n in merged) for _, p in each]
    assert [m.ratio for m in report.models[1:]] == pytest.approx(
        [s / sums[0] for s in sums[1:]], rel=1e-4
    )


def test_a_tensor_that_moved_without_a_precision_is_refused():
    base = model("base", 0)
    mean = tiny.arrays(0, SHAPES)
    mean["h.0.conv"][0, 0, 0] += 1
    precision = {n: p for n, p in tiny.precisions(1, SHAPES).items() if n != "h.0.conv"}
    model("a", 1, mean=mean, precision=precision)
    with pytest.raises(
        PrecisionError, match=r"no precision for 'h\.0\.conv' of 'a\.safetensors'.*--only"
    ):
        merge("a")
    model("b", 2, mean=base[0], precision={n: 0 * p for n, p in precision.items()})
    with pytest.raises(PrecisionError, match="is zero everywhere"):
        merge("b")
