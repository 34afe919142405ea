"""Factorized Visual Tokenization and Generation (Bai et al., https://arxiv.org/abs/2411.16681)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import ConfigError, InputError, at_least, between, field, method
from tersor_kit_vq import (
    VectorLayer,
    VectorQuantizer,
    check_vectors,
    mean_square,
    move_bridges,
    nearest,
    posterior,
    straight_through,
    unbridge,
)  # fmt: skip

_TEMPERATURE = 0.01  # of the soft codes in the entropy loss, the authors'


def _unit(x: Tensor) -> Tensor:
    """Rows on the unit sphere; divided by the largest element first, so that no square leaves float32."""
    return functional.normalize(x / x.detach().abs().amax(1, keepdim=True).clamp(min=1e-30), dim=1)


class FQLayer(VectorLayer):
    """Each factor of a vector, ``factor`` dimensions by a projection of its own, has a sub-codebook; factors and codewords are unit vectors (section 3).

    ``loss``, of each factor: mean (e - sg z)^2 + ``commitment`` mean (z - sg e)^2 + ``entropy`` times (mean entropy of a vector's soft code -
    entropy of the mean soft code); and ``disentangle`` times the squared cosine of the chosen codewords, mean over all pairs of factors, whose
    gradient goes straight through to the factors. :meth:`align` is the loss of representation learning. Codes: int64 ... x number of factors.
    Values give back their codes where dim is at least that of all factors; with fewer dimensions the map out cannot be undone.
    """

    def __init__(
        self, codes: Sequence[int], dim: int, factor: int, commitment: float, entropy: float, disentangle: float,
        features: Sequence[int], alignment: float,
    ) -> None:  # fmt: skip
        super().__init__("fqgan", dim, codes)
        self.factor, self.commitment, self.entropy = factor, commitment, entropy
        self.disentangle, self.features, self.alignment = disentangle, tuple(features), alignment
        wide = factor * len(codes)
        self.project_in, self.project_out = nn.Linear(dim, wide), nn.Linear(wide, dim)
        self.books = nn.ParameterList(functional.normalize(torch.rand(k, factor) * 2 - 1, dim=1) for k in codes)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(factor, 4 * factor), nn.ReLU(), nn.Linear(4 * factor, t)) for t in features
        )
        self.invertible = dim >= wide

    def _choose(self, i: int, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factor i of vectors: on the sphere, its codewords, the chosen ones and their numbers."""
        z, words = _unit(part), _unit(self.books[i])
        codes = nearest(z.detach(), words.detach())
        return z, words, functional.embedding(codes, words), codes

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hats, codes, loss = [], [], x.new_zeros(())
        for i, part in enumerate(self.project_in(x).split(self.factor, 1)):
            z, words, chosen, own = self._choose(i, part)
            loss = loss + mean_square(chosen, z.detach()) + self.commitment * mean_square(z, chosen.detach())
            if self.entropy:
                # 2 z . e is -|z - e|^2 but for a constant
                soft = posterior(2 * z, words, words, hard=True, sharpness=1 / _TEMPERATURE)
                loss = loss + self.entropy * (soft.sample_entropy - soft.mean_entropy)
            hats.append(straight_through(z, chosen.detach()))
            codes.append(own)
        if self.disentangle and len(hats) > 1:
            loss = loss + self.disentangle * _redundancy(hats)
        return self.project_out(torch.cat(hats, 1)), torch.stack(codes, 1), loss

    def move(self, scale: Tensor, offset: Tensor) -> None:
        """As :meth:`VectorLayer.move`, by the two linear maps."""
        move_bridges(self.project_in, self.project_out, scale, offset)

    def factors(self, codes: Tensor) -> Tensor:
        """The codewords, unit vectors float32 N x factors x ``factor``, of codes (int64 N x factors)."""
        return torch.stack([_unit(book)[codes[:, i]] for i, book in enumerate(self.books)], 1)

    @torch.no_grad()
    def redundancy(self, codes: Tensor) -> Tensor:
        """Mean squared cosine between the codewords of a vector, over all pairs of factors; ``codes``: int64 ... x factors. Scalar."""
        return _redundancy(list(self.factors(codes.reshape(-1, len(self.books))).unbind(1)))

    def align(self, z: Tensor, *features: Tensor) -> Tensor:
        """The loss of representation learning (section 3): ``alignment`` times the mean of 1 - cosine between the features that a head predicts
        from a quantized factor and those of a frozen teacher. ``z``: as in ``forward``; ``features``: for the first factors, float ... x t each, with
        the t of the layer's ``features``. To be added to the loss; its gradient goes straight through to z. Raises :class:`tersor.InputError`."""
        given = [tuple(f.shape) for f in features]
        if not self.heads or given != [(*z.shape[:-1], t) for t in self.features]:
            raise InputError(f"fqgan: features are float ... x t, of vectors as z, with t in {self.features}; given: {given}")
        with torch.autocast(z.device.type, enabled=False):
            x = check_vectors(z, self.dim, self.name)
            loss = x.new_zeros(())
            for i, (part, head, wanted) in enumerate(
                zip(self.project_in(x).split(self.factor, 1), self.heads, features, strict=False)
            ):
                unit, _, chosen, _ = self._choose(i, part)
                guess = head(straight_through(unit, chosen.detach()))
                known = check_vectors(wanted.detach(), wanted.shape[-1], "fqgan's features")
                loss = loss + (1 - functional.cosine_similarity(guess, known, dim=1)).sum() / max(len(x), 1)
        return self.alignment * loss

    def _values(self, codes: Tensor) -> Tensor:
        return self.project_out(self.factors(codes).flatten(1))  # type: ignore[no-any-return]

    def _codes(self, values: Tensor) -> Tensor:
        parts = unbridge(self.project_out, values).split(self.factor, 1)
        return torch.stack([nearest(p, _unit(b)) for p, b in zip(parts, self.books, strict=True)], 1)


