"""Round to nearest, the baseline of quantization of weights and attention caches."""

from __future__ import annotations

from typing import Any

import torch

from tersor import Calibration, ConfigError, Quantizer, Spec, Uniform, between, field, method
from tersor_kit_weight_quant import CLIP_RATIOS, fit_grid, load, store


@method
class RTN(Quantizer):
    """Every weight goes to the nearest of 2^bits evenly spaced levels of its group; no data is used.

    Weights: float, out x in; a group is ``group_size`` consecutive inputs of one output, the last one of a row may be shorter.
    Attention caches: float, batch x heads x tokens x dim; groups lie along a token's vector (values), or along a channel's tokens
    (keys, whose outliers are channels, https://arxiv.org/abs/2402.02750); without ``domain`` an array is a weight. Levels reach from the least to the greatest weight of the group, 0 among them (``sym``: symmetric around 0, no zero point).
    With ``clip`` each group's range is shrunk by the one of 13 ratios from 1 to 0.4 that leaves the least squared error.
    Scales are stored in float16 with one power of two for the tensor, zero points and codes at ``bits`` bits: 4 bits in groups
    of 128 cost 4 + 20/128 bits a weight. Without ``clip`` and ``sym`` a weight is off by at most half a step.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity.
    """

    name = "rtn"
    domains = ("weight", "kv")
    native = "torch"

    bits: int = field(4, between(2, 8), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale; -1: a whole row")
    sym: bool = field(False, help="symmetric levels, without zero points")
    clip: bool = field(False, help="search the range of each group for the least squared error")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"rtn: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[RTN]:
        """For the conformance kit."""
        return [cls(), cls(bits=3, group_size=5, sym=True, clip=True)]

    @classmethod
    def at_bits(cls, bits: int) -> list[RTN]:
        """With the whole range of each group, and with the range searched."""
        return [cls(bits=bits), cls(bits=bits, clip=True)] if 2 <= bits <= 8 else []

    def bound(self, x: torch.Tensor) -> float | None:
        """Half a step of the widest possible group, an eighth more for the scale's own rounding; None with ``clip``."""
        x = torch.as_tensor(x)
        if self.clip or not x.numel():
            return None
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        reach = 2 * max(-low, high) if self.sym else high - low
        return reach * (0.625 / (2**self.bits - 1) + torch.finfo(x.dtype).eps) + 1e-38

    def _quantize(self, x: torch.Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        x = _rows(x, spec)
        grid = fit_grid(x, self.bits, self.group_size, self.sym, CLIP_RATIOS if self.clip else ())
        return store(grid, grid.quantize(x))

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        if spec.domain != "weight":
            return None
        grid, codes = load(parts, spec.shape, self.bits, self.group_size, self.sym)  # type: ignore[arg-type]
        return grid.uniform(codes)

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> torch.Tensor:
        rows = _rows(torch.empty(spec.shape, device="meta"), spec).shape
        grid, codes = load(parts, tuple(rows), self.bits, self.group_size, self.sym)  # type: ignore[arg-type]
        out = grid.dequantize(codes, getattr(torch, spec.dtype))
        if spec.domain != "key":
            return out.view(spec.shape)
        batch, heads, tokens, dim = spec.shape
        return out.view(batch, heads, dim, tokens).transpose(2, 3)


def _rows(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """A cache as the rows that groups lie in; a weight is rows already."""
    if spec.domain == "weight":
        return x
    return (x.transpose(2, 3) if spec.domain == "key" else x).reshape(-1, x.shape[2 if spec.domain == "key" else 3])
