"""Finite Scalar Quantization: VQ-VAE Made Simple (Mentzer et al., https://arxiv.org/abs/2309.15505)."""

from __future__ import annotations

import functools
import math
from typing import Any, Self

import torch
from torch import Tensor

from tersor import Calibration, ConfigError, CorruptPayloadError, InputError, Quantizer, Spec, between, field, method
from tersor_kit_vq import VectorLayer, bridge, index_bits, pack_indices, unbridge, unpack_indices


@method
class FSQ(Quantizer):
    """Every dimension of a vector is bounded by tanh and rounded to a fixed number of levels (section 3, appendix A.1).

    Latent: float, ... x d, where d is the number of ``levels``. The codebook is implicit, all combinations of levels: there is
    nothing to learn and no auxiliary loss. Values come back in [-1, 1]. With ``bounded`` the vectors are taken as they are, in
    [-1, 1] already, and quantizing what was dequantized is exact. The paper's recommended levels are (8, 6, 5) for 2^8 codes,
    (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12, (8, 8, 8, 6, 5) for 2^14, (8, 8, 8, 5, 5, 5) for 2^16 (table 1).

    Stored: indices of ceil(log2 of the number of codes) bits. :meth:`layer` is the straight-through layer for training.
    Raises :class:`tersor.InputError` for vectors of another dimension, or beyond [-1, 1] with ``bounded``;
    :class:`tersor.ConfigError` for more than 2^31 codes.
    """

    name = "fsq"
    domains = ("latent",)
    native = "torch"
    bitwise = True
    levels: tuple[int, ...] = field((8, 5, 5, 5), between(2, 1 << 16), help="levels of each dimension")
    bounded: bool = field(False, help="the vectors are in [-1, 1] already; no tanh")

    def __attrs_post_init__(self) -> None:
        if not self.levels or len(self.levels) > 31 or math.prod(self.levels) > 1 << 31:
            raise ConfigError(
                f"fsq: levels={self.levels!r} give {math.prod(self.levels)} codes; allowed: 1 dimension or more, up to 2^31 codes"
            )

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """The paper's levels (table 1, as used for its experiments), for vectors of ``dim`` dimensions by way of ``layer(dim)``."""
        known = {8: (8, 6, 5), 10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5), 16: (8, 8, 8, 5, 5, 5)}
        return [cls(levels=known[bits])] if bits in known else []

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(levels=(8, 5, 5, 5)), cls(levels=(3, 2, 4), bounded=True), cls(levels=(5, 4, 3, 2), bounded=True)]

    def example_inputs(self) -> list[Any]:
        import numpy as np

        rng = np.random.default_rng(0)
        shapes = ((1,), (7,), (3, 5), (2, 1, 3))
        return [rng.uniform(-1, 1, (*s, len(self.levels))).astype(np.float32) for s in shapes]

    @property
    def idempotent(self) -> bool:  # type: ignore[override]
        return self.bounded

    @property
    def codebook_size(self) -> int:
        """Number of codes: the product of the levels."""
        return math.prod(self.levels)

    @property
    def index_bits(self) -> int:
        """Bits of a stored index."""
        return index_bits(self.codebook_size)

    @functools.cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels, half width of the codes, half width of the bound, and the base of the mixed radix, each of d elements."""
        levels = torch.tensor(self.levels, dtype=torch.float32)
        base = torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))], dtype=torch.int64)
        return levels, (levels // 2), (levels - 1) / 2, base

    def bound(self, x: Any) -> float | None:
        # an even number of levels ends one step short of 1
        return max((0.5 if n % 2 else 1.0) / (n // 2) for n in self.levels) if self.bounded else None

    def digits(self, z: Tensor) -> Tensor:
        """Level number of each dimension, float 0 to L - 1; ``z``: float, ... x d."""
        levels, half, width, _ = self._table
        if self.bounded:
            return (z * half + half).round_().clamp_(torch.zeros(()), levels - 1)
        # the bound is a little wider than the levels, so that the outermost are reached; even numbers of levels sit half a
        # step off the centre
        wide = width + torch.clamp(width * 1e-3, max=0.4)
        offset = (levels % 2 == 0) * 0.5
        return (torch.tanh(z + torch.atanh(offset / wide)) * wide - offset).round_() + half

    def values_to_codes(self, values: Tensor) -> Tensor:
        """Indices, int64 of the leading shape, of quantized vectors in [-1, 1]; the exact inverse of :meth:`codes_to_values`."""
        levels, half, _, base = self._table
        digits = (values * half + half).round().clamp(torch.zeros(()), levels - 1)
        return (digits.long() * base).sum(-1)

    def codes_to_values(self, codes: Tensor) -> Tensor:
        """Quantized vectors, float32 ... x d in [-1, 1], of indices 0 to ``codebook_size`` - 1."""
        levels, half, _, base = self._table
        digits = (codes[..., None] // base) % levels.long()
        return (digits.float() - half) / half

    def layer(self, dim: int | None = None) -> FSQLayer:
        """The torch layer that trains. ``dim``: of the vectors where it is not the number of levels; two linear maps bridge it."""
        return FSQLayer(self, dim)

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        if x.shape[-1] != len(self.levels):
            raise InputError(
                f"fsq takes vectors of {len(self.levels)} dimensions, one for each of levels={self.levels}; given: {x.shape[-1]}"
            )
        if self.bounded and float(x.abs().max()) > 1:
            raise InputError(f"fsq with bounded=true takes vectors in [-1, 1]; given: up to {float(x.abs().max()):g}")
        base = self._table[3]
        codes = (self.digits(x).long() * base).sum(-1).reshape(-1)
        return {"codes": pack_indices(codes, self.index_bits)}

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        count = spec.size // len(self.levels)
        if spec.shape[-1] != len(self.levels):
            raise CorruptPayloadError(f"fsq: shape {spec.shape} has not vectors of {len(self.levels)} dimensions")
        codes = unpack_indices(parts["codes"], self.index_bits, count, self.codebook_size)
        return self.codes_to_values(codes).reshape(spec.shape)


class _Round(torch.autograd.Function):
    """Bound and round; the gradient passes the rounding straight through and knows the bound."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, shift: Tensor, wide: Tensor, offset: Tensor, half: Tensor) -> Tensor:  # type: ignore[override]
        squashed = torch.tanh(z + shift)
        ctx.save_for_backward(squashed, wide / half)
        return squashed.mul(wide).sub_(offset).round_().div_(half)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        squashed, slope = ctx.saved_tensors
        return torch.addcmul(grad, grad * squashed, squashed, value=-1).mul_(slope), None, None, None, None


