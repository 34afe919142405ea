"""The layer-wise quadratic model of weight quantization: |X W' - X Q'|^2 = tr((W - Q) H (W - Q)'), H = X'X.

Rounding the columns one after another and adding what was lost to the columns still to come is, for the best such feedback, the
recursion of optimal brain quantization that GPTQ (arXiv 2210.17323) runs on the Cholesky factor of the inverse of H, and the
equal one of QuIP (arXiv 2307.13304, theorem 6) on the factor of H itself: with H = A D A', A unit upper triangular,

    w_k  <-  w_k + sum over i < k of (w_i - q_i) A_ik,    then    q_k = round(w_k).

The second form is the one used here. It needs one Cholesky factorisation and no inverse, and what is fed back are the plain
rounding errors, so that columns can be brought up to date by large matrix products, in any blocking, with the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersor import CalibrationError

#: The largest damping, as a fraction of the mean diagonal, that is tried before a Hessian is refused.
MOST_DAMP = 1.0


def gram(calibration: Any, columns: int) -> Tensor:
    """X'X of a calibration, float32, columns x columns; it may share the calibration's memory: do not write into it.

    ``calibration``: a :class:`tersor.Calibration` with ``inputs`` (samples x columns; further leading axes are samples too) or
    ``gram``. Raises :class:`tersor.CalibrationError` where it is missing, of another width, empty, not finite or has a negative
    diagonal.
    """
    inputs = None if calibration is None else calibration.inputs
    total = None if calibration is None else calibration.gram
    if total is None and inputs is None:
        raise CalibrationError("no calibration data; allowed: tersor.Calibration(inputs=samples x in) or (gram=in x in)")
    if total is None:
        x = torch.as_tensor(inputs)
        if x.dim() < 1 or x.shape[-1] != columns or x.numel() == 0:
            raise CalibrationError(f"calibration inputs of shape {tuple(x.shape)}; allowed: samples x {columns}, at least one")
        x = x.reshape(-1, columns).float()
        total = x.T @ x
    else:
        total = torch.as_tensor(total)
        if tuple(total.shape) != (columns, columns):
            raise CalibrationError(f"calibration gram of shape {tuple(total.shape)}; allowed: {columns} x {columns}")
        total = total.float()
    if not bool(torch.isfinite(total.sum())) and not bool(torch.isfinite(total).all()):
        raise CalibrationError("the calibration's X'X has NaN or infinity in float32; allowed: finite inputs")
    if bool((total.diagonal() < 0).any()):
        raise CalibrationError("the calibration's X'X has a negative diagonal; allowed: a sum of outer products")
    return total


def unit_factor(hessian: Tensor, order: Tensor | None = None, damp: float = 0.01) -> Tensor:
    """The factor A of :func:`ldl` alone; arguments and errors are the same."""
    return ldl(hessian, order, damp)[0]


def ldl(hessian: Tensor, order: Tensor | None = None, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """The unit upper triangular A and the diagonal of D, ``A D A' = H[order][:, order] + damp * mean(diag H) * I``, float32.

    D_kk is what a unit error in column k costs when the columns after it are free to make up for it.

    ``hessian``: symmetric, n x n, not changed; where a column was never active (diagonal 0) the mean diagonal stands in.
    ``order``: int64 permutation, the order of rounding; None: as it is.
    Where the damped matrix is not positive definite the damping is raised tenfold, with a warning, up to ``MOST_DAMP``; a matrix
    that is not positive definite then raises :class:`tersor.CalibrationError`.
    """
    # A lower Cholesky factor of the matrix with rows and columns reversed is an upper one, of A's kind, when reversed back.
    n = hessian.shape[0]
    back = torch.arange(n - 1, -1, -1, device=hessian.device) if order is None else order.flip(0)
    reversed_ = hessian.index_select(0, back).index_select(1, back)
    diagonal = reversed_.diagonal()
    mean = diagonal.mean()
    if not float(mean) > 0:
        raise CalibrationError("all calibration inputs are zero; allowed: inputs that are like those in use")
    plain = torch.where(diagonal > 0, diagonal, mean)
    while True:
        torch.add(plain, mean * damp, out=diagonal)
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not int(failed):
            break
        if damp >= MOST_DAMP:
            raise CalibrationError(f"the Hessian is not positive definite even with {damp:g} of its mean diagonal added")
        higher = min(max(10 * damp, 1e-4), MOST_DAMP)
        warnings.warn(f"the Hessian is singular at damping {damp:g}: using {higher:g}", stacklevel=2)
        damp = higher
    pivots = lower.diagonal().clone()
    lower *= 1 / pivots
    lower.diagonal().fill_(1.0)
    return lower.flip(0, 1), pivots.square_().flip(0)


def feedback(
    columns: Tensor,
    factor: Tensor,
    span: int,
    enter: Callable[[int, Tensor], None],
    round_: Callable[[int, Tensor, Tensor], None],
    leaf: int = 32,
    step: int = 1,
) -> Tensor:
    """Round the columns of a matrix in order, each corrected for the errors of those before it.

    ``columns``: the matrix transposed, in x out, float32, in the order of rounding; it is consumed (see below).
    ``factor``: from :func:`unit_factor`. ``span``: columns in a group.
    ``enter(start, group)`` is called before the first column of each group, with the best values of the group's columns (span x
    out, not to be written) given everything rounded so far: the time to choose its grid.
    ``round_(k, w, error)`` rounds column k: ``w`` is its corrected value (a view of ``columns``, which may be overwritten, with
    the codes say), ``error`` holds the original weights, from which the rounded values are to be subtracted in place.
    ``leaf``: how many columns are taken one by one between matrix products; it changes speed, not the result.
    ``step``: columns that are rounded together (vector quantization); ``span`` and the number of columns are multiples of it,
    ``factor`` comes from :func:`tersor_kit_weight_quant.block_factor`, and ``w`` and ``error`` are step x out where it is above 1.
    Returns the errors, original minus rounded, in x out.
    """
    leaf = max(leaf // step, 1) * step
    error = columns.clone()
    current, lost = columns.unbind(0), error.unbind(0)

    def best(start: int, stop: int) -> Tensor:
        """What [start, stop) should be if nothing from ``start`` on were rounded: each column corrected for those corrections."""
        own = factor[start:stop, start:stop].T
        own = torch.linalg.solve_triangular(own, torch.eye(stop - start, device=own.device), upper=False, unitriangular=True)
        return torch.addmm(error[start:stop], own, columns[start:stop] - error[start:stop])

    def run(again: Callable[..., None], start: int, stop: int, entered: bool) -> None:
        """Round [start, stop), already corrected for all before ``start``: a half, its effect on the other half, the other.

        ``again``: this function. By its own name it would be a cycle, which keeps all tensors here until the collector comes.
        """
        width = stop - start
        if width <= span and not entered:
            entered = True
            enter(start, best(start, stop) if start else columns[start:stop])
        if entered and width <= leaf:
            if step > 1:
                for k in range(start, stop, step):
                    w = columns[k : k + step]
                    if k > start:
                        w.addmm_(factor[start:k, k : k + step].T, error[start:k])
                    round_(k, w, error[k : k + step])
                return
            for k in range(start, stop):
                w = current[k]
                if k > start:
                    torch.addmv(w, error[start:k].T, factor[start:k, k], out=w)
                round_(k, w, lost[k])
            return
        unit = leaf if entered else span
        middle = start + (width + unit - 1) // unit // 2 * unit
        again(again, start, middle, entered)
        columns[middle:stop].addmm_(factor[start:middle, middle:stop].T, error[start:middle])
        again(again, middle, stop, entered)

    if columns.shape[0]:
        run(run, 0, columns.shape[0], False)
    return error
