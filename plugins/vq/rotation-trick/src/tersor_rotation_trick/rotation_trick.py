"""Restructuring Vector Quantization with the Rotation Trick (Fifty et al., https://arxiv.org/abs/2410.06424)."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from tersor import at_least, between, field, method
from tersor_kit_vq import Codebook, CodebookLayer, VectorQuantizer, rotate_to


class RotationTrickLayer(CodebookLayer):
    """VQ-VAE's layer with another gradient (section 4, algorithm 1): the codeword q of a vector e is q = (|q| / |e|) R e, R the rotation that
    aligns e with q, and R and the scale are constants to the gradient.

    The gradient at q comes to e under the angle to e that it had to q, longer or shorter by |q| / |e|. Vectors of one cell thus get
    different gradients: those that point outward are pushed apart, those that point inward pulled together (section 5).
    """

    def __init__(self, codebook: Codebook, commitment: float) -> None:
        super().__init__("rotation-trick", codebook, commitment)

    def through(self, x: Tensor, values: Tensor) -> Tensor:
        """``values`` with a gradient to ``x``: rotated back and rescaled."""
        return rotate_to(x, values)


@method
class RotationTrick(VectorQuantizer):
    """Vectors become the number of their nearest codeword; an encoder gets the codeword's gradient rotated and rescaled to its vector.

    Latent: float, ... x ``dim``. :meth:`layer` trains the encoder before it; the codebook follows by moving averages (``decay`` 0: by the
    codebook loss). ``fit`` on plain vectors has no encoder, so that the trick changes nothing there: it trains the codebook by the same moving
    averages. Stored: ceil(log2 codes) bits a vector. Decoding is a look-up. The codebook starts from k-means of the first batch.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "rotation-trick"
    bitwise = True
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    decay: float = field(0.99, between(0, 1), help="of the codebook's moving averages; 0: a codebook loss instead")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    steps: int = field(1000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def _layer(self) -> RotationTrickLayer:
        return RotationTrickLayer(Codebook(self.codes, self.dim, self.decay, seed=self.seed), self.commitment)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=5, dim=3, decay=0.0, steps=4))
