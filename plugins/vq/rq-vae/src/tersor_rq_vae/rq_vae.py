"""Autoregressive Image Generation using Residual Quantization (Lee et al., https://arxiv.org/abs/2203.01941)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from tersor import ConfigError, at_least, between, field, method
from tersor_kit_vq import (
    Codebook,
    VectorLayer,
    VectorQuantizer,
    invert,
    kmeans,
    mean_square,
    nearest,
    residual_values,
    straight_through,
    together,
)  # fmt: skip


class RQLayer(VectorLayer):
    """Depth by depth the codeword nearest to the residual, all out of one codebook (section 3.1.2, equations 3 and 4).

    The codebook moves by averages of the residuals of all depths; codewords that fewer than one vector a batch comes to are restarted at random
    residuals, as the authors' code does. ``loss``: ``commitment`` times the mean over depths d of |z - sg[z^(d)]|^2, z^(d) being
    the sum of the first d codewords (equation 6).
    """

    def __init__(self, codes: int, dim: int, depth: int, commitment: float, decay: float, restart: bool, seed: int) -> None:
        super().__init__("rq-vae", dim, (codes,) * depth)
        self.depth, self.commitment, self.restart = depth, commitment, restart
        self.codebook = Codebook(codes, dim, decay, "kmeans", seed=seed)

    def _start(self, x: Tensor) -> None:
        """From the first batch: k-means over its vectors and what coarse codewords leave of them."""
        book = self.codebook
        if not bool(book.started) and (len(x) or together()):
            several = x
            if len(x):
                coarse, _ = kmeans(x, max(1, book.size // 2), 10, book.seed)
                several = torch.cat([x, x - coarse[nearest(x, coarse)]])
            book.prepare(several)

    @torch.no_grad()
    def _search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes N x depth, partial sums and residuals (what each codeword was chosen for), depth x N x dim."""
        words, total, codes, sums, residuals = self.codebook.words, torch.zeros_like(x), [], [], []
        for d in range(self.depth):
            left = x - total if d else x
            codes.append(nearest(left, words))
            # in the order in which the values of codes are added up
            total = total + words[codes[-1]] if d else words[codes[-1]]
            residuals.append(left)
            sums.append(total)
        return torch.stack(codes, 1), torch.stack(sums), torch.stack(residuals)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = x.detach()
        if self.training:
            self._start(z)
        codes, sums, residuals = self._search(z)
        loss = self.commitment * mean_square(x.expand_as(sums), sums)
        values = straight_through(x, sums[-1])
        if self.training:
            every = residuals.flatten(0, 1)
            self.codebook.update(every, codes.T.reshape(-1))
            if self.restart:
                self.codebook.restart(every)
        return values, codes, loss

    def _values(self, codes: Tensor) -> Tensor:
        return residual_values(codes, [self.codebook.words] * self.depth)

    def _codes(self, values: Tensor) -> Tensor:
        return invert(values, [self.codebook.words] * self.depth)


@method
class RQVAE(VectorQuantizer):
    """A vector becomes ``depth`` codes, each the nearest codeword to what those before leave over; one codebook serves all depths.

    Latent: float, ... x ``dim``; codes: int64 ... x ``depth``. With K codes and depth D there are K^D values from K codewords. Stored: D times log2 K bits a vector. The prior of the
    codes, the RQ-Transformer, is :class:`tersor_rq_vae.RQTransformer`.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "rq-vae"
    bitwise = True
    codes: int = field(256, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    depth: int = field(4, between(1, 64), help="codes of a vector")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    decay: float = field(0.99, between(0, 1), help="of the codebook's moving averages")
    restart: bool = field(True, help="restart codewords that hardly any vector comes to")
    steps: int = field(500, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of training")

    def __attrs_post_init__(self) -> None:
        if self.decay == 0:
            raise ConfigError("rq-vae: decay=0 would not move the codebook; allowed: above 0, below 1")

    def _layer(self) -> RQLayer:
        return RQLayer(self.codes, self.dim, self.depth, self.commitment, self.decay, self.restart, self.seed)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """Two codes of half the bits."""
        return [cls(codes=2 ** (bits // 2), dim=dim, depth=2)] if bits % 2 == 0 else []

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(
            cls(codes=7, dim=3, depth=3, steps=6), cls(codes=1, dim=2, depth=2, steps=2), cls(codes=16, dim=4, depth=2, steps=6)
        )