def _redundancy(factors: list[Tensor]) -> Tensor:
    """Mean over vectors and pairs of the squared cosine of unit vectors, each float N x d."""
    pairs = list(itertools.combinations(factors, 2))
    total = sum(((a * b).sum(1).square().sum() for a, b in pairs), factors[0].new_zeros(()))
    return total / max(len(pairs) * len(factors[0]), 1)


@method
class FQGAN(VectorQuantizer):
    """Vectors are split into factors by learned projections, each with a small codebook of its own; the codes of a vector are one for each.

    Latent: float, ... x ``dim``. ``codes``: the sizes of the sub-codebooks, one for each factor; together they have as many codes as their product.
    A regulariser keeps the factors apart; with ``features`` the first factors learn to predict those of a frozen teacher by ``layer.align``.
    Stored: the bits of the product of the sizes. Defaults are the authors' but for the sizes (16,384 each there).
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "fqgan"
    codes: tuple[int, ...] = field((1024, 1024), between(1, 1 << 20), help="codewords of each sub-codebook")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    factor: int = field(8, between(1, 1 << 12), help="dimensions of a factor")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    entropy: float = field(0.03, between(0, 1e6), help="weight of the entropy loss of each factor")
    disentangle: float = field(0.1, between(0, 1e6), help="weight of the squared cosine between factors")
    features: tuple[int, ...] = field((), between(1, 1 << 16), help="dimensions of teachers' features, for the first factors")
    alignment: float = field(0.5, between(0, 1e6), help="weight of layer.align")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of initial weights and of training")

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.codes) <= 64 or len(self.features) > len(self.codes):
            raise ConfigError(
                f"fqgan: codes={self.codes!r}, features={self.features!r}; allowed: 1 to 64 sub-codebooks, features for at most as many"
            )

    def _layer(self) -> FQLayer:
        return FQLayer(
            self.codes, self.dim, self.factor, self.commitment, self.entropy, self.disentangle, self.features, self.alignment
        )

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """Two factors, the first with the odd bit."""
        return [cls(codes=(2 ** (bits - bits // 2), 2 ** (bits // 2)), dim=dim)] if bits > 1 else []

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(
            cls(codes=(7, 4), factor=2, dim=5, steps=8), cls(codes=(3, 5, 2), factor=3, dim=4, features=(2,), steps=2)
        )
