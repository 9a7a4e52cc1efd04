"""The precision of the tuned model, tensor by tensor, as weights of a change."""

from collections.abc import Iterable

import numpy as np

from mergekit_bayes.checkpoint.codec import is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.extract.roots import BlockRoot, DiagonalRoot, LowRankRoot, Root
from mergekit_bayes.extract.settings import Weights
from mergekit_bayes.extract.weighting import Weighting, by_entry
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.forms import Form, StoredPrecision, by_row
from mergekit_bayes.posterior.info import INPUTS
from mergekit_bayes.posterior.stored import StoredPrecisions

NATS, OUTPUTS, WEIGHTS = "nats", "half the squared outputs", "half the squared change"
_AGAIN = "Make it again with `bmerge precision`, or pass --weights uniform."


class Precisions:
    """The precision of a model, on the scale of the loss summed over its observations.

    Attributes:
        unit: The unit of the losses of what has a precision; see `unit_of`.
        observations: Over how many observations it sums, if its record says so.
        observation_unit: What one of them is.
        lacking: The tensors that were asked for and have none, or nothing but zeros.
        is_left_out: Whether there is a precision that weighs only where that is asked for: one of
            the inputs alone, by which adapters of an encoder cost more than by equal weights.
    """

    def __init__(self, model: Posterior, weights: Weights | None) -> None:
        """Decide whether the model's precision weighs.

        Args:
            model: The tuned model.
            weights: As `ExtractConfig.weights`.

        Raises:
            PrecisionError: A precision is asked for and missing, or was taken at other weights.
        """
        self.lacking: list[str] = []
        self._model, self._source = model, None if weights == "uniform" else model.precision
        if weights == "precision" and self._source is None:
            raise PrecisionError(
                f"no precision for '{model.ref}'. Make one with `bmerge precision {model.ref} "
                "--data TEXTS`, or pass --weights uniform."
            )
        is_of_inputs = model.info is not None and model.info.estimator == INPUTS
        self.is_left_out = self._source is not None and is_of_inputs and weights is None
        if self.is_left_out:
            self._source = None
        info = model.info if self._source is not None else None
        self._gain = 1.0
        if info is not None and info.mean.blocks != model.identity:
            raise PrecisionError(
                f"the precision of '{model.ref}' was taken at other weights than these: its record "
                f"of them differs. {_AGAIN}"
            )
        if info is not None and info.ess:
            self._gain = (info.observations or info.ess) / info.ess
        self.observations = None if info is None else info.observations or info.ess
        self.observation_unit = None if info is None else info.unit
        self.unit = OUTPUTS if is_of_inputs else NATS
        if self._source is None:
            self.unit = WEIGHTS

    @property
    def weighs(self) -> bool:
        """Whether a precision weighs the entries."""
        return self._source is not None

    def unit_of(self, name: str) -> str:
        """The unit of the losses of one tensor.

        A precision of inputs has matrices for linear layers alone. Of all else it has the curvature
        of the loss, one number an entry.

        Args:
            name: The tuned model's name of a tensor.
        """
        stored = self._model.renamed_precisions.get(name, name)
        if self.unit != OUTPUTS or self._source is None or stored not in self._source.specs:
            return self.unit
        shape = self._model.mean.specs[name].shape
        form = StoredPrecision.of(self._source, stored, shape).form
        return NATS if form <= Form.ENTRY else self.unit

    def weighting(self, name: str) -> Weighting | None:
        """How the entries of a tensor weigh; None without a precision, which `lacking` then names.

        Args:
            name: The tuned model's name of a tensor. Of one that is no matrix the weighting is that
                of its rows, of all other axes in one.

        Raises:
            PrecisionError: The precision has the shape of no form of the tensor's, or numbers that
                are no precision.
        """
        if self._source is None:
            return None
        stored = self._model.renamed_precisions.get(name, name)
        found = None
        if stored in self._source.specs:
            shape = self._model.mean.specs[name].shape
            found = self._read(StoredPrecision.of(self._source, stored, shape), stored, shape)
        if found is None:
            self.lacking.append(name)
        return found

    def _read(
        self, precision: StoredPrecision, name: str, shape: tuple[int, ...]
    ) -> Weighting | None:
        source = self._source
        assert source is not None
        p, q = flat_shape(shape)
        factors = self._rank_one(name)
        if factors is not None:
            rows, columns = factors
            return _separable(rows * self._gain, columns) if rows.any() and columns.any() else None
        if precision.form <= Form.ROW:
            numbers = precision.coarse(p)
            assert numbers is not None
            self._check(name, [numbers])
            return (
                _separable(by_row(numbers, p) * self._gain, np.ones(q)) if numbers.any() else None
            )
        values = read_tensor(source, precision.name)
        if precision.form is Form.ENTRY:
            self._check(name, [values])
            values = values.reshape(p, q).astype(np.float32, copy=False)
            with np.errstate(over="ignore"):
                values *= np.float32(self._gain)
            self._check(name, [values])  # beyond float32 once they are counted
            return by_entry(values) if values.any() else None
        if len(shape) != 2:
            return None  # a matrix for each expert
        return self._directions(precision, values.reshape(-1), name, p, q)

    def _rank_one(self, name: str) -> tuple[Array, Array] | None:
        """Rows and columns of a precision of rank one."""
        source = self._source
        if not isinstance(source, StoredPrecisions) or name in source.matrices:
            return None
        parts = source.parts(name)
        if len(parts) < 2:
            return None
        rows, columns = (read_tensor(source.in_files, part).reshape(-1) for part in parts)
        self._check(name, [rows, columns])
        return rows.astype(np.float64), columns.astype(np.float64)

    def _directions(
        self, precision: StoredPrecision, numbers: Array, name: str, p: int, q: int
    ) -> Weighting | None:
        if not np.isfinite(numbers).all():
            raise self._bad(name, int(np.sum(~np.isfinite(numbers))))
        numbers = numbers.astype(np.float64)
        if not numbers.any():
            return None
        n = q if precision.axis == -1 else p
        if precision.form is Form.KRONECKER:
            return self._products(numbers, p, q)
        root: Root
        if precision.form is Form.LOW_RANK:
            diagonal, factor = numbers[:n], numbers[n:].reshape(-1, n)
            root = LowRankRoot(diagonal * self._gain, factor * np.sqrt(self._gain))
        else:
            width = numbers.size // n
            root = BlockRoot(numbers.reshape(-1, width, width) * self._gain)
        if precision.axis == -1:
            return Weighting(DiagonalRoot(np.ones(p)), root)
        return Weighting(root, DiagonalRoot(np.ones(q)))

    def _products(self, numbers: Array, p: int, q: int) -> Weighting:
        """The weighting of a sum of Kronecker products.

        Of one term it is closed; of several it is near `(sum_k t_k L_k) x (sum_k u_k R_k)`, with
        t_k and u_k the mean diagonals of the other factors.
        """
        count = numbers.size // (p * p + q * q)
        lefts = numbers[: count * p * p].reshape(count, p, p) * self._gain
        rights = numbers[count * p * p :].reshape(count, q, q)
        if count == 1:
            return Weighting(BlockRoot(lefts), BlockRoot(rights))
        t = np.trace(rights, axis1=1, axis2=2) / q
        u = np.trace(lefts, axis1=1, axis2=2) / p
        left = np.einsum("k,kij->ij", t, lefts)
        right = np.einsum("k,kij->ij", u, rights) / (t @ u)
        terms = tuple(zip(lefts, rights, strict=True))
        return Weighting(BlockRoot(left[None]), BlockRoot(right[None]), terms=terms)

    def _check(self, name: str, numbers: Iterable[Array]) -> None:
        bad = sum(int(np.count_nonzero(is_bad_precision(each))) for each in numbers)
        if bad:
            raise self._bad(name, bad)

    def _bad(self, name: str, count: int) -> PrecisionError:
        assert self._source is not None
        return PrecisionError(
            f"{self._source.where(name)}: the precision of '{name}' has {count:,} numbers that are "
            f"negative or not finite. {_AGAIN}"
        )


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a tensor as a matrix: its first axis, and all others in one."""
    rows = shape[0] if shape else 1
    columns = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    return rows, columns


def _separable(rows: Array, columns: Array) -> Weighting:
    return Weighting(DiagonalRoot(rows), DiagonalRoot(columns))
