"""Coordinate descent on the layer-wise quadratic model tr(E H E'), E = W - Q: one column of Q after another, the others held.

With all else fixed the best real value of column k is q_k + (E H)_k / h_kk, and the best level is the one nearest to it, so that no
step raises the error. It needs H alone: no factorisation, and no damping where H is singular.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor import CalibrationError


def damped(hessian: Tensor, damp: float) -> Tensor:
    """``hessian`` (symmetric, n x n, not changed) over its largest diagonal element, plus ``damp`` * its mean diagonal on the diagonal.

    The scale changes no minimiser; it keeps float32 in range.
    Raises :class:`tersor.CalibrationError` where the diagonal is zero.
    """
    largest = hessian.diagonal().amax()
    if not float(largest) > 0:
        raise CalibrationError("all calibration inputs are zero; allowed: inputs that are like those in use")
    scaled = hessian / largest
    diagonal = scaled.diagonal()
    diagonal += damp * diagonal.mean()
    return scaled


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e' of every row of the weight: ``error`` is in x out, ``hessian`` in x in; the result has one number an output."""
    return (hessian @ error).mul_(error).sum(0)


def descend(
    columns: Tensor, error: Tensor, hessian: Tensor, round_: Callable[[int, Tensor, Tensor], None], block: int = 32
) -> None:
    """One sweep of coordinate descent over the columns, in order; all rows at once.

    ``columns``: the weight transposed, in x out, float32, in the order of visiting. ``error``: that less the quantized values as they
    stand, in x out; brought up to date in place. ``hessian``: in x in, in the same order.
    ``round_(k, w, error)`` rounds column k, as in :func:`feedback`: ``w`` is the best real value given all other columns (it may be
    overwritten), ``error`` holds the original weights, from which the rounded values are to be subtracted in place.
    ``block``: columns between matrix products; it changes speed, not the result.
    """
    n = columns.shape[0]
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0).tolist()
    change = torch.empty(min(block, n), columns.shape[1], device=columns.device)
    for start in range(0, n, block):
        stop = min(start + block, n)
        gradient = hessian[start:stop] @ error  # E H of these columns, before any of them changes
        for k in range(start, stop):
            g, i = gradient[k - start], k - start
            if i:
                g = torch.addmv(g, change[:i].T, hessian[start:k, k])
            before = error[k].clone()
            w = torch.sub(columns[k], before).add_(g, alpha=inverse[k])
            error[k] = columns[k]
            round_(k, w, error[k])
            torch.sub(error[k], before, out=change[i])
