"""Disentanglement via Latent Quantization (Hsu et al., https://arxiv.org/abs/2305.18378)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor import InputError, at_least, between, field, method
from tersor_kit_vq import VectorLayer, VectorQuantizer, bridge, fit_layer, mean_square, straight_through, unbridge

WEIGHT_DECAY = 0.1  # of AdamW at a rate of 1e-3, on the networks around the layer: the authors' value for every data set


def parameter_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """The strong regularization that is half of the method, as groups for ``torch.optim.AdamW``: all weights of ``model`` decay, except
    biases and the levels of :class:`QLAELayer`, which the authors' code exempts too.

    ``weight_decay``: at the authors' rate of 1e-3 for 200,000 steps. What AdamW takes off is rate x weight_decay of a weight in a step, so
    that far shorter training needs more. Raises :class:`tersor.InputError` for one below 0.
    """
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay is 0 or more; given: {weight_decay}")
    free = {id(m.levels) for m in model.modules() if isinstance(m, QLAELayer)}
    free |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    chosen = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in chosen if id(p) not in free], "weight_decay": weight_decay},
        {"params": [p for p in chosen if id(p) in free], "weight_decay": 0.0},
    ]


class QLAELayer(VectorLayer):
    """``forward(z) -> Quantized(values, codes, loss)``: each dimension of z becomes the nearest of its own ``levels``.

    ``levels``: a parameter, float32 d x n_v, evenly from -0.5 to 0.5 at first; ``codes``: int64 ... x d; ``values``: the levels, with the
    gradient copied straight through to z; ``loss``: ``quantization`` mean (sg[z] - q)^2, which alone moves the levels, plus ``commitment``
    mean (z - sg[q])^2. ``dim``: of the vectors where it is not d; two linear maps then bridge it.
    """

    def __init__(self, latents: int, values: int, quantization: float, commitment: float, dim: int | None = None) -> None:
        super().__init__("qlae", latents if dim is None else dim, (values,) * latents)
        self.quantization, self.commitment = quantization, commitment
        # linspace of one level would be -0.5
        start = torch.linspace(-0.5, 0.5, values) if values > 1 else torch.zeros(1)
        self.levels = nn.Parameter(start.repeat(latents, 1))
        self.project_in, self.project_out = bridge(self.dim, latents), bridge(latents, self.dim)
        self.invertible = self.dim >= latents

    @torch.no_grad()
    def nearest_levels(self, z: Tensor) -> Tensor:
        """Number of the nearest level in each dimension, int64 d x N, of z turned over, float32 d x N: a binary search in the sorted
        levels, so that time grows with log n_v and no distance is kept."""
        levels, order = self.levels.sort(dim=1)
        low, high = levels[:, :-1], levels[:, 1:]
        # halfway, but never a level itself from below: its own value must find it
        halfway = (low / 2 + high / 2).maximum(low).minimum(torch.nextafter(high, high.new_tensor(-torch.inf)))
        return order.gather(1, torch.searchsorted(halfway.contiguous(), z))

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.project_in(x)
        codes = self.nearest_levels(z.detach().T.contiguous())
        q = self.levels.gather(1, codes).T
        loss = self.quantization * mean_square(z.detach(), q) + self.commitment * mean_square(z, q.detach())
        return self.project_out(straight_through(z, q.detach().contiguous())), codes.T.contiguous(), loss

    def _values(self, codes: Tensor) -> Tensor:
        return self.project_out(self.levels.gather(1, codes.T).T.contiguous())  # type: ignore[no-any-return]

    def _codes(self, values: Tensor) -> Tensor:
        return self.nearest_levels(unbridge(self.project_out, values).T.contiguous()).T.contiguous()


@method
class Qlae(VectorQuantizer):
    """Every dimension of a vector becomes the number of the nearest value in its own small codebook of scalars.

    Latent: float, ... x ``dim``. :meth:`layer` goes into an autoencoder that is trained with strong weight decay
    (:func:`parameter_groups`); each code is then pushed to stand for one source of variation, which :func:`tersor_qlae.infomec` measures. ``fit`` learns
    levels for given vectors: the layer's own loss on standardized dimensions, started at their quantiles. Stored: dim x log2 values bits
    a vector, up to 31 of them together rounded up. The authors have 10 values, twice as many dimensions as sources, and 0.01 for both losses.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "qlae"
    bitwise = True
    values: int = field(10, between(1, 1 << 16), help="n_v, levels of each dimension")
    dim: int = field(12, between(1, 1 << 14), help="n_z, dimensions of a vector")
    quantization: float = field(0.01, between(0, 1e6), help="weight of the quantization loss, which moves the levels")
    commitment: float = field(0.01, between(0, 1e6), help="weight of the commitment loss")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of linear maps and of training")

    def _layer(self, dim: int | None = None) -> QLAELayer:
        return QLAELayer(self.dim, self.values, self.quantization, self.commitment, dim)

    def layer(self, dim: int | None = None, fitted: bool = False) -> Any:
        """The torch layer that trains. ``dim``: of the vectors where it is not the method's; two linear maps bridge it. ``fitted``: with
        the method's state, in evaluation mode."""
        if dim is None or dim == self.dim:
            return super().layer(fitted)
        if fitted:
            raise InputError(f"qlae: a fitted layer takes vectors of dim={self.dim} dimensions; given: dim={dim}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._layer(dim)

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        x = torch.cat([self._flat(s) for s in samples]).float()
        layer = self.layer()
        if len(x) == 0 or not bool(torch.isfinite(x).all()):
            raise InputError(f"qlae: fit needs at least one vector, and no NaN or infinity; given: {len(x)} vectors")
        # squares of large elements leave float32
        mean, spread = x.double().mean(0), x.double().std(0, correction=0)
        scale = torch.where(spread > 0, spread, 1)
        x = ((x - mean) / scale).float()
        with torch.no_grad():  # each level starts with as many vectors
            ranks = ((torch.arange(self.values) + 0.5) / self.values * len(x)).long()
            layer.levels.copy_(x.sort(0).values[ranks].T)
        levels = fit_layer(layer, x, self.steps, self.seed).levels.detach()
        return {"levels": (levels * scale[:, None] + mean[:, None]).float()}

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """4 to 10 levels in as many dimensions as come nearest to 2^bits codes from below; ``layer(dim)`` bridges to ``dim``. Both losses
        have the 0.25 that is VQ-VAE's: where methods are compared nothing decays, and the authors' 0.01 lets latents run far from the levels."""
        known = [(n, d) for n in range(4, 11) for d in range(1, min(dim, bits) + 1) if n**d <= 2**bits]
        values, latents = max(known, key=lambda nd: nd[0] ** nd[1]) if known else (2**bits, 1)
        return [cls(values=values, dim=latents, quantization=0.25, commitment=0.25)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(values=5, dim=4, steps=8), cls(values=1, dim=3, steps=2), cls(values=6, dim=1, steps=4))
