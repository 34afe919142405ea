"""Groupwise uniform grids: one scale (float16), and without symmetry one integer zero point, for a run of columns of a row.

A value is ``(code - zero) * scale * 2**exponent``. Weights are always rounded on the grid as it is stored, after the scale's
own rounding to float16, so that codes, values and codes again agree exactly. The exponent is 0 for weights of an ordinary size
(largest magnitude 2^-6 to 2^12); beyond that it brings the largest magnitude into float16's range, by an exact power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor import Uniform
from tersor_kit_weight_quant.packing import pack, unpack

#: Fractions of the min/max range that a clip search tries, the full range first.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
_FAR = 120  # the farthest exponent: its power of two and the inverse are ordinary float32 numbers
_CHUNK = 1 << 18  # elements worked on at a time: they stay in the cache


def group_count(columns: int, group_size: int) -> int:
    """Number of groups in a row of ``columns``; ``group_size`` -1 is the whole row, a last group may be shorter."""
    return -(-columns // (columns if group_size == -1 else group_size)) if columns else 0


@dataclass(frozen=True, eq=False)
class Grid:
    """The grids of a matrix of rows x columns.

    ``scale``: float16, rows x groups. ``zero``: uint8, rows x groups; None: symmetric, 2^(bits-1) everywhere.
    ``group_size``: columns in a group, above 0. ``index``: the group of every column (int64), or None where groups are
    consecutive. ``exponent``: of the power of two that multiplies every scale.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    index: Tensor | None = None
    exponent: int = 0

    def quantize(self, weight: Tensor) -> Tensor:
        """The nearest code of every weight, uint8. ``weight``: rows x columns, any float dtype."""
        scale = self.scale.float()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        zero = self._zero()
        low, high = -zero, (2**self.bits - 1) - zero
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in _chunks(weight):
            x = normalise(weight[rows], self.exponent)
            for groups, columns, shape in self._runs(x.shape[1]):
                level = x[:, columns].unflatten(1, shape) * self._wide(inverse[rows], groups)
                level.round_().clamp_(self._wide(low[rows], groups), self._wide(high[rows], groups))
                codes[rows, columns].unflatten(1, shape).copy_(level.add_(self._wide(zero[rows], groups)))
        return codes

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that ``codes`` (uint8, rows x columns) stand for, as ``dtype``."""
        scale = self.scale.float() * math.ldexp(1.0, self.exponent)
        zero = self._zero()
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in _chunks(codes):
            for groups, columns, shape in self._runs(codes.shape[1]):
                value = codes[rows, columns].unflatten(1, shape) - self._wide(zero[rows], groups)
                value.mul_(self._wide(scale[rows], groups))
                if self.exponent:
                    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
                    value.clamp_(-limit, limit)
                out[rows, columns].unflatten(1, shape).copy_(value)
        return out

    def uniform(self, codes: Tensor) -> Uniform:
        """The same levels as the form that exporters and kernels take; ``codes``: uint8, rows x columns."""
        scale = self.scale.float() * math.ldexp(1.0, self.exponent)
        return Uniform(codes, scale, None if self.zero is None else self.zero.float(), self.bits, self.group_size, self.index)

    def _zero(self) -> Tensor:
        if self.zero is not None:
            return self.zero.float()
        return torch.full((1, 1), 2.0 ** (self.bits - 1), device=self.scale.device).expand(self.scale.shape)

    def _runs(self, columns: int) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
        """Groups, the columns they cover, and how those fold into groups: the whole groups at once, then a shorter last one."""
        if self.index is not None:
            yield slice(None), slice(0, columns), (columns,)
            return
        whole = columns // self.group_size * self.group_size
        if whole:
            yield slice(0, whole // self.group_size), slice(0, whole), (-1, self.group_size)
        if whole < columns:
            yield slice(whole // self.group_size, None), slice(whole, columns), (1, columns - whole)

    def _wide(self, x: Tensor, groups: slice) -> Tensor:
        """What belongs to groups, in a shape that broadcasts over the columns folded by :meth:`_runs`."""
        return x[:, groups, None] if self.index is None else x.index_select(1, self.index)


def normalise(weight: Tensor, exponent: int) -> Tensor:
    """``weight`` * 2^-exponent in float32; no copy where it is float32 and the exponent 0."""
    return weight.float() * math.ldexp(1.0, -exponent) if exponent else weight.float()


def exponent_of(weight: Tensor) -> int:
    """The power of two that :class:`Grid` sets apart: 0 unless the largest magnitude is below 2^-6 or above 2^12."""
    low, high = weight.aminmax() if weight.numel() else (weight.new_zeros(()), weight.new_zeros(()))
    largest = max(-float(low), float(high))
    if largest == 0.0 or 2.0**-6 <= largest <= 2.0**12:
        return 0
    return max(-_FAR, min(_FAR, math.frexp(largest)[1] - 8))


def fit_scale(values: Tensor, bits: int, sym: bool, dim: int, ratios: Sequence[float] = ()) -> tuple[Tensor, Tensor | None]:
    """The grids of groups that lie along the axis ``dim`` of ``values`` (float32, normalised).

    Asymmetric: 2^bits levels from the least to the greatest value, 0 being one of them. Symmetric: step 2 max|w| / (2^bits - 1),
    levels -2^(bits-1) to 2^(bits-1) - 1. ``ratios``: the range is shrunk by the one of them that leaves the least squared error
    in that group. Returns the scale in float16 and the zero point in uint8 (None: symmetric), both without the axis ``dim``;
    a group of zeros has scale 0.
    """
    steps = 2**bits - 1
    low, high = values.amin(dim).clamp_(max=0.0), values.amax(dim).clamp_(min=0.0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    best = _grid_of(low, high, steps, sym)
    if not ratios:
        return best
    least = _squared_error(values, *best, steps, dim)
    for ratio in ratios:
        if ratio == 1.0:
            continue
        scale, zero = _grid_of(low * ratio, high * ratio, steps, sym)
        error = _squared_error(values, scale, zero, steps, dim)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), None if zero is None else torch.where(better, zero, best[1])  # type: ignore[arg-type]
    return best


def _grid_of(low: Tensor, high: Tensor, steps: int, sym: bool) -> tuple[Tensor, Tensor | None]:
    scale = (high / steps - low / steps).clamp_(max=65504.0).half()
    if sym:
        return scale, None
    step = scale.float()
    zero = torch.where(step > 0, -low / step, 0.0).round_().clamp_(0, steps)
    return scale, zero.to(torch.uint8)


def _squared_error(values: Tensor, scale: Tensor, zero: Tensor | None, steps: int, dim: int) -> Tensor:
    step = scale.float()
    low = torch.full_like(step, -((steps + 1) // 2)) if zero is None else -zero.float()
    inverse = torch.where(step > 0, 1 / step, 0.0).unsqueeze(dim)
    level = (values * inverse).round_().clamp_(low.unsqueeze(dim), (low + steps).unsqueeze(dim))
    return level.mul_(step.unsqueeze(dim)).sub_(values).square_().sum(dim)


def fit_grid(weight: Tensor, bits: int, group_size: int, sym: bool, ratios: Sequence[float] = ()) -> Grid:
    """The grid of every group of ``weight`` (rows x columns, any float dtype); see :func:`fit_scale`.

    ``group_size``: columns in a group, -1 for the whole row; where it does not divide the columns the last group is shorter.
    """
    rows, columns = weight.shape
    size = max(columns, 1) if group_size == -1 else group_size
    exponent = exponent_of(weight)
    scale = torch.zeros(rows, group_count(columns, size), dtype=torch.float16, device=weight.device)
    zero = None if sym else torch.zeros(scale.shape, dtype=torch.uint8, device=weight.device)
    grid = Grid(scale, zero, bits, size, exponent=exponent)
    for part in _chunks(weight):
        x = normalise(weight[part], exponent)
        for groups, run, shape in grid._runs(columns):
            s, z = fit_scale(x[:, run].unflatten(1, shape), bits, sym, 2, ratios)
            scale[part, groups] = s
            if zero is not None and z is not None:
                zero[part, groups] = z
    return grid


def store(grid: Grid, codes: Tensor) -> dict[str, Any]:
    """Codes and their grid as the parts of a file, everything bit-packed; the opposite of :func:`load`.

    ``codes`` and ``zero`` at ``bits`` bits, ``scale`` float16, and where groups are not consecutive ``index``: the group of every
    column in as few bits as the number of groups needs (above 256 groups in 16 or 32).
    """
    parts: dict[str, Any] = {"codes": pack(codes, grid.bits), "scale": grid.scale}
    if grid.zero is not None:
        parts["zero"] = pack(grid.zero, grid.bits)
    if grid.index is not None:
        bits = _index_bits(grid.scale.shape[1])
        if bits:
            parts["index"] = pack(grid.index.to(torch.uint8), bits) if bits <= 8 else grid.index.to(_WIDE[bits])
    if grid.exponent:
        parts["exponent"] = grid.exponent
    return parts


_WIDE = {16: torch.uint16, 32: torch.int32}


def _index_bits(groups: int) -> int:
    bits = max(groups - 1, 0).bit_length()
    return bits if bits <= 8 else 16 if bits <= 16 else 32


def load(
    parts: Mapping[str, Any], shape: tuple[int, int], bits: int, group_size: int, sym: bool, indexed: bool = False
) -> tuple[Grid, Tensor]:
    """The grid and the codes (uint8, rows x columns) that :func:`store` made parts of.

    ``shape``, ``bits``, ``group_size``, ``sym`` and ``indexed`` (whether groups are not consecutive) as configured.
    Raises KeyError, TypeError or ValueError where the parts do not fit them.
    """
    rows, columns = shape
    groups = group_count(columns, group_size)
    codes = unpack(parts["codes"], bits, rows * columns).view(rows, columns)
    scale, exponent = parts["scale"], parts.get("exponent", 0)
    if scale.dtype != torch.float16 or tuple(scale.shape) != (rows, groups):
        raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)}, where float16 {(rows, groups)} fits")
    if scale.numel() and not bool(torch.isfinite(scale).all() & (scale >= 0).all()):
        raise ValueError("scale: negative or not finite")
    if type(exponent) is not int or abs(exponent) > _FAR:
        raise ValueError(f"exponent: {exponent!r}, where an integer from -{_FAR} to {_FAR} fits")
    zero = None if sym else unpack(parts["zero"], bits, rows * groups).view(rows, groups)
    index = None
    if indexed:
        width = _index_bits(groups)
        if width == 0:
            index = torch.zeros(columns, dtype=torch.int64, device=codes.device)
        elif width <= 8:
            index = unpack(parts["index"], width, columns).long()
        else:
            index = parts["index"].long()
        if tuple(index.shape) != (columns,) or (columns and not 0 <= int(index.min()) <= int(index.max()) < groups):
            raise ValueError(f"index: not {columns} numbers below {groups}")
    size = max(columns, 1) if group_size == -1 else group_size
    return Grid(scale, zero, bits, size, index, exponent), codes


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of rows, about ``_CHUNK`` elements each."""
    step = max(1, _CHUNK // max(1, x.shape[1]))
    return (slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0] if x.shape[1] else 0, step))
