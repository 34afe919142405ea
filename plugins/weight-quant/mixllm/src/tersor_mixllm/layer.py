"""The layer of MixLLM: integer products of 8-bit activations with rows of two bit widths (arXiv 2412.14590).

Two-step dequantization. A weight is (code - zero) * scale. The first step takes the zero point off, which gives a small integer: 4-bit
and 8-bit rows are then one int8 matrix. Each group of columns is multiplied with its 8-bit activations, with sums in int32. The second
step multiplies these sums by the group's scale of the row and by the scale of the activations, and adds up the groups in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersor_kit_weight_quant.int8 import Int8Matrix, absmax

if TYPE_CHECKING:
    from tersor import Spec
    from tersor_mixllm.mixllm import MixLLM


class MixedLinear(nn.Module):
    """y = sum over groups of ((x8 (codes - zero)') * scale of x * scale) + bias. Holds the parts of the file as buffers.

    Each token's activations have one symmetric 8-bit scale for each group of columns (128). Input: float, ... x in, of any float type,
    which is that of the output, ... x out. Gradients pass the rounding of the activations straight through. The integers are made from
    the parts when they are first needed, and again whenever a buffer has changed.
    """

    def __init__(self, parts: dict[str, Any], spec: Spec, method: MixLLM, bias: Tensor | None) -> None:
        super().__init__()
        self.spec, self.method = spec, method
        self.meta = {name: value for name, value in parts.items() if not isinstance(value, Tensor)}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone())
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias))
        self._made: tuple[list[Any], list[Int8Matrix], Tensor] | None = None

    def integers(self) -> tuple[list[Int8Matrix], Tensor]:
        """The int8 matrix of each group of columns (the first step), and the scales, float32, out x groups."""
        now = [(b, 0 if b.is_inference() else b._version) for b in self.buffers()]
        made = self._made
        if made is None or any(a is not b or v != w for (a, v), (b, w) in zip(made[0], now, strict=True)):
            with torch.no_grad():
                self._made = made = (now, *self._build())
        return made[1], made[2]

    def _build(self) -> tuple[list[Int8Matrix], Tensor]:
        rows, columns = self.spec.shape
        size = self.method._size(columns)
        runs = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
        device = next(self.buffers()).device
        whole = torch.empty(rows, columns, dtype=torch.int8, device=device)
        scale = torch.empty(rows, len(runs), device=device)
        for mask, grid, codes in self.method._load({**self.meta, **dict(self.named_buffers())}, self.spec):
            scale[mask] = grid.scale.float() * math.ldexp(1.0, grid.exponent)
            levels = codes.short()
            for g, run in enumerate(runs):
                levels[:, run] -= 2 ** (grid.bits - 1) if grid.zero is None else grid.zero[:, g : g + 1].short()
            whole[mask] = levels.to(torch.int8)
        return [Int8Matrix(whole[:, run]) for run in runs], scale

    @property
    def weight(self) -> Tensor:
        """The values of the weights, float32, out x in."""
        integers, scale = self.integers()
        return torch.cat([m.weight.float() * scale[:, g : g + 1] for g, m in enumerate(integers)], 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._compute(rows.detach())
        if torch.is_grad_enabled() and rows.requires_grad:
            smooth = rows @ self.weight.T
            y = smooth + (y - smooth).detach()
        y = y.view(*x.shape[:-1], y.shape[-1])
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _compute(self, x: Tensor) -> Tensor:
        integers, scale = self.integers()
        y = torch.zeros(len(x), len(scale), device=x.device)
        for g, run in enumerate(x.split(self.method._size(x.shape[1]), 1)):
            codes, size = absmax(run)
            y += integers[g](codes).mul_(size).mul_(scale[:, g])  # the second step
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> MixedLinear:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in before.items():  # parts move, but are never cast
            if self._buffers[name].dtype != value.dtype:  # type: ignore[union-attr]
                self._buffers[name] = value.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # copies make their own

    def extra_repr(self) -> str:
        rows, columns = self.spec.shape
        return f"in={columns}, out={rows}, bias={self.bias is not None}, {self.method}"
