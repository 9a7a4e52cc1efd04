"""Every form of a stored precision, through its one door."""

from types import SimpleNamespace

import numpy as np
import pytest

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.posterior.forms import (
    DirectionsSpec,
    Form,
    StoredPrecision,
    by_row,
    is_form_of,
    merged_form,
    spread,
    tensor_mean,
    without_bad,
)
from tests import tiny

SHAPES = {
    Form.ENTRY: {(3, 2, 2): (3, 2, 2), (4,): (4,), (1, 5): (1, 5)},
    Form.ROW: {(3, 2, 2): (3, 1, 1), (4, 5): (4, 1)},
    Form.TENSOR: {(3, 2, 2): (1, 1, 1), (4,): (1,), (): (), (1, 5): (1, 1)},
}


@pytest.fixture
def precision(tmp_path):
    """Opens a file that holds one precision."""
    opened = []

    def make(values, dtype="F32"):
        path = tmp_path / f"{len(opened)}.safetensors"
        opened.append(SafetensorsSource([tiny.write(path, {"w": values}, dtype)]))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


NUMBERS = [form for form in Form if form <= Form.ENTRY]


@pytest.mark.parametrize("form", NUMBERS)
def test_a_form_is_known_by_its_shape(precision, form):
    for mean, shape in SHAPES[form].items():
        assert form.shape_of(mean) == shape
        source = precision(np.ones(shape, np.float32))
        assert StoredPrecision.of(source, "w", mean).form is form
        assert is_form_of(source.specs["w"], TensorSpec("BF16", mean))


def of_directions(shape):
    """A source of one precision of directions."""
    return SimpleNamespace(specs={"w": DirectionsSpec("F32", shape)}, where=lambda name: "file")


@pytest.mark.parametrize(
    ("mean", "shape", "axis"),
    [
        ((3, 4), (1, 4, 4), -1),
        ((3, 4), (2, 2, 2), -1),
        ((4, 4), (1, 4, 4), -1),
        ((3, 4), (1, 3, 3, 1), -2),
        ((4, 4), (4, 1, 1, 1), -2),
        ((5, 3, 4), (5, 1, 4, 4), -1),
        ((5, 3, 4), (5, 3, 1, 1, 1), -2),
    ],
)
def test_matrices_are_known_by_their_axes(mean, shape, axis):
    stored = StoredPrecision.of(of_directions(shape), "w", mean)
    assert (stored.form, stored.axis) == (Form.MATRIX, axis)


@pytest.mark.parametrize(
    ("mean", "shape"),
    [((3, 4), (2, 25, 1, 1)), ((1, 1), (3, 2, 1, 1)), ((5, 3, 4), (5, 1, 25, 1, 1))],
)
def test_sums_of_products_are_known_by_their_numbers(mean, shape):
    stored = StoredPrecision.of(of_directions(shape), "w", mean)
    assert stored.form is Form.KRONECKER


@pytest.mark.parametrize(
    ("mean", "shape"),
    [
        ((3, 4), (1, 3, 3)),
        ((3, 4), (2, 4, 4)),
        ((3, 4), (1, 4, 3)),
        ((3, 4), (1, 4, 4, 2)),
        ((4,), (1, 4, 4)),
        ((5, 3, 4), (2, 1, 4, 4)),
        ((3, 4), (1, 1, 4, 4, 1)),
    ],
)
def test_matrices_that_fit_no_axis_are_refused(mean, shape):
    with pytest.raises(PrecisionError, match="precision of 'w'"):
        StoredPrecision.of(of_directions(shape), "w", mean)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 3, 1), (2, 25, 1, 1), (3, 4, 1, 1, 1)])
def test_one_tensor_in_a_file_is_no_precision_of_directions(precision, shape):
    assert is_form_of(DirectionsSpec("F32", shape), TensorSpec("F32", (3, 4)))
    with pytest.raises(PrecisionError, match="precision of 'w'"):
        StoredPrecision.of(precision(np.ones(shape, np.float32)), "w", (3, 4))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 2), "F32"), ((1, 2, 2), "F32"), ((3, 1, 1), "F16"), ((3, 2, 2), "F8_E4M3")],
)
def test_what_is_no_form_is_refused_and_named(precision, shape, dtype):
    source = precision(np.ones(shape, np.float32), dtype)
    # `bmerge inspect` must not count as covered what a merge refuses.
    assert not is_form_of(source.specs["w"], TensorSpec("BF16", (3, 2, 2)))
    with pytest.raises(PrecisionError, match=r"precision of 'w' in .*0\.safetensors is F"):
        StoredPrecision.of(source, "w", (3, 2, 2))


def test_coarse_numbers_are_read_and_those_by_entry_are_not(precision):
    rows = np.arange(3, dtype=np.float32).reshape(3, 1)
    stored = StoredPrecision.of(precision(rows), "w", (3, 2))
    np.testing.assert_array_equal(stored.coarse(2), [0, 1])
    one = StoredPrecision.of(precision(np.full((1, 1), 2, np.float32)), "w", (3, 2))
    np.testing.assert_array_equal(one.coarse(2), [2])
    np.testing.assert_array_equal(StoredPrecision.everywhere(0.5).coarse(3), [0.5])
    assert StoredPrecision.of(precision(np.ones((3, 2), np.float32)), "w", (3, 2)).coarse(3) is None


def test_pooling_only_makes_a_precision_coarser():
    pooled = {pool: [form.pooled(pool) for form in NUMBERS] for pool in (None, "row", "tensor")}
    assert pooled[None] == [Form.TENSOR, Form.ROW, Form.ENTRY]
    assert pooled["row"] == [Form.TENSOR, Form.ROW, Form.ROW]
    assert pooled["tensor"] == [Form.TENSOR] * 3


def test_a_merge_is_as_fine_as_the_finest_of_its_precisions():
    assert merged_form([Form.TENSOR, Form.ROW], by_row=False) is Form.ROW
    assert merged_form([Form.TENSOR, Form.TENSOR], by_row=True) is Form.ROW
    assert merged_form([Form.ENTRY, Form.TENSOR], by_row=True) is Form.ENTRY


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (1, 2), (3, 11), (4, 8)])
def test_numbers_a_row_are_spread_over_any_range_of_entries(start, stop):
    rows = np.float32([1, 2, 3])
    np.testing.assert_array_equal(spread(rows, 4, start, stop), np.repeat(rows, 4)[start:stop])
    assert spread(rows[:1], 4, start, stop).tolist() == [1]
    assert by_row(rows[:1], 3).tolist() == [1, 1, 1]
    assert by_row(rows, 2).tolist() == [1, 2]


def test_bad_numbers_are_replaced_and_counted_before_a_mean_is_taken():
    valid, bad = without_bad(np.float32([1, -1, np.nan, np.inf, -0.0]), 2.0)
    assert bad == 3
    np.testing.assert_array_equal(valid, np.float32([1, 2, 2, 2, 0]))
    assert tensor_mean(valid).tolist() == [np.float32(1.4)]
