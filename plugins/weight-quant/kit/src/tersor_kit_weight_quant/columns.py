"""GPTQ's column loop on groupwise uniform grids, for every method whose last step it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor_kit_weight_quant.grid import Grid, exponent_of, fit_grid, fit_scale, group_count, normalise
from tersor_kit_weight_quant.hessian import feedback, unit_factor


def round_columns(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    sym: bool = False,
    act_order: bool = True,
    static_groups: bool = False,
    ratios: Sequence[float] = (),
    damp: float = 0.01,
    block_size: int = 32,
) -> tuple[Grid, Tensor]:
    """The grid and the codes (uint8, out x in) of a weight whose columns are rounded in order, with errors fed back.

    ``weight``: out x in, any float dtype. ``hessian``: in x in, X'X of the layer's inputs. The settings mean what they mean in
    GPTQ (arXiv 2210.17323): ``group_size`` -1 is a whole row; ``act_order`` takes columns of large diagonal first, groups being
    runs in that order (then the grid has an ``index``) unless they are ``static_groups``, whose grids are those of the original
    weights in their original layout; ``ratios`` are tried for each group's range (:func:`fit_scale`); ``damp`` is a fraction of
    the mean diagonal; ``block_size`` changes speed only. Columns that were never active become 0.
    Raises :class:`tersor.CalibrationError` where :func:`unit_factor` does.
    """
    rows, n = weight.shape
    size = max(n, 1) if group_size == -1 else group_size
    indexed = act_order and not static_groups and group_size != -1
    steps = 2**bits - 1

    order = torch.arange(n, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = unit_factor(hessian, order, damp)

    exponent = exponent_of(weight)
    columns = normalise(weight, exponent).T.contiguous().index_select(0, order)
    columns[(hessian.diagonal()[order] == 0).nonzero()] = 0.0

    place = torch.arange(n, device=weight.device) // size if indexed else order // size  # group of the k-th column rounded
    scale = torch.zeros(group_count(n, size), rows, dtype=torch.float16, device=weight.device)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=weight.device)
    if static_groups:
        ready = fit_grid(weight, bits, size, sym, ratios)
        scale.copy_(ready.scale.T)
        zero.copy_(zero if ready.zero is None else ready.zero.T)
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    low, high = -zero.float(), steps - zero.float()
    at = place.tolist()

    def enter(start: int, group: Tensor) -> None:
        if static_groups:
            return
        g = at[start]
        scale[g], z = fit_scale(group, bits, sym, 0, ratios)
        if z is not None:
            zero[g] = z
        step[g] = scale[g].float()
        inverse[g] = torch.where(step[g] > 0, 1 / step[g], 0.0)
        low[g] = -zero[g].float()
        high[g] = low[g] + steps

    def round_(k: int, w: Tensor, error: Tensor) -> None:
        g = at[k]
        torch.mul(w, inverse[g], out=w).round_()
        torch.clamp(w, low[g], high[g], out=w)
        error.addcmul_(w, step[g], value=-1)

    feedback(columns, factor, size, enter, round_, block_size)

    levels = torch.empty(n, rows, dtype=torch.uint8, device=weight.device)
    for some in torch.arange(n, device=weight.device).split(128):
        levels[order[some]] = columns[some].sub_(low[place[some]]).to(torch.uint8)
    index = torch.empty_like(order).scatter_(0, order, place) if indexed else None
    grid = Grid(scale.T.contiguous(), None if sym else zero.T.contiguous(), bits, size, index, exponent)
    return grid, levels.T.contiguous()
