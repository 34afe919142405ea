"""Flexible dual binarization (section 3.2): weights of a group as a1 b1 + a2 b2, b1 and b2 in {0, 1}.

Groups are runs of columns of a row; widths that a group does not divide are padded with columns of zeros, which no plane has.
Codes are 2 b1 + b2. ``alpha``: float32, 2 x out x groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor_kit_weight_quant import feedback, group_count, unit_factor

#: Steps that are tried for a group's initial levels -s, 0, s, 2 s, as fractions of the least s that reaches all its weights.
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def binarize(w: Tensor, a1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """b1 and b2 (bool) of weights: b1 = [w > (a1 + a2) / 2], b2 = [w - a1 b1 < a2 / 2] for a1 > 0 > a2; mirrored for a1 < 0 < a2."""
    sign = torch.where(a1 < 0, -1.0, 1.0)
    w, a1, a2 = w * sign, a1 * sign, a2 * sign
    b1 = w > (a1 + a2) / 2
    return b1, torch.where(b1, w - a1, w) < a2 / 2


def fit_alpha(w: Tensor) -> Tensor:
    """The scales of groups along axis 0 of ``w`` (columns x out): a1 = 2 s, a2 = -s, then least squares in turn with the planes.

    s is the one of least squared error, of either sign, so that 2 s lies on the side of the larger weights. Returns 2 x out.
    """
    low, high = w.aminmax(dim=0)
    best = torch.zeros(2, w.shape[1], device=w.device)
    least = torch.full((w.shape[1],), torch.inf, device=w.device)
    for sign in (1.0, -1.0):
        far, near = (high, -low) if sign > 0 else (-low, high)
        reach = torch.maximum(far / 2, near).clamp_(min=0.0)
        for ratio in RATIOS:
            s = reach * (ratio * sign)
            b1, b2 = binarize(w, 2 * s, -s)
            error = (w - 2 * s * b1 + s * b2).square_().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, torch.stack([2 * s, -s]), best)
    for _ in range(2):
        b1, b2 = (b.float() for b in binarize(w, best[0], best[1]))
        n1, n2, both = b1.sum(0), b2.sum(0), (b1 * b2).sum(0)
        y1, y2 = (w * b1).sum(0), (w * b2).sum(0)
        det = n1 * n2 - both * both
        solved = torch.stack([(n2 * y1 - both * y2) / det, (n1 * y2 - both * y1) / det])
        fits = (det > 0.5) & (solved[0] * solved[1] < 0)  # one scale of either sign, as the planes' thresholds want it
        best = torch.where(fits, solved, best)
    return best.half().float().clamp_(-65504.0, 65504.0)


def initialise(weight: Tensor, hessian: Tensor, size: int, damp: float) -> tuple[Tensor, Tensor]:
    """Codes (uint8, out x in) and scales of a weight (float32, out x in), its columns binarized in order with the errors fed back."""
    rows, n = weight.shape
    alpha = torch.zeros(2, rows, group_count(n, size), device=weight.device)
    columns = weight.T.contiguous()
    columns[(hessian.diagonal() == 0).nonzero()] = 0.0

    def enter(start: int, group: Tensor) -> None:
        alpha[:, :, start // size] = fit_alpha(group)

    def round_(k: int, w: Tensor, error: Tensor) -> None:
        a1, a2 = alpha[:, :, k // size]
        b1, b2 = binarize(w, a1, a2)
        error.sub_(a1 * b1).sub_(a2 * b2)
        torch.add(b2.float(), b1, alpha=2, out=w)

    feedback(columns, unit_factor(hessian, None, damp), size, enter, round_)
    return columns.T.to(torch.uint8).contiguous(), alpha


def planes(codes: Tensor, size: int) -> Tensor:
    """b1 and b2 as int8, 2 x out x groups x size, from codes (uint8, out x in)."""
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % size)).view(rows, -1, size).to(torch.int8)
    return torch.stack([padded >> 1, padded & 1])


def dense(b: Tensor, alpha: Tensor, columns: int) -> Tensor:
    """The weights a1 b1 + a2 b2, float32, out x columns; ``b`` from :func:`planes`."""
    w = b[0] * alpha[0, :, :, None]
    return w.addcmul_(b[1].float(), alpha[1, :, :, None]).flatten(1)[:, :columns]


def refit(weight: Tensor, codes: Tensor, alpha: Tensor, hessian: Tensor, size: int, damp: float) -> Tensor:
    """The scales with the least error of the layer's output, |X (W - Q)'|^2, for planes that stay: least squares in each row.

    The Hessian is damped as it was for the planes. A ridge of 1e-4 of a row's mean diagonal holds scales that nothing determines
    where they were.
    """
    rows, n = weight.shape
    width = alpha.shape[2] * size
    h = torch.nn.functional.pad(hessian, (0, width - n, 0, width - n))
    h.diagonal().add_(damp * hessian.diagonal().mean())
    b = planes(codes, size).float()
    lost = torch.nn.functional.pad(weight - dense(b, alpha, n), (0, width - n))
    target = (b * (lost @ h).view(rows, -1, size)).sum(3)  # 2 x out x groups
    groups = alpha.shape[2]
    normal = torch.empty(rows, 2, groups, 2, groups, device=weight.device)
    for g in range(groups):  # what the planes of group g and those of all groups have in common
        seen = (b[:, :, g] @ h[g * size : (g + 1) * size]).view(2, rows, groups, size)
        normal[:, :, g] = torch.einsum("irgs,jrgs->rijg", seen, b)
    normal = normal.view(rows, 2 * groups, 2 * groups)
    normal = (normal + normal.mT) / 2
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += (1e-4 * diagonal.mean(1, keepdim=True)).clamp_(min=1e-30)
    factor, failed = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(target.permute(1, 0, 2).reshape(rows, -1, 1), factor)[..., 0]
    good = (failed == 0)[:, None] & torch.isfinite(step).all(1, keepdim=True)
    step = torch.where(good, step, 0.0).view(rows, 2, groups).permute(1, 0, 2)
    return (alpha + step).clamp_(-65504.0, 65504.0)
