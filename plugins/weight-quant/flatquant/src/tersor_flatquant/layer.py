"""What FlatQuant computes with: linear layers with integer products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tersor import Spec
from tersor_flatquant.rounding import asymmetric, reach
from tersor_flatquant.transforms import Stored, matrix
from tersor_kit_weight_quant import load


class FlatLinear(nn.Module):
    """x -> x D P, each token rounded to ``act_bits``, times the codes of the weight (section 3.3).

    On the CPU codes and rounded inputs are multiplied as int8 with int32 sums. The parts of the file are buffers and are never cast;
    the codes are unpacked, a byte each, when the layer is first called.
    """

    def __init__(self, method: Any, parts: dict[str, Any], spec: Spec, bias: Any) -> None:
        super().__init__()
        self.method, self.spec = method, spec
        self.out_features, self.in_features = spec.shape
        self.bias = bias
        self.scalars = {k: v for k, v in parts.items() if not isinstance(v, Tensor)}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone())
        if method.act_bits < 16 and not 0 < float(self.scalars["clip"]) <= 1:
            raise ValueError(f"clip: {self.scalars['clip']}, where a number from 0 to 1 fits")
        if ("key" in parts or "value" in parts) and not all(0 < float(c) <= 1 for c in self.scalars["cache"]):
            raise ValueError(f"cache: {self.scalars['cache']}, where two numbers from 0 to 1 fit")
        load(parts, spec.shape, method.bits, -1, True)  # type: ignore[arg-type]
        self._ready: tuple[Any, ...] | None = None

    def _parts(self) -> dict[str, Any]:
        return {**self.scalars, **{k: v for k, v in self._buffers.items() if v is not None}}

    @torch.no_grad()
    def _prepare(self) -> tuple[Any, ...]:
        """The transform, the codes less their middle (int8 out x in), the scales (float32 out), and the heads' matrices."""
        if self._ready is None:
            m, parts = self.method, self._parts()
            grid, codes = load(parts, self.spec.shape, m.bits, -1, True)  # type: ignore[arg-type]
            levels = (codes.to(torch.int16) - 2 ** (m.bits - 1)).to(torch.int8)
            scale = grid.scale.float()[:, 0] * math.ldexp(1.0, grid.exponent)
            heads = next((parts[k] for k in ("key", "value") if k in parts), None)
            both = None
            if heads is not None:
                there = matrix(heads)
                both = there, torch.linalg.inv(there.double()).float()
            self._ready = Stored(parts, self.in_features, m.transform, m.seed), levels, scale, both
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """``x``: float ... x in. Gives ... x out, in the same element type."""
        transform, levels, scale, both = self._prepare()
        flat = transform.forward(x.float().reshape(-1, self.in_features))
        bits = self.method.act_bits
        if bits < 16:
            top = 2 ** (bits - 1) - 1
            step = reach(flat) * (self.scalars["clip"] / top)
            level = (flat / step).round_().clamp_(-top - 1, top)
            if flat.is_cpu:
                y = torch._int_mm(level.to(torch.int8), levels.T).float()
            else:
                y = level @ levels.T.float()
            y = y * scale * step
        else:
            y = flat @ (levels.float() * scale[:, None]).T
        if "value" in self._buffers:
            y = (y.unflatten(-1, (-1, len(both[1]))) @ both[1]).flatten(-2)
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def cached(self, x: Tensor) -> Tensor:
        """Keys after the rotary embedding, or values (batch x heads x tokens x dim), as a cache of ``kv_bits`` gives them back."""
        both = self._prepare()[3]
        if both is None:
            return x
        clip = torch.tensor(self.scalars["cache"], device=x.device)
        return (asymmetric(x.float() @ both[0], self.method.kv_bits, clip) @ both[1]).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> FlatLinear:
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[name] = moved if moved.dtype == value.dtype else value.to(moved.device)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), self.bias.requires_grad)
        self._ready = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None

    def extra_repr(self) -> str:
        return f"{self.method}, in_features={self.in_features}, out_features={self.out_features}"
