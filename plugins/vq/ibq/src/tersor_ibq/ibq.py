"""Taming Scalable Visual Tokenizer for Autoregressive Image Generation (Shi et al., https://arxiv.org/abs/2412.02692): index backpropagation
quantization."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import at_least, between, field, method, positive
from tersor_kit_vq import VectorLayer, VectorQuantizer, mean_square, nearest, posterior


class IBQLayer(VectorLayer):
    """A codebook C (``codebook``, K x dim) of which each vector takes the row of the largest z . c, and which all learns from each vector.

    The code is argmax of p = softmax(z C'), and the values are (onehot + p - sg[p]) C, the paper's index backpropagation: a gradient goes to
    every codeword and to z through p, in proportion to how near the codeword was to being chosen. In evaluation there is no entropy penalty.
    """

    centred = False

    def __init__(self, codes: int, dim: int, commitment: float, entropy: float, temperature: float) -> None:
        super().__init__("ibq", dim, codes)
        self.commitment, self.entropy, self.temperature = commitment, entropy, temperature
        self.codebook = nn.Parameter(torch.randn(codes, dim))

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codewords times ``scale``; dot products would not be the same with an offset."""
        self.codebook.mul_(scale)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = self.codebook
        if self.training and self.entropy:
            q = posterior(x, words, words, hard=True, sharpness=1 / self.temperature)
            # sharp for each vector, uniform for all of them: the entropy penalty
            penalty = self.entropy * (q.sample_entropy - q.mean_entropy)
        else:
            q, penalty = posterior(x, words, words, hard=True), x.new_zeros(())
        chosen = functional.embedding(q.codes, words)
        # the double quantization loss: once through the categorical, once as in VQ-VAE
        loss = mean_square(q.values, x) + mean_square(chosen.detach(), x) + self.commitment * mean_square(chosen, x.detach())
        return q.values, q.codes, loss + penalty

    def _values(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.codebook)  # the codeword of the largest product may be another, longer one


@method
class IBQ(VectorQuantizer):
    """Vectors become the number of the codeword with the largest dot product, and each codeword learns from each vector.

    Latent: float, ... x ``dim``. :meth:`layer` trains by gradients alone, without restarts or moving averages; ``fit`` trains it on
    vectors. Stored: ceil(log2 codes) bits a vector; decoding is a look-up. Dot products, the start from a normal distribution, both quantization
    losses with ``commitment`` = 0.25 as the weight of the codebook's part, and the entropy's ``temperature`` of 0.01 are those of the
    authors' code. Probabilities are made in tiles and again in the backward pass: memory does not grow with vectors x codes. Entropies are those
    of each process alone, as in the authors' code.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "ibq"
    bitwise = True
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the codewords' own quantization loss")
    entropy: float = field(0.05, between(0, 1e6), help="weight of the entropy penalty; 0: none")
    temperature: float = field(0.01, positive, help="of the probabilities whose entropy is penalised")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def _layer(self) -> IBQLayer:
        return IBQLayer(self.codes, self.dim, self.commitment, self.entropy, self.temperature)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=1, dim=3, steps=2), cls(codes=7, dim=3, entropy=0.0, steps=4))
