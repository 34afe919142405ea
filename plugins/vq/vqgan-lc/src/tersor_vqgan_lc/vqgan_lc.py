"""Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99% (Zhu et al., https://arxiv.org/abs/2406.11837)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from tersor import ConfigError, InputError, at_least, between, field, method
from tersor_kit_vq import (
    Codebook,
    VectorLayer,
    VectorQuantizer,
    check_vectors,
    fit_layer,
    kmeans,
    layer_state,
    mean_square,
    nearest,
    straight_through,
)


class VQGANLCLayer(VectorLayer):
    """The codebook is the projection P(C) of ``features`` C (K x feature_dim) that never move, by a linear ``projector`` P that learns.

    Features come from data (:meth:`VQGANLC.layer`), so that they are spread as data are from the start, and P moves all of them together.
    Where none were given, those of the first batch in training mode are taken: the vectors themselves, P being the identity at first.
    """

    def __init__(self, codes: int, dim: int, feature_dim: int, commitment: float, weight: float, seed: int) -> None:
        super().__init__("vqgan-lc", dim, codes)
        self.commitment, self.weight, self.seed = commitment, weight, seed
        self.features = Codebook(codes, feature_dim, decay=0.0, seed=seed)
        self.features.requires_grad_(False)
        self.projector = nn.Linear(feature_dim, dim)
        with torch.no_grad():
            if feature_dim == dim:
                self.projector.weight.copy_(torch.eye(dim))
                self.projector.bias.zero_()
            else:
                self.projector.weight.normal_(std=dim**-0.5)

    @property
    def codebook(self) -> Tensor:
        """All codewords as they are now, K x dim."""
        return self.projector(self.features.words)  # type: ignore[no-any-return]

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training and not self.features.started:
            self._start(x.detach())
        words = self.codebook.detach()
        codes = nearest(x.detach(), words)
        # both quantization losses; the gradient of P comes from the chosen features and moves all codewords
        chosen = self.projector(self.features(codes))
        loss = self.commitment * mean_square(x, chosen.detach()) + self.weight * mean_square(chosen, x.detach())
        return straight_through(x, words[codes]), codes, loss

    def _start(self, x: Tensor) -> None:
        if self.features.dim != self.dim:
            raise ConfigError(
                f"vqgan-lc: features of feature_dim={self.features.dim} dimensions cannot be the vectors of dim={self.dim}: "
                "give them, layer(start=features)"
            )
        self.features.prepare(spread(x, self.features.size, self.seed))

    def _values(self, codes: Tensor) -> Tensor:
        return self.codebook[codes]

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.codebook)


def spread(x: Tensor, count: int, seed: int) -> Tensor:
    """``x`` (N x d), and where these are fewer than ``count``, points between random pairs of them too, so that no two features are the same."""
    missing = count - len(x)
    if missing <= 0 or len(x) == 0:
        return x
    generator = torch.Generator().manual_seed(seed)
    here = torch.randint(len(x), (missing,), generator=generator)
    there = (here + torch.randint(1, max(len(x), 2), (missing,), generator=generator)) % len(x)
    share = torch.rand(missing, 1, generator=generator)
    return torch.cat([x, torch.lerp(x[here.to(x.device)], x[there.to(x.device)], share.to(x.device))])


@method
class VQGANLC(VectorQuantizer):
    """Vectors become the number of their nearest codeword; the codewords are frozen features from data, moved by one learned linear map.

    Latent: float, ... x ``dim``. The paper's features are centres of CLIP features of ImageNet. Here they are centres by k-means of whatever
    :meth:`layer` is given, features of a pretrained network or pixels, or else of the vectors themselves; ``fit`` takes its samples.
    Stored: ceil(log2 codes) bits a vector. ``commitment`` 1 and ``weight`` 0.33 are those of the authors' code, as is the normal start of the
    projector, which is the identity where features have the dimensions of vectors and none are given.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "vqgan-lc"
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    feature_dim: int = field(0, between(0, 1 << 14), help="dimensions of a feature; 0: as a vector")
    commitment: float = field(1.0, between(0, 1e6), help="weight of the vectors' distance from their codewords")
    weight: float = field(0.33, between(0, 1e6), help="beta, weight of the codewords' distance from their vectors")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of k-means, the projector and training")

    def _layer(self) -> VQGANLCLayer:
        return VQGANLCLayer(self.codes, self.dim, self.feature_dim or self.dim, self.commitment, self.weight, self.seed)

    def layer(self, fitted: bool = False, start: Tensor | None = None) -> VQGANLCLayer:
        """The torch layer that trains. ``start``: features of any source, float ... x feature_dim, whose ``codes`` centres by k-means are
        frozen; ``fitted``: with the method's state, in evaluation mode. Raises :class:`tersor.InputError` for other features or none."""
        layer: VQGANLCLayer = super().layer(fitted)
        if start is not None:
            self._freeze(layer, start)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(self.seed)
                layer.projector.reset_parameters()
                layer.projector.weight.normal_(std=self.dim**-0.5)
        return layer

    def _freeze(self, layer: VQGANLCLayer, features: Tensor) -> None:
        flat = check_vectors(features, layer.features.dim, "vqgan-lc (features)")
        if len(flat) == 0:
            raise InputError(f"vqgan-lc takes one feature or more; given: shape {tuple(features.shape)}")
        layer.features.set(kmeans(spread(flat, self.codes, self.seed), self.codes, 10, self.seed)[0])

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        vectors, layer = torch.cat([self._flat(s) for s in samples]), self.layer()
        if len(vectors) and layer.features.dim == self.dim:
            self._freeze(layer, vectors)
        return layer_state(fit_layer(layer, vectors, self.steps, self.seed))

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=1, dim=3, steps=2), cls(codes=300, dim=3, steps=2))
