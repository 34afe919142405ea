"""Codes of bits: signs as integers, and the entropies that keep them in use, without a row for each of the 2^L codes.

Bits are given by their log odds a, so that p(bit = 1) = sigmoid(a) and a code's probability is the product of its bits'. That is what a
softmax over the scalar products with all sign vectors comes to (https://arxiv.org/abs/2406.07548, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor_kit_vq.codebook import together
from tersor_kit_vq.layers import VectorLayer, add_over_processes, move_bridges, unbridge

_WORD = 31  # bits of one integer
_ROWS = 1 << 10  # vectors whose probabilities are held at once


def bit_groups(bits: int, most: int) -> list[int]:
    """``bits`` in as few runs as there can be of at most ``most``, as equal as can be: 14 by at most 10 is 7 and 7."""
    count = max(1, -(-bits // most))
    return [bits * (i + 1) // count - bits * i // count for i in range(count)]


def bit_sizes(bits: int) -> int | tuple[int, ...]:
    """``sizes`` of a layer of that many bits: one integer up to 31 of them, else several."""
    return 1 << bits if bits <= _WORD else tuple(1 << g for g in bit_groups(bits, _WORD))


def bits_to_codes(bits: Tensor, groups: Sequence[int]) -> Tensor:
    """Integers, int64 N x n, of runs of ``groups`` bits; ``bits``: bool N x L, the first of a run counting most."""
    out = []
    for part in bits.split(list(groups), 1):
        weights = 1 << torch.arange(part.shape[1] - 1, -1, -1, device=bits.device)
        out.append((part * weights).sum(1))
    return torch.stack(out, 1)


def codes_to_bits(codes: Tensor, groups: Sequence[int]) -> Tensor:
    """The bits, bool N x L, that :func:`bits_to_codes` made ``codes`` (int64 N x n) of."""
    out = []
    for i, g in enumerate(groups):
        shifts = torch.arange(g - 1, -1, -1, device=codes.device)
        out.append((codes[:, i, None] >> shifts & 1).bool())
    return torch.cat(out, 1)


def token_entropy(odds: Tensor) -> Tensor:
    """Mean entropy of a vector's soft code over all 2^L codes, in nats: exactly the sum of the entropies of its bits.

    ``odds``: log odds, float N x L. Scalar, 0 of no vectors.
    """
    # H(sigmoid(a)) = log(1 + e^-|a|) + |a| sigmoid(-|a|); softplus(a) - a sigmoid(a) is the same, and smooth at 0
    total = (functional.softplus(odds) - odds * odds.sigmoid()).sum()
    return total / max(len(odds), 1)


def _outer(p: Tensor) -> Tensor:
    """Probabilities of all combinations of bits, N x 2^g, of those of ones, N x g; the first bit counts most."""
    out = p.new_ones(len(p), 1)
    for i in range(p.shape[1]):
        ones = p[:, i, None]
        out = torch.stack([out * (1 - ones), out * ones], 2).flatten(1)
    return out


class _MeanCode(torch.autograd.Function):
    """Sum over vectors of the probabilities of all 2^g codes, as 2^h x 2^(g - h): a product of the probabilities of the first h bits and
    of the others, so that nothing of N x 2^g is made. Chunks of vectors, made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(p)
        half = p.shape[1] // 2
        out = p.new_zeros(1 << half, 1 << (p.shape[1] - half))
        for part in p.split(_ROWS):
            out.addmm_(_outer(part[:, :half]).T, _outer(part[:, half:]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        half, out = p.shape[1] // 2, []
        for part in p.split(_ROWS):
            with torch.enable_grad():
                known = part.detach().requires_grad_()
                first, second = _outer(known[:, :half]), _outer(known[:, half:])
            with torch.no_grad():
                wanted = (second @ grad.T, first @ grad)
            out.append(torch.autograd.grad((first, second), known, wanted)[0])
        return torch.cat(out) if out else torch.zeros_like(p)


class _Shared(torch.autograd.Function):
    """The sum over processes. Its gradient is multiplied by their number, by which the averaging of gradients divides it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return add_over_processes(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.distributed.get_world_size()


def codebook_entropy(odds: Tensor, groups: Sequence[int], shared: bool = False) -> Tensor:
    """Entropy of the mean soft code of all vectors, in nats, from log odds (float N x L).

    With ``groups`` = [L] exactly that over all 2^L codes, with 2^(L/2) numbers a vector; L beyond some 20 takes much time. With several runs of
    bits (that sum to L) the sum of the entropies of the runs, which is an upper bound, equal where the runs are independent.
    ``shared``: the mean is over the vectors of all processes of torch.distributed, all of which have to call it.
    Scalar, 0 of no vectors.
    """
    p = odds.sigmoid()
    ones = p.sum(0)
    sums, first = [], 0
    for g in groups:
        if g == 1:
            sums.append(torch.stack([len(p) - ones[first], ones[first]]))
        else:
            sums.append(_MeanCode.apply(p[:, first : first + g]).flatten())
        first += g
    both = torch.cat([*sums, p.new_full((1,), float(len(p)))])
    if shared and together():
        both = _Shared.apply(both)
    mean = both[:-1] / both[-1].clamp(min=1).detach()
    return torch.special.entr(mean.clamp(min=1e-30)).sum()


class BitLayer(VectorLayer):
    """A layer whose codes are the signs of a vector of L dimensions: ``project_in`` of dim to L, ``project_out`` of signs times ``radius`` to dim.

    Codes: the bits (1 where positive) as an integer, the first dimension counting most; several integers beyond 31 bits. ``groups``: runs of
    at most ``group`` bits, whose joint codes a codebook entropy sees. Values give back their codes where dim is at least L; with
    fewer dimensions the map out cannot be undone (``invertible``). A method gives :meth:`_quantize`.
    """

    def __init__(self, name: str, bits: int, dim: int, group: int, radius: float = 1.0) -> None:
        super().__init__(name, dim, bit_sizes(bits))
        self.length, self.radius = bits, radius
        self.groups, self.words = bit_groups(bits, group), bit_groups(bits, _WORD)
        self.project_in, self.project_out = nn.Linear(dim, bits), nn.Linear(bits, dim)
        self.invertible = dim >= bits

    def move(self, scale: Tensor, offset: Tensor) -> None:
        """As :meth:`VectorLayer.move`, by the two linear maps."""
        move_bridges(self.project_in, self.project_out, scale, offset)

    def corners(self, bits: Tensor) -> Tensor:
        """Signs of bits (bool N x L) times ``radius``, float32."""
        return (bits.float() * 2 - 1) * self.radius

    def integers(self, bits: Tensor) -> Tensor:
        """Codes, int64 N (N x n beyond 31 bits), of bits (bool N x L)."""
        codes = bits_to_codes(bits, self.words)
        return codes[:, 0] if isinstance(self.sizes, int) else codes

    def code_bits(self, codes: Tensor) -> Tensor:
        """The bits, bool N x L, of codes (int64 N, or N x n beyond 31 bits)."""
        return codes_to_bits(codes[:, None] if codes.ndim == 1 else codes, self.words)

    def _values(self, codes: Tensor) -> Tensor:
        return self.project_out(self.corners(self.code_bits(codes)))  # type: ignore[no-any-return]

    def _codes(self, values: Tensor) -> Tensor:
        return self.integers(unbridge(self.project_out, values) > 0)
