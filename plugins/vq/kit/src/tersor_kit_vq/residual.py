"""Residual quantization: each codebook quantizes what the ones before left over, and the sum of the codewords is the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor import InputError
from tersor_kit_vq.search import nearest

_ROWS = 1 << 22  # candidates whose distances are held at a time


@torch.no_grad()
def residual_codes(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Greedy codes, int64 N x depth, of vectors (float32 N x d): depth by depth the nearest codeword of what is left.

    ``codebooks``: float32 K x d each; the same one may come several times."""
    left, codes = x, []
    for words in codebooks:
        chosen = nearest(left, words)
        left = left - words[chosen]
        codes.append(chosen)
    return torch.stack(codes, 1)


def residual_values(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """The sums of the codewords, float32 N x d, in the order of depth; ``codes``: int64 N x depth."""
    value = codebooks[0][codes[:, 0]]
    for i in range(1, len(codebooks)):
        value = value + codebooks[i][codes[:, i]]
    return value


@torch.no_grad()
def invert(values: Tensor, codebooks: Sequence[Tensor], beam: int = 64) -> Tensor:
    """Codes, int64 N x depth, that stand exactly for ``values`` (float32 N x d, of :func:`residual_values`).

    Greedy codes of a sum may be those of another one nearby. So up to ``beam`` partial sums are kept at every depth (sixteen times
    as many where that is not enough), the nearest ones, and the last codeword must make up the value bit by bit. Raises
    :class:`tersor.InputError` where none does.
    """
    codes = residual_codes(values, codebooks)
    for width in (beam, 16 * beam):
        wrong = torch.nonzero((residual_values(codes, codebooks) != values).any(1))[:, 0]
        if not len(wrong):
            break
        for rows in wrong.split(max(1, _ROWS // (width * max(len(c) for c in codebooks)))):
            codes[rows] = _search(values[rows], codebooks, width)
    if bool((residual_values(codes, codebooks) != values).any()):
        raise InputError(f"some vectors are no sums of {len(codebooks)} codewords, or not of {width} candidates")
    return codes


def _search(values: Tensor, codebooks: Sequence[Tensor], beam: int) -> Tensor:
    """The candidates of a beam search that come nearest, n x depth."""
    n, d = values.shape
    sums, paths = values.new_zeros(n, 1, d), torch.zeros(n, 1, 0, dtype=torch.int64, device=values.device)
    for words in codebooks:
        left = values[:, None] - sums
        k = len(words)
        distances = words.square().sum(1) - 2 * left @ words.T + left.square().sum(2, keepdim=True)
        kept = distances.flatten(1).topk(min(beam, distances[0].numel()), largest=False).indices
        before, chosen = kept // k, kept % k
        sums = sums.gather(1, before[:, :, None].expand(-1, -1, d)) + words[chosen]
        paths = torch.cat([paths.gather(1, before[:, :, None].expand(-1, -1, paths.shape[2])), chosen[:, :, None]], 2)
    # equal sums differ in the last bits by their order: the exact one is what residual_values gives
    flat = residual_values(paths.flatten(0, 1), codebooks).view(n, -1, d)
    best = (flat - values[:, None]).abs().amax(2).argmin(1)
    return paths[torch.arange(n, device=values.device), best]
