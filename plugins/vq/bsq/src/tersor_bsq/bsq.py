"""Image and Video Tokenization with Binary Spherical Quantization (Zhao, Xiong, Krähenbühl, https://arxiv.org/abs/2406.07548)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from tersor import (
    Calibration,
    InputError,
    MissingStateError,
    Spec,
    StateError,
    at_least,
    between,
    field,
    method,
    one_of,
    positive,
    track,
)  # fmt: skip
from tersor_kit_vq import (
    BitLayer,
    IndexPrior,
    VectorQuantizer,
    bit_groups,
    bits_to_codes,
    codebook_entropy,
    codes_to_bits,
    from_grid,
    grid_shape,
    straight_through,
    to_grid,
    token_entropy,
)

_PRIOR_BITS = 10  # of one index that the prior predicts


class BSQLayer(BitLayer):
    """v = ``project_in`` (z) of L dimensions, u = v / |v| on the unit sphere, u_hat = sign(u) / sqrt(L), out by ``project_out`` (section 4).

    The soft code of a vector, softmax over all corners c of u . c / temperature, is a product over the bits, whose log odds are
    2 u_d / (temperature sqrt(L)). ``loss``: ``entropy`` times (mean token entropy - ``gamma`` codebook entropy), in nats, plus
    ``commitment`` times mean |u_hat - u|^2. Codes: the bits as an integer, the first dimension counting most; several integers beyond 31
    bits. Values give back their codes where dim is at least L; with fewer dimensions ``project_out`` cannot be undone.
    """

    def __init__(
        self, bits: int, dim: int, group: int, temperature: float, entropy: float, gamma: float, commitment: float
    ) -> None:
        super().__init__("bsq", bits, dim, group, radius=bits**-0.5)
        self.temperature, self.entropy, self.gamma, self.commitment = temperature, entropy, gamma, commitment

    def sphere(self, x: Tensor) -> Tensor:
        """Vectors, float32 N x dim, on the unit sphere: N x L."""
        v = self.project_in(x)
        # the largest element first, so that no square leaves float32
        return functional.normalize(v / v.detach().abs().amax(1, keepdim=True).clamp(min=1e-30), dim=1)

    def odds(self, u: Tensor) -> Tensor:
        """Log odds of the bits of a soft code, of u (float N x L on the sphere)."""
        return u * (2 * self.radius / self.temperature)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = self.sphere(x)
        bits = u.detach() > 0
        hat = straight_through(u, self.corners(bits))
        odds = self.odds(u)
        penalty = token_entropy(odds) - self.gamma * codebook_entropy(odds, self.groups, shared=self.training)
        loss = self.entropy * penalty
        if self.commitment:
            loss = loss + self.commitment * (hat.detach() - u).square().sum() / max(len(u), 1)
        return self.project_out(hat), self.integers(bits), loss


@method
class BSQ(VectorQuantizer):
    """Vectors are projected to the unit sphere of ``bits`` dimensions, of which only the signs are kept: no codebook to learn or search.

    Latent: float, ... x ``dim``. Stored: ``bits`` bits a vector, or with ``prior="autoregressive"`` what a learned prior in exact arithmetic
    leaves of them: groups of at most 10 bits one after the other, each seen with the groups before it and those of the vectors to the
    left and above. Latents of two or more leading dimensions are grids (the last two), others rows of 64. ``fit`` trains the layer on
    vectors alone, then the prior; :meth:`with_layer` takes a layer that was trained in a network.

    Both entropies are the factorised ones: the token entropy exactly, as a sum over bits; the codebook entropy as a sum over groups
    of at most ``group`` bits (9, as in the authors' code; ``group`` = ``bits`` is exact, 1 the paper's product of bits).
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "bsq"
    beside = ("prior.",)
    bits: int = field(14, between(1, 64), help="L, dimensions of the sphere and bits of a vector")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    group: int = field(9, between(1, 20), help="bits whose joint codes the codebook entropy sees")
    entropy: float = field(0.1, between(0, 1e6), help="weight of the entropy penalty")
    gamma: float = field(1.0, between(0, 1e6), help="of the codebook entropy against the token entropy")
    commitment: float = field(0.0, between(0, 1e6), help="weight of |u_hat - u|^2")
    temperature: float = field(0.5, positive, help="of the soft codes: 1 / tau")
    prior: str = field("none", one_of("none", "autoregressive"), help="what codes are stored with")
    steps: int = field(2000, at_least(1), help="training steps (for fit), of the layer and of the prior")
    seed: int = field(0, at_least(0), help="of the linear maps and of training")

    def _layer(self) -> BSQLayer:
        return BSQLayer(self.bits, self.dim, self.group, self.temperature, self.entropy, self.gamma, self.commitment)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(bits=bits, dim=dim)]

    # -- the prior

    def with_layer(self, layer: BSQLayer, latents: Sequence[Tensor] = ()) -> Self:
        """A copy with a layer trained elsewhere; with ``prior="autoregressive"`` the prior learns from ``latents`` (each float ... x dim).
        Raises :class:`tersor.InputError` where there are none, :class:`tersor.StateError` for a layer of another shape."""
        fitted = super().with_layer(layer)
        return fitted if self.prior == "none" else self.with_state(fitted.state | fitted._fit_prior(latents))

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        state = super()._fit(samples)
        return state if self.prior == "none" else state | self.with_state(state)._fit_prior(samples)

    def _fit_prior(self, latents: Sequence[Tensor]) -> dict[str, Tensor]:
        if not any(x.numel() for x in latents):
            raise InputError("bsq: the prior learns from at least one vector; given: none")
        grids = [self._grid(self._flat(x), x.shape[:-1]) for x in latents if x.numel()]
        steps = track(range(self.steps), "training the prior of bsq")
        prior = IndexPrior.fit(grids, sum(self._sizes), steps, self.steps, self.seed)
        return {f"prior.{k}": v for k, v in prior.state.items()}

    @functools.cached_property
    def _prior(self) -> IndexPrior:
        weights = {k.removeprefix("prior."): v for k, v in self.state.items() if k.startswith("prior.")}
        if not weights:
            raise MissingStateError(
                'bsq: the state has no prior; use .fit(samples) or .with_layer(layer, latents), or prior="none"'
            )
        prior = IndexPrior(weights)
        if prior.size != sum(self._sizes):
            raise StateError(f"bsq: {self} needs a prior of {sum(self._sizes)} indices; the state has one of {prior.size}")
        return prior

    @property
    def _prior_groups(self) -> list[int]:
        return bit_groups(self.bits, _PRIOR_BITS)

    @property
    def _sizes(self) -> list[int]:
        return [1 << g for g in self._prior_groups]

    @torch.no_grad()
    def _grid(self, x: Tensor, leading: Sequence[int]) -> Tensor:
        layer = self._trained
        bits = layer.code_bits(layer(x.float()).codes)
        return to_grid(bits_to_codes(bits, self._prior_groups), leading, self._sizes)

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        if self.prior == "none":
            return super()._quantize(x, calibration, spec)
        return {"codes": self._prior.encode(self._grid(self._flat(x), x.shape[:-1]))}

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        if self.prior == "none" or spec.shape[-1:] != (self.dim,):
            return super()._dequantize(parts, spec)
        batch, height, width = grid_shape(spec.shape[:-1])
        grid = self._prior.decode(parts["codes"], (batch, height, width * len(self._sizes)))
        bits = codes_to_bits(from_grid(grid, math.prod(spec.shape[:-1]), self._sizes), self._prior_groups)
        layer = self._trained
        return layer.codes_to_values(layer.integers(bits)).view(spec.shape)

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(
            cls(bits=4, dim=5, steps=8), cls(bits=40, dim=3, steps=2), cls(bits=3, dim=3, prior="autoregressive", steps=4)
        )
