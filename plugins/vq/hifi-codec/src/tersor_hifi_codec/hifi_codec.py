"""HiFi-Codec: Group-residual Vector Quantization for High Fidelity Audio Codec (Yang et al., https://arxiv.org/abs/2305.02765)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from tersor import ConfigError, at_least, between, field, method
from tersor_kit_vq import (
    Codebook,
    VectorLayer,
    VectorQuantizer,
    invert,
    mean_square,
    nearest,
    residual_values,
    straight_through,
)  # fmt: skip


class GRVQLayer(VectorLayer):
    """Group-residual vector quantization, GRVQ: vectors are split into ``groups`` equal parts, and each is quantized
    ``depth`` times, every time what the codeword before has left over, by a codebook of its own. The parts are put together again.

    ``codes``: int64 ... x (depth groups), those of all groups at the first depth, then at the second, as in the authors' code; ``values``: the
    sums of codewords, with the gradient copied straight through to z; ``loss``: the mean over depths of ``commitment`` mean (r - sg[q])^2, r being
    what is left there, and with ``decay`` 0 also of mean (sg[r] - q)^2, which moves the codebooks in place of moving averages. The gradient of
    the loss comes to z from the first depth alone: a straight-through remainder has none.
    """

    def __init__(self, codes: int, dim: int, groups: int, depth: int, commitment: float, decay: float, seed: int) -> None:
        super().__init__("hifi-codec", dim, (codes,) * (groups * depth))
        self.groups, self.depth, self.commitment = groups, depth, commitment
        start = "kmeans" if decay > 0 else "random"
        self.codebooks = nn.ModuleList(Codebook(codes, dim // groups, decay, start, seed=seed + i) for i in range(groups * depth))

    def _group(self, g: int) -> list[Codebook]:
        """The codebooks of a group, by depth."""
        return [self.codebooks[r * self.groups + g] for r in range(self.depth)]  # type: ignore[misc]

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.empty(len(x), self.depth, self.groups, dtype=torch.int64, device=x.device)
        values, loss = torch.empty_like(x), x.new_zeros(())
        for g, (part, out) in enumerate(zip(x.chunk(self.groups, 1), values.chunk(self.groups, 1), strict=True)):
            left = part.detach().contiguous()
            for r, book in enumerate(self._group(g)):
                if self.training:
                    book.prepare(left)
                chosen = nearest(left, book.words.detach())
                q = book(chosen)
                loss = loss + self.commitment * mean_square(left if r else part, q.detach())
                if book.decay == 0:
                    loss = loss + mean_square(q, left)
                # in the order in which the values of codes are added up
                out.copy_(out + q.detach() if r else q.detach())
                codes[:, r, g] = chosen
                if self.training:
                    book.update(left, chosen)
                left = left - q.detach()
        return straight_through(x, values), codes.flatten(1), loss / (self.depth * self.groups)

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        for i, book in enumerate(self.codebooks):  # only the first depth has the offset to make up
            words = book.words * scale + (offset if i < self.groups else 0)
            book.set(words, book.counts if book.decay > 0 else None)

    def _values(self, codes: Tensor) -> Tensor:
        by_group = codes.view(-1, self.depth, self.groups).unbind(2)
        return torch.cat([residual_values(c, [b.words for b in self._group(g)]) for g, c in enumerate(by_group)], 1)

    def _codes(self, values: Tensor) -> Tensor:
        parts = values.chunk(self.groups, 1)
        return torch.stack([invert(p, [b.words for b in self._group(g)]) for g, p in enumerate(parts)], 2).flatten(1)


@method
class HiFiCodec(VectorQuantizer):
    """A vector becomes ``groups`` times ``depth`` codes: each part of it is quantized by its own codebooks, one after the other.

    Latent: float, ... x ``dim``; codes: int64 ... x (depth groups). The paper has 2 groups of depth 2, so 4 codebooks of 1024 codewords. Stored: depth
    groups log2 codes bits a vector. ``groups=1`` is residual, ``depth=1`` grouped quantization. Codebooks start from k-means of the first batch and are moving averages;
    with ``decay=0`` they are what the authors released: uniform in [-1/K, 1/K] at first, and moved by a codebook loss.
    Raises :class:`tersor.ConfigError` for a ``dim`` that groups do not divide, :class:`tersor.InputError` for vectors of another dimension,
    :class:`tersor.StateError` for a state of another shape.
    """

    name = "hifi-codec"
    bitwise = True
    codes: int = field(1024, between(1, 1 << 20), help="codewords of each codebook")
    dim: int = field(512, between(1, 1 << 14), help="dimensions of a vector")
    groups: int = field(2, between(1, 256), help="equal parts of a vector")
    depth: int = field(2, between(1, 64), help="codebooks of each part, one after the other")
    commitment: float = field(0.25, between(0, 1e6), help="weight of the commitment loss")
    decay: float = field(0.99, between(0, 1), help="of the codebooks' moving averages; 0: a codebook loss instead")
    steps: int = field(500, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of codebooks and of training")

    def __attrs_post_init__(self) -> None:
        if self.dim % self.groups:
            raise ConfigError(
                f"hifi-codec: dim={self.dim} is not a multiple of groups={self.groups}; allowed: groups of equal dimensions"
            )

    def _layer(self) -> GRVQLayer:
        return GRVQLayer(self.codes, self.dim, self.groups, self.depth, self.commitment, self.decay, self.seed)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """The paper's 4 codebooks, of as many codewords as come nearest to ``bits`` in all; none for an odd ``dim``."""
        return [cls(codes=max(2, round(2 ** (bits / 4))), dim=dim)] if dim % 2 == 0 else []

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(
            cls(codes=7, dim=4, steps=6),
            cls(codes=1, dim=2, depth=1, steps=2),
            cls(codes=9, dim=3, groups=3, depth=3, decay=0, steps=4),
        )
