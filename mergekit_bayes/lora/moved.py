"""Initialisations that take the first factors out of the base, so that its weights are others.

    PiSSA   W - s B0 A0 = W - [W]_r          [W]_r the best approximation of rank r
    OLoRA   W - s B0 A0 = W - s Q_r R_r      Q R = W, the first r columns of Q and rows of R

Meng et al., *PiSSA*, NeurIPS 2024; Buyukakyuz, *OLoRA*, 2024. PEFT stores the trained factors of
such an adapter and takes `s B0 A0` out of the base whenever it loads one. Both are functions of W
where the r-th singular value is larger than the next one (PiSSA), and where the first r columns are
independent (OLoRA). Here they are computed in float64 from the stored weights, as factors, so that
the moved base is one more change of rank r. The bits of these factors are those of LAPACK.
"""

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.dense import Product


def move_of(method: str, weight: Array, rank: int, scaling: float) -> Product:
    """The change by which an initialisation moves a weight, `-s B0 A0`.

    Args:
        method: `pissa` or `olora`.
        weight: W as it is stored, a matrix; it is computed with in float64.
        rank: r.
        scaling: s.

    Returns:
        The product in float64, laid out as W is.
    """
    weight = np.asarray(weight, np.float64)
    if method == "olora":
        q = np.linalg.qr(weight[:, :rank])[0]
        return Product(-scaling * q.T, q.T @ weight)
    if weight.shape[0] <= weight.shape[1]:
        leading = np.linalg.eigh(weight @ weight.T)[1][:, -rank:]
        return Product(-leading.T, leading.T @ weight)
    leading = np.linalg.eigh(weight.T @ weight)[1][:, -rank:]
    return Product(-(weight @ leading).T, np.ascontiguousarray(leading.T))
