"""VQ-VAE's layer, from which methods differ in a gradient, a loss or a start."""

from __future__ import annotations

from torch import Tensor

from tersor_kit_vq.codebook import Codebook, straight_through
from tersor_kit_vq.layers import VectorLayer, mean_square
from tersor_kit_vq.search import nearest


class CodebookLayer(VectorLayer):
    """The nearest codeword of a :class:`Codebook`, van den Oord et al. (https://arxiv.org/abs/1711.00937), equations 1 to 3.

    ``values``: the codewords exactly, with the gradient that :meth:`through` gives z; ``loss``: ``commitment`` times mean (z - sg[e])^2,
    and for a codebook with ``decay`` 0 also mean (sg[z] - e)^2, which moves it in place of the moving averages. Training mode starts and
    moves the codebook; evaluation mode changes nothing.
    """

    def __init__(self, name: str, codebook: Codebook, commitment: float) -> None:
        super().__init__(name, codebook.dim, codebook.size)
        self.codebook, self.commitment = codebook, commitment

    def through(self, x: Tensor, values: Tensor) -> Tensor:
        """``values`` with a gradient to ``x``: as it comes."""
        return straight_through(x, values)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            self.codebook.prepare(x.detach())
        codes = nearest(x.detach(), self.codebook.words.detach())
        values = self.codebook(codes)
        loss = self.commitment * mean_square(x, values.detach())
        if self.codebook.decay == 0:
            loss = loss + mean_square(values, x.detach())
        out = self.through(x, values.detach())
        if self.training:  # after the values, which are the codebook's before it moves
            self.codebook.update(x.detach(), codes)
        return out, codes, loss

    def _values(self, codes: Tensor) -> Tensor:
        return self.codebook(codes)  # type: ignore[no-any-return]

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.codebook.words)
