"""Exploration into Translation-Equivariant Image Quantization (Shin, Lee, Lee, Lyou, Lee, Choi, https://arxiv.org/abs/2112.00384)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from tersor import at_least, between, field, method, one_of
from tersor_kit_vq import Codebook, CodebookLayer, VectorQuantizer


def orthogonality(codebook: Tensor) -> Tensor:
    """The regulariser of section 2: |E E' - I|^2 / K^2 (Frobenius) with E the codebook, K x d, its rows scaled to length 1; scalar.

    The mean squared cosine between two different codewords, but for a factor 1 - 1/K. 0 where all are at right angles; with more codewords
    than dimensions it is 1/d - 1/K at least (Welch's bound), which evenly spread ones have. Of E E' and E'E, which have the same norm, the
    smaller one is made: |E E' - I|^2 = |E'E|^2 - 2 |E|^2 + K.
    """
    size, dim = codebook.shape
    rows = functional.normalize(codebook, dim=1)
    if size <= dim:
        gram = rows @ rows.T
        return (gram - gram.new_ones(size).diag()).square().sum() / size**2
    return ((rows.T @ rows).square().sum() - 2 * rows.square().sum() + size) / size**2


class TEVQLayer(CodebookLayer):
    """VQ-VAE's layer with a codebook that learns by gradient, and the regulariser.

    loss = mean (sg z - e)^2 + ``commitment`` mean (z - sg e)^2 + ``weight`` :func:`orthogonality`. The codewords themselves keep their
    lengths: only the regulariser scales them, as in the authors' experiments.
    """

    centred = False

    def __init__(self, codebook: Codebook, commitment: float, weight: float) -> None:
        super().__init__("te-vq", codebook, commitment)
        self.weight = weight

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codewords times ``scale``; an offset would change the angles between them."""
        self.codebook.words.mul_(scale)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, codes, loss = super()._quantize(x)
        if self.weight > 0 and self.training:
            loss = loss + self.weight * orthogonality(self.codebook.words)
        return values, codes, loss


@method
class TEVQ(VectorQuantizer):
    """Vectors become the number of their nearest codeword; codewords are held at right angles, so that small changes cross no border.

    An image that moves by less than the encoder's stride gives slightly other vectors (aliasing), and close codewords then change places.
    Latent: float, ... x ``dim``. Stored: ceil(log2 codes) bits a vector, decoded by look-up. ``weight`` is the authors' 10. The paper has 128
    codewords of 256 dimensions; more codewords than dimensions cannot all be at right angles, and are spread evenly.
    ``start``: uniform in [-1/codes, 1/codes] as the authors', or k-means of the first batch. Raises :class:`tersor.InputError` for vectors of
    another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "te-vq"
    bitwise = True
    codes: int = field(128, between(1, 1 << 20), help="codewords")
    dim: int = field(256, between(1, 1 << 14), help="dimensions of a vector")
    weight: float = field(10.0, between(0, 1e6), help="lambda of the orthogonality regulariser; 0: none")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    start: str = field("random", one_of("random", "kmeans"), help="of the codebook")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def _layer(self) -> TEVQLayer:
        return TEVQLayer(Codebook(self.codes, self.dim, 0.0, self.start, seed=self.seed), self.commitment, self.weight)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """From k-means: the authors' start leaves most of a large codebook out of use for good, as no other means brings codewords back."""
        return [cls(codes=2**bits, dim=dim, start="kmeans")]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8, start="kmeans"), cls(codes=3, dim=5, steps=4))
