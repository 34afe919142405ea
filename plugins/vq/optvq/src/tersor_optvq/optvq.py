"""Preventing Local Pitfalls in Vector Quantization via Optimal Transport (Zhang et al., https://arxiv.org/abs/2412.15195)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import ConfigError, at_least, between, field, method
from tersor_kit_vq import VectorLayer, VectorQuantizer, mean_square, nearest, straight_through
from tersor_optvq.sinkhorn import transport


class OptVQLayer(VectorLayer):
    """In training the codes of a batch are those of the optimal transport between its vectors and all codewords (section 3.3), in
    which every codeword has the same mass: one that no vector is near gets vectors all the same, and learns from them. In evaluation
    each vector has its nearest codeword.

    ``embedding`` (K x d) is the codebook before ``projection``, a linear map with offset, as the authors' code has it. With ``heads`` above 1 a vector
    is that many parts of d = dim / heads dimensions, which are quantized with the one codebook (the multi-head quantizer).
    """

    def __init__(self, method: OptVQ) -> None:
        super().__init__("optvq", method.dim, method.codes if method.heads == 1 else [method.codes] * method.heads)
        self.method, part = method, method.dim // method.heads
        self.embedding = nn.Parameter(torch.randn(method.codes, part))
        self.projection = nn.Linear(part, part) if method.projection else nn.Identity()
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=part**-0.5)

    @property
    def codebook(self) -> Tensor:
        """All codewords as they are now, K x dim / heads."""
        return self.projection(self.embedding)  # type: ignore[no-any-return]

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words, parts = self.codebook.detach(), x.reshape(-1, self.embedding.shape[1])
        if self.training:
            codes = transport(parts.detach(), words, self.method.epsilon, self.method.iterations)
        else:
            codes = nearest(parts.detach(), words)
        chosen = self.projection(functional.embedding(codes, self.embedding)).view_as(x)
        # the weight of the two losses is that of the authors' code
        loss = self.method.commitment * mean_square(x, chosen.detach()) + self.method.beta * mean_square(chosen, x.detach())
        return straight_through(x, words[codes].view_as(x)), self._grouped(codes), loss

    def _values(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].flatten(1)

    def _codes(self, values: Tensor) -> Tensor:
        codes = nearest(values.reshape(-1, self.embedding.shape[1]), self.codebook)
        return self._grouped(codes)

    def _grouped(self, codes: Tensor) -> Tensor:
        return codes if self.method.heads == 1 else codes.view(-1, self.method.heads)

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codewords times ``scale`` plus ``offset``, scalars."""
        if isinstance(self.projection, nn.Linear):
            self.projection.weight.mul_(scale)
            self.projection.bias.mul_(scale).add_(offset)
        else:
            self.embedding.mul_(scale).add_(offset)


@method
class OptVQ(VectorQuantizer):
    """Vectors become the number of their nearest codeword, of codewords trained on vectors that optimal transport shared out among them.

    Latent: float, ... x ``dim``. :meth:`layer` trains by gradients alone; ``fit`` trains it on vectors. The Sinkhorn algorithm works on the
    batch: larger batches share out better, and one should have some vectors at least for each ten codewords. Stored: ``heads`` times
    ceil(log2 codes) bits a vector, or fewer where codes are no power of two. Raises :class:`tersor.InputError` for vectors of another dimension,
    :class:`tersor.StateError` for a state of another shape, :class:`tersor.ConfigError` where ``heads`` does not divide ``dim``.
    """

    name = "optvq"
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    heads: int = field(1, at_least(1), help="parts of a vector, each with a code of its own; divides dim")
    epsilon: float = field(10.0, between(1e-3, 1e4), help="sharpness of the plan: exp(-epsilon cost), cost of deviation 1")
    iterations: int = field(5, between(1, 1000), help="of the Sinkhorn algorithm")
    projection: bool = field(True, help="a learned linear map of all codewords")
    commitment: float = field(1.0, between(0, 1e6), help="weight of the commitment loss")
    beta: float = field(0.25, between(0, 1e6), help="weight of the codebook loss")
    steps: int = field(1000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def __attrs_post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"optvq: heads divides dim; given: heads={self.heads}, dim={self.dim}")

    def _layer(self) -> OptVQLayer:
        return OptVQLayer(self)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=5, dim=6, heads=2, projection=False, steps=4))
