"""Codes as the grids that an index prior goes over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor import CorruptPayloadError

_ROW = 64  # vectors of a sequence that the prior takes as one row, at most
_STEPS = 128  # steps of the prior that a grid of any sides may take
_LONG = 16  # times the other side: more is no grid to the prior, beyond those steps


def grid_shape(leading: Sequence[int]) -> tuple[int, int, int]:
    """Batch, height and width of the grid that a prior goes over, for vectors of this leading shape: the last two dimensions. A
    sequence is cut into equal rows of at most 64, and so are all places of a grid that is long and narrow: it would take a step for every
    place or few, and lines so short tell little."""
    if len(leading) >= 2:
        height, width = leading[-2:]
        if width + 3 * (height - 1) <= _STEPS or (height <= _LONG * width and width <= _LONG * height):
            return math.prod(leading[:-2]), height, width
    count = math.prod(leading)
    rows = max(1, -(-count // _ROW))
    return rows, 1, -(-count // rows)


def to_grid(codes: Tensor, leading: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """n indices a vector (int64 N x n, below ``sizes``) side by side in one grid of :func:`grid_shape`, n times as wide, each index with numbers of
    its own: the prior then sees which of them is to come, those before it, and the neighbours'. Where the rows of a
    sequence have room, the last vector is repeated."""
    shape = grid_shape(leading)
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    flat = codes + starts
    flat = torch.cat([flat, flat[-1:].expand(math.prod(shape) - len(flat), -1)])
    return flat.reshape(*shape[:2], shape[2] * len(sizes))


def from_grid(grid: Tensor, count: int, sizes: Sequence[int]) -> Tensor:
    """The indices, int64 ``count`` x n, of :func:`to_grid`. Raises :class:`tersor.CorruptPayloadError` where an index is another's."""
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    codes = grid.reshape(-1, len(sizes))[:count] - starts
    if codes.numel() and not bool(((codes >= 0) & (codes < torch.tensor(sizes))).all()):
        raise CorruptPayloadError(f"indices of sizes {tuple(sizes)} are in the wrong order")
    return codes
