"""Nearest codewords and k-means, without the whole matrix of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor import InputError

_BLOCK = 16  # codewords whose smallest distance is kept in the first pass
_STEP = 8  # rows among which the smallest is looked for at a time
_COLUMNS, _ROWS = 512, 2048  # vectors and codewords of a tile: 4 MB of float32, about a cache


def _vectors(x: Tensor, dim: int | None = None) -> Tensor:
    if x.ndim < 1 or not (x.is_floating_point()) or (dim is not None and x.shape[-1] != dim):
        wanted = "... x dim" if dim is None else f"... x {dim}"
        raise InputError(f"vectors are float, {wanted}; given: {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _smallest(x: Tensor) -> Tensor:
    """The row of a smallest element in each column, int64 M of float N x M. By blocks of rows, as torch's amin is many times as fast as what
    finds places, and its min as argmin where rows are few."""
    rows, columns = x.shape
    if rows <= _BLOCK or rows % _STEP:
        return x.min(0).indices
    blocks = x.view(rows // _STEP, _STEP, columns)
    block = _smallest(blocks.amin(1))
    return blocks.gather(0, block.expand(1, _STEP, columns))[0].min(0).indices.add_(block, alpha=_STEP)


@torch.no_grad()
def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codeword in squared Euclidean distance, int64 of the leading shape of ``x``.

    ``x``: float, ... x d, finite; ``codebook``: float, K x d, finite. Works in float32 with tiles of 512 x 2048 distances, so that memory
    beside the result does not grow with N x K. Of equally near codewords the first of its block of 16 wins. Distances are
    |c|^2 - 2 c.x about the mean codeword, so a common offset costs no precision.

    Raises :class:`tersor.InputError` for vectors of another dimension or an empty codebook.
    """
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise InputError(f"a codebook is K x d with K of 1 or more; given: shape {tuple(codebook.shape)}")
    k, d = codebook.shape
    flat = _vectors(x, d)
    shape, count = x.shape[:-1], flat.shape[0]
    if count == 0 or k == 1:
        return torch.zeros(shape, dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        centre = codebook.float().mean(0)
        words = codebook.float() - centre
        largest = float(words.abs().max())
        reach = max(largest, *(abs(float(v)) for v in torch.aminmax(flat)))
        # squares of what is larger would leave float32
        unit = 2.0**-64 if reach > 1e16 else 1.0
        words = words * unit if unit != 1 else words
        padded = -(-k // _BLOCK) * _BLOCK
        norms = torch.full((padded,), torch.inf, device=x.device)
        torch.sum(words * words, 1, out=norms[:k])
        if padded != k:
            words = torch.cat([words, words.new_zeros(padded - k, d)])
        columns, rows = (_COLUMNS, _ROWS) if not x.is_cuda else (1 << 12, 1 << 13)
        blocks, block_norms = words.view(-1, _BLOCK, d), norms.view(-1, _BLOCK)
        least = torch.empty(padded // _BLOCK, min(columns, count), device=x.device)
        tile = torch.empty(min(rows, padded), min(columns, count), device=x.device)
        out = torch.empty(count, dtype=torch.int64, device=x.device)
        for start in range(0, count, columns):
            part = flat[start : start + columns].float() - centre
            if unit != 1:
                part = part * unit
            n = part.shape[0]
            turned = part.T
            if n != least.shape[1]:
                least, tile = least[:, :n].contiguous(), tile[:, :n].contiguous()
            for row in range(0, padded, rows):
                stop = min(row + rows, padded)
                distances = tile[: stop - row]
                torch.addmm(norms[row:stop, None], words[row:stop], turned, alpha=-2, out=distances)
                torch.amin(distances.view(-1, _BLOCK, n), 1, out=least[row // _BLOCK : stop // _BLOCK])
            block = _smallest(least)
            if padded <= rows:  # the tile still has them all
                inner = tile.view(-1, _BLOCK, n).gather(0, block.expand(1, _BLOCK, n))[0].min(0).indices
            else:
                inner = torch.baddbmm(block_norms[block][:, :, None], blocks[block], part[:, :, None], alpha=-2)[:, :, 0].argmin(
                    1
                )
            torch.add(inner, block, alpha=_BLOCK, out=out[start : start + n])
        return out.clamp_(max=k - 1).view(shape)


@torch.no_grad()
def sums_by_code(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number of vectors and their sum for each code: float32 K and K x d. ``x``: N x d; ``codes``: int64 N."""
    counts = torch.bincount(codes, minlength=size).float()
    sums = torch.zeros(size, x.shape[1], device=x.device)
    return counts, sums.index_add_(0, codes, x.float())


@torch.no_grad()
def kmeans(x: Tensor, size: int, iterations: int = 10, seed: int = 0, most: int = 256) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: a codebook, float32 ``size`` x d, and the number of vectors of each codeword, float32 ``size``.

    ``x``: float, ... x d. Starts from distinct random vectors; a codeword without vectors takes half of the most populous one.
    At most ``most`` vectors for each codeword are used, drawn at random. Fewer vectors than codewords: each vector is a codeword,
    and the others are vectors moved by a thousandth of the standard deviation.
    Raises :class:`tersor.InputError` for no vectors at all, or some that are not finite.
    """
    flat = _vectors(x)
    if flat.shape[0] == 0:
        raise InputError(f"k-means needs at least one vector; given: shape {tuple(x.shape)}")
    if size < 1:
        raise InputError(f"k-means gives one codeword or more; given: {size}")
    flat = flat.float()
    if not bool(torch.isfinite(flat).all()):
        raise InputError("k-means takes vectors without NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(flat.shape[0], generator=generator).to(x.device)
    if flat.shape[0] > size * most:
        flat = flat[order[: size * most]]
        order = torch.randperm(flat.shape[0], generator=generator).to(x.device)
    count = flat.shape[0]
    codebook = flat[order[torch.arange(size, device=x.device) % count]].clone()
    spread = flat.std(0, correction=0) * 1e-3
    if size > count:
        noise = torch.randn(size - count, flat.shape[1], generator=generator).to(x.device)
        codebook[count:] += noise * spread
    if size >= count:
        return codebook, torch.bincount(nearest(flat, codebook), minlength=size).float()
    counts = torch.zeros(size, device=x.device)
    for _ in range(max(iterations, 1)):
        codes = nearest(flat, codebook)
        counts, sums = sums_by_code(flat, codes, size)
        used = counts > 0
        codebook = torch.where(used[:, None], sums / counts.clamp(min=1)[:, None], codebook)
        empty = torch.nonzero(~used)[:, 0]
        if len(empty):
            donors = counts.topk(min(len(empty), int(used.sum()))).indices
            empty = empty[: len(donors)]
            move = torch.randn(len(empty), flat.shape[1], generator=generator).to(x.device) * spread
            codebook[empty] = codebook[donors] + move
            codebook[donors] -= move
    return codebook, counts