class FSQLayer(VectorLayer):
    """``forward(z) -> Quantized(values, codes, loss)``: z float ... x dim; values of the same shape; codes int64 of the leading shape;
    loss 0, since there is nothing to add to the training loss.

    Training mode or not, the output is exactly what the codes stand for; gradients pass straight through the rounding.
    """

    shift: Tensor
    wide: Tensor
    offset: Tensor
    step: Tensor
    base: Tensor

    def __init__(self, fsq: FSQ, dim: int | None = None) -> None:
        d = len(fsq.levels)
        super().__init__("fsq", d if dim is None else dim, fsq.codebook_size)
        self.fsq = fsq
        self.project_in, self.project_out = bridge(self.dim, d), bridge(d, self.dim)
        self.invertible = self.dim >= d
        levels, half, width, base = fsq._table
        wide, offset = width + torch.clamp(width * 1e-3, max=0.4), (levels % 2 == 0) * 0.5
        for name, value in dict(shift=torch.atanh(offset / wide), wide=wide, offset=offset, step=half, base=base).items():
            self.register_buffer(name, value, persistent=False)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = _Round.apply(self.project_in(x), self.shift, self.wide, self.offset, self.step)
        with torch.no_grad():
            # digits are small whole numbers, so the sum is exact in float32 up to 2^24 codes
            exact = torch.float32 if self.fsq.codebook_size <= 1 << 24 else torch.float64
            weights = (self.step * self.base).to(exact)
            codes = (values.detach().to(exact) @ weights).add_(weights.sum()).round_().long()
        return self.project_out(values), codes, self.step.new_zeros(())

    def _values(self, codes: Tensor) -> Tensor:
        return self.project_out(self.fsq.codes_to_values(codes))  # type: ignore[no-any-return]

    def _codes(self, values: Tensor) -> Tensor:
        return self.fsq.values_to_codes(unbridge(self.project_out, values))
