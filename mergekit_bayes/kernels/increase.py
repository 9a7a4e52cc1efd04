"""How far a merge moves each model, as the compiled pass sums it.

With the merged mean m*, a model's mean m and likelihood precision H, and the base's mean m0: sums
of `H (m* - m)^2` and `H (m0 - m)^2`, and of `(m - m0) (m* - m)` and `m (m* - m)`. A quadratic's
increase follows from them (`merge/increase`).
"""

from mergekit_bayes.compiled import compiled
from mergekit_bayes.gaussian import select
from mergekit_bayes.kernels.base import Numbers
from mergekit_bayes.kernels.bits import widen


@compiled(fastmath={"reassoc"})
def add_moves(
    start,
    stop,
    means,
    precisions,
    extra,
    constants,
    mean,
    zero,
    has_base,
    pulled,
    distances,
    products,
):
    """Add the sums over one block; they are float32 within it, as in the pass's tally.

    `extra` is that of the base, whose H a merge contains with it. What shrinkage adds to a model's
    own H is left out: its data did not.
    """
    numbers = Numbers(*constants)
    base_gain, base_floor, inside = numbers.gains[0], numbers.floors[0], numbers.contained[0]
    for i in range(means.shape[0]):
        gain, floor, contained = numbers.gains[i], numbers.floors[i], numbers.contained[i]
        share, moved, reach = numbers.base_shares[i], zero, zero
        if share != zero:
            for j in range(start, stop):
                of_base = base_gain * (widen(precisions[0, j], zero) - inside) + extra
                of_base = select(of_base < base_floor, base_floor, of_base)
                h = gain * (widen(precisions[i, j], zero) - (contained + share * of_base))
                h = select(h < floor, floor, h)
                m = widen(means[i, j], zero)
                d, tau = widen(mean[j], zero) - m, m - widen(means[0, j], zero)
                moved += h * d * d
                reach += h * tau * tau
        elif has_base and i > 0:
            for j in range(start, stop):
                h = gain * (widen(precisions[i, j], zero) - contained)
                h = select(h < floor, floor, h)
                m = widen(means[i, j], zero)
                d, tau = widen(mean[j], zero) - m, m - widen(means[0, j], zero)
                moved += h * d * d
                reach += h * tau * tau
        else:
            for j in range(start, stop):
                h = gain * (widen(precisions[i, j], zero) - contained)
                h = select(h < floor, floor, h)
                d = widen(mean[j], zero) - widen(means[i, j], zero)
                moved += h * d * d
        distances[i, 0] += moved
        if has_base:
            distances[i, 1] += reach
        if pulled:
            to_base, to_zero = zero, zero
            for j in range(start, stop):
                m = widen(means[i, j], zero)
                d = widen(mean[j], zero) - m
                if has_base:
                    to_base += (m - widen(means[0, j], zero)) * d
                to_zero += m * d
            products[i, 0] += to_base
            products[i, 1] += to_zero
