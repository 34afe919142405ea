"""GPTQ as MixLLM has it: whole groups in the order of their energy, each range searched for the least output error."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor_kit_weight_quant import Grid, feedback, fit_scale, group_count

#: Fractions of a group's range that are tried, as in the authors' code.
RATIOS = tuple(1 - 0.02 * i for i in range(11))


def group_order(diagonal: Tensor, size: int) -> Tensor:
    """The columns in the order of rounding: whole groups, those with the largest sum of the diagonal first, a short one last.

    ``diagonal``: of X'X. Groups stay runs of columns in the file, and no index is stored.
    """
    n = len(diagonal)
    whole = n // size * size
    first = diagonal[:whole].view(-1, size).sum(1).argsort(descending=True, stable=True)
    columns = torch.arange(n, device=diagonal.device)
    return torch.cat([columns[:whole].view(-1, size)[first].reshape(-1), columns[whole:]])


def gptq(
    columns: Tensor,
    factor: Tensor,
    hessian: Tensor,
    order: Tensor,
    bits: int,
    size: int,
    sym: bool,
    clip: bool,
    exponent: int,
) -> tuple[Grid, Tensor]:
    """Grid and codes (uint8, rows x in) of some rows of a weight; everything of them is in the order of the columns in the file.

    ``columns`` (in x rows, float32, normalised by ``exponent``; it is consumed), ``hessian`` (X'X) and ``factor`` (its
    :func:`tersor_kit_weight_quant.unit_factor`) are in the order of rounding, ``order``. ``size``: columns in a group.
    """
    n, rows = columns.shape
    steps = 2**bits - 1
    scale = torch.zeros(group_count(n, size), rows, dtype=torch.float16, device=columns.device)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=columns.device)
    step, inverse, low = scale.float(), scale.float(), -zero.float()

    def enter(start: int, group: Tensor) -> None:
        g, run = start // size, slice(start, start + len(group))
        scale[g], z = fit(group, hessian[run, run], bits, sym, clip)
        if z is not None:
            zero[g] = z
        step[g] = scale[g].float()
        inverse[g] = torch.where(step[g] > 0, 1 / step[g], 0.0)
        low[g] = -zero[g].float()

    def round_(k: int, w: Tensor, error: Tensor) -> None:
        g = k // size
        torch.mul(w, inverse[g], out=w).round_()
        torch.clamp(w, low[g], low[g] + steps, out=w)
        error.addcmul_(w, step[g], value=-1)

    feedback(columns, factor, size, enter, round_)
    codes = torch.empty(n, rows, dtype=torch.uint8, device=columns.device)
    codes[order] = columns.sub_(low[torch.arange(n, device=columns.device) // size]).to(torch.uint8)
    place = order[::size] // size  # the group, in the file, of the g-th one rounded
    back = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
    grid = Grid(scale[back].T.contiguous(), None if sym else zero[back].T.contiguous(), bits, size, exponent=exponent)
    return grid, codes.T.contiguous()


def fit(group: Tensor, hessian: Tensor, bits: int, sym: bool, clip: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a group (columns x rows). ``clip``: of the range whose rounding, a change d, costs the least d'Hd."""
    ends = torch.stack(group.aminmax(dim=0))
    best = fit_scale(ends, bits, sym, 0)
    if not clip:
        return best
    least = torch.full_like(ends[0], torch.inf)
    for ratio in RATIOS:
        scale, zero = fit_scale(ends * ratio, bits, sym, 0)
        step = scale.float()
        low = torch.full_like(step, -(2.0 ** (bits - 1))) if zero is None else -zero.float()
        level = (group * torch.where(step > 0, 1 / step, 0.0)).round_().clamp_(low, low + (2**bits - 1))
        change = level.mul_(step).sub_(group)
        cost = (hessian @ change).mul_(change).sum(0)
        better = cost < least
        least = torch.where(better, cost, least)
        kept = None if zero is None or best[1] is None else torch.where(better, zero, best[1])
        best = torch.where(better, scale, best[0]), kept
    return best
