"""Weighted k-means in one dimension, for all rows of a matrix at once.

On a line clusters are intervals of the sorted values, and with running sums of the weights and of weight times value the mean and the
gain of any interval are two subtractions. What a clustering into intervals explains is the sum of their gains (sum w x)^2 / sum w;
the squared error is what is left. The search has two steps:

1. Dynamic programming over the boundaries of a coarse grid: the best clustering whose clusters are unions of its cells. The cells
   are laid out as the best quantizer of many levels would be: as many to a stretch as its (weight x density)^(1/3) asks for
   (Panter and Dite's rule, from the gaps between the values). With no more values than cells the result is the optimum.
2. Lloyd's iterations from there on, exact and cheap: means from the running sums, boundaries by binary search.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Cells of the coarse grid for each cluster; and the most clusters for which dynamic programming is done.
CELLS, MOST = 6, 32
_ITERATIONS = 50  # of Lloyd's algorithm, at most, as in the authors' code
_CHUNK = 1 << 20  # gains worked on at a time


def kmeans(x: Tensor, weight: Tensor, clusters: int) -> Tensor:
    """The means of the clusters of every row, ascending, float32, rows x clusters.

    ``x``: float32, rows x n. ``weight``: not negative, rows x n; a row of zeros counts as one of ones. Where a cluster is empty its
    place is that of a value beside it.
    """
    cells = max(min(CELLS * clusters, x.shape[1]), clusters) if clusters <= MOST else clusters
    step = max(1, _CHUNK // (cells + 1) ** 2)
    return torch.cat([_some(x[i : i + step], weight[i : i + step], clusters, cells) for i in range(0, len(x), step)])


def _some(x: Tensor, weight: Tensor, clusters: int, cells: int) -> Tensor:
    x, order = x.contiguous().sort(1)
    weight = weight.gather(1, order).double()
    total = weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 1 / x.shape[1])
    mass, moment = _running(weight), _running(weight * x)
    grid = _grid(x, weight, cells)
    return _lloyd(x, mass, moment, _dynamic(mass, moment, grid, clusters) if clusters < cells else grid)


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... n values of each row."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _grid(x: Tensor, weight: Tensor, cells: int) -> Tensor:
    """Where the cells of each row begin, and where the last one ends; int64, rows x (cells + 1)."""
    rows, n = x.shape
    if cells >= n:
        return torch.arange(cells + 1, device=x.device).clamp_(max=n).expand(rows, -1).contiguous()
    share = (weight * torch.diff(x, dim=1, append=x[:, -1:]).square()).pow_(1 / 3).cumsum(1)
    ideal = share[:, -1:] * torch.arange(1, cells, device=x.device) / cells
    return torch.nn.functional.pad(torch.nn.functional.pad(torch.searchsorted(share, ideal) + 1, (1, 0)), (0, 1), value=n).clamp_(
        max=n
    )


def _dynamic(mass: Tensor, moment: Tensor, grid: Tensor, clusters: int) -> Tensor:
    """The boundaries, out of those of the grid, that explain most; int64, rows x (clusters + 1)."""
    mean = moment[:, -1:] / mass[:, -1:]
    mass = mass.gather(1, grid)
    moment = (moment.gather(1, grid) - mean * mass).float()
    mass = mass.float()
    inside = mass[:, :, None] - mass[:, None, :]  # rows x end x start
    gain = (moment[:, :, None] - moment[:, None, :]).square_().div_(inside.clamp_(min=1e-7))
    gain.masked_fill_(torch.ones(gain.shape[1:], dtype=torch.bool, device=gain.device).triu_(1), -torch.inf)
    best = [gain[:, :, 0]]  # of one cluster that ends at each boundary; then of two, and so on
    total = torch.empty_like(gain)
    for _ in range(clusters - 1):
        best.append(torch.add(gain, best[-1][:, None, :], out=total).amax(2))
    rows = torch.arange(len(grid), device=grid.device)
    ends = [torch.full_like(rows, grid.shape[1] - 1)]
    for earlier in reversed(best[:-1]):
        ends.append((gain[rows, ends[-1]] + earlier).argmax(1))
    return grid.gather(1, torch.stack([*ends, torch.zeros_like(rows)], 1).flip(1))


def _lloyd(x: Tensor, mass: Tensor, moment: Tensor, cuts: Tensor) -> Tensor:
    """The means of the intervals between ``cuts``, which are moved to the middle between means until they stay."""
    means = x.gather(1, cuts[:, :-1].clamp(max=x.shape[1] - 1))
    for _ in range(_ITERATIONS):
        inside = mass.gather(1, cuts).diff(dim=1)
        mean = (moment.gather(1, cuts).diff(dim=1) / inside.clamp(min=1e-300)).float()
        low, high = x.gather(1, cuts[:, :-1].clamp(max=x.shape[1] - 1)), x.gather(1, (cuts[:, 1:] - 1).clamp_(min=0))
        means = torch.where(inside > 0, mean.clamp_(low, high), means).sort(1).values
        moved = cuts.clone()
        moved[:, 1:-1] = torch.searchsorted(x, (means[:, 1:] + means[:, :-1]) / 2)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return means
