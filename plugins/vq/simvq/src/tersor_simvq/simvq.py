"""Addressing Representation Collapse in Vector Quantized Models with One Linear Layer (Zhu et al., https://arxiv.org/abs/2411.02038)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import at_least, between, field, method
from tersor_kit_vq import VectorLayer, VectorQuantizer, mean_square, nearest, straight_through


class SimVQLayer(VectorLayer):
    """The codebook is C W': ``basis`` C (K x dim) is drawn once and never moves, ``linear`` W (dim x dim) learns (section 4, algorithm 1).

    A step on a few codewords moves W, and with it the space that all of them span; in a plain codebook only the chosen ones move.
    """

    basis: Tensor
    centred = False

    def __init__(self, codes: int, dim: int, commitment: float) -> None:
        super().__init__("simvq", dim, codes)
        self.commitment = commitment
        self.register_buffer("basis", torch.randn(codes, dim) * dim**-0.5)
        self.linear = nn.Linear(dim, dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        """All codewords as they are now, K x dim."""
        return self.linear(self.basis)  # type: ignore[no-any-return]

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codewords times ``scale``; W has no offset."""
        self.linear.weight.mul_(scale)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = self.codebook.detach()
        codes = nearest(x.detach(), words)
        # the loss of equation 5, with a gradient of W from the chosen rows of C alone
        chosen = self.linear(functional.embedding(codes, self.basis))
        loss = mean_square(chosen, x.detach()) + self.commitment * mean_square(x, chosen.detach())
        return straight_through(x, words[codes]), codes, loss

    def _values(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.codebook)


@method
class SimVQ(VectorQuantizer):
    """Vectors become the number of their nearest codeword, the codewords being one linear map of frozen random vectors.

    Latent: float, ... x ``dim``. :meth:`layer` trains by gradients alone, without restarts or moving averages; ``fit`` trains it on
    vectors. Stored: ceil(log2 codes) bits a vector. The paper starts C with the deviation dim^-0.5 and W as torch does; ``commitment`` is its
    beta. Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "simvq"
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the basis and of training")

    def _layer(self) -> SimVQLayer:
        return SimVQLayer(self.codes, self.dim, self.commitment)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=1, dim=3, steps=2))
