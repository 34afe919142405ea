"""The Sinkhorn algorithm between vectors and codewords, without the whole matrix of distances (section 3.3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from tersor_kit_vq import add_over_processes, nearest, together

_TILE = 1 << 20  # distances worked on at a time: 4 MB
_KEPT = 1 << 24  # distances that are kept from pass to pass: 64 MB; what is beyond is computed again
_LEAST = -80.0  # log of what counts as nothing: smaller floats are slow, and the scales leave every sum above 2^-60


def _over_processes(x: Tensor, largest: bool) -> Tensor:
    """The largest or smallest of the processes, in place."""
    if together():
        distributed.all_reduce(x, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.MIN)
    return x


class _Distances:
    """|x - w| - ``shift`` in rows of tiles; ``x`` N x d, ``words`` K x d. The first are kept, the others computed again in every pass."""

    def __init__(self, x: Tensor, words: Tensor, shift: float) -> None:
        # |x|^2 + |w|^2 - 2 x.w as one product
        ones = torch.ones_like
        squares, norms = (v.square().sum(1, keepdim=True) for v in (x, words))
        self.left, self.right = (
            torch.cat([x, squares, ones(squares)], 1),
            torch.cat([-2 * words, ones(norms), norms], 1).T.contiguous(),
        )
        self.shift, size = shift, len(words)
        self.rows = max(1, min(len(x), _TILE // size))
        self.kept = x.new_empty(min(len(x), _KEPT // size), size)
        self.tile, self.spare, self.known = x.new_empty(self.rows, size), x.new_empty(self.rows, size), False

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their distances (not to be changed), and room for as many numbers."""
        for start in range(0, len(self.left), self.rows):
            at = slice(start, min(start + self.rows, len(self.left)))
            n, keeps = at.stop - start, at.stop <= len(self.kept)
            tile = self.kept[at] if keeps else self.tile[:n]
            if not (keeps and self.known):
                torch.mm(self.left[at], self.right, out=tile).relu_().sqrt_().sub_(self.shift)
            yield at, tile, self.spare[:n]
        self.known = True


@torch.no_grad()
def transport(x: Tensor, words: Tensor, epsilon: float = 10.0, iterations: int = 5) -> Tensor:
    """Code of each vector in the transport plan between vectors and codewords, int64 N: the largest entry of its row.

    ``x``: float32 N x d; ``words``: float32 K x d, both finite. The cost is the Euclidean distance, centred and divided by its deviation over all
    pairs (the normalisation of section 3.3); the plan is exp(-``epsilon`` cost) with rows and columns scaled in turns, ``iterations`` times,
    to sums of 1/N for a vector and 1/K for a codeword. The scales are kept as logarithms, so that neither far outliers nor codewords that nothing is
    near to underflow. Each iteration goes once over the distances, in tiles of 4 MB (the first 64 MB are kept);
    one pass before takes their mean and deviation. Distances near 0 are right to about a thousandth of the largest.

    Under torch.distributed all vectors of all processes are one problem, with ``words`` the same everywhere. One vector alone gets the
    nearest codeword, as its plan prefers none.
    """
    size = len(words)
    # distances in units in which squares neither over- nor underflow, alike in all processes
    reach = torch.stack([v.abs().max() if len(v) else v.new_zeros(()) for v in (x, words)]).max()
    unit = 2.0 ** -min(max(math.frexp(float(_over_processes(reach, largest=True)))[1], -126), 126)
    own = words * unit
    centre = own.mean(0)
    own, z = own - centre, x * unit - centre
    moments = add_over_processes(torch.stack([z.new_tensor(len(z)), z.square().sum()]).double())
    count = round(float(moments[0]))
    if count <= 1 or size == 1:
        return nearest(x, words)
    distances = _Distances(z, own, math.sqrt(float(moments[1]) / count + float(own.square().sum(1).mean())))

    sums, closest = z.new_zeros(2, dtype=torch.float64), z.new_full((size,), torch.inf)
    for _, tile, _ in distances:
        flat = tile.view(-1)
        sums += torch.stack([flat.sum(), flat.dot(flat)])
        torch.minimum(closest, tile.amin(0), out=closest)
    first, second = add_over_processes(sums).tolist()
    _over_processes(closest, largest=False)
    pairs = count * size
    sharpness = epsilon / (math.sqrt(max(second - first * first / pairs, 0.0) / (pairs - 1)) + 1e-6)

    # columns: log scales g of the codewords, measured from the nearest vector of each
    g = closest * sharpness
    columns = z.new_zeros(size)
    for _, tile, room in distances:
        columns += torch.add(g, tile, alpha=-sharpness, out=room).clamp_(min=_LEAST).exp_().sum(0)
    g -= add_over_processes(columns).log_()
    # rows, with log scales f, and columns in one pass
    f = z.new_zeros(len(z), 1)
    for turn in range(iterations - 1):
        columns = z.new_zeros(size)
        for at, tile, room in distances:
            plan = torch.add(g, tile, alpha=-sharpness, out=room)
            if turn == 0:
                f[at] = -plan.amax(1, keepdim=True)
            row = plan.add_(f[at]).clamp_(min=_LEAST).exp_().sum(1)
            f[at, 0] -= row.log()
            columns += row.reciprocal() @ plan
        g -= add_over_processes(columns).log_()
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for at, tile, room in distances:
        torch.argmax(torch.add(g, tile, alpha=-sharpness, out=room), 1, out=codes[at])
    return codes
