"""Layers whose matrix product is of integers: int8 rows of activations, an int8 matrix, sums in int32.

Rows of activations are rounded when they come (the largest magnitude of a row, or of all rows, becomes 127), multiplied with the
int8 matrix of the layer, and the sums are scaled back. On a CPU the product is oneDNN's, over a matrix that was laid out for it
once, with sums in int32. (``torch._int_mm``, which lays the matrix out in each call, takes up to ten times as long for few rows, and in
torch 2.13 gives wrong sums for a matrix of one column.) A processor without the instructions for it would saturate in 16 bits: the kernel is
tried once with the largest values there are, and where a sum is wrong, or the kernel is missing, the product is done in float32
over runs of columns so short that every sum is a whole number of at most 2^24.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

#: Largest magnitude of an activation's code: the grid is symmetric, -128 stays unused.
LARGEST = 127
_EXACT = 1024  # columns whose products of int8 sum up exactly in float32: 1024 * 128 * 128 = 2^24
_LONGEST = 1 << 16  # columns whose products sum up in int32, with room for kernels that shift one side to uint8


def absmax(x: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes by the largest magnitude: ``x`` is about ``codes * scale``, off by at most half a scale.

    ``x``: float32, rows x columns. Returns codes (int8, -127 to 127) and scale (float32, rows x 1; with ``whole`` 1 x 1, one for
    all rows). A row of zeros has the smallest normal number as its scale; of a row with NaN or infinity the scale is NaN or
    infinity, so that what is computed from it is NaN.
    """
    if not x.numel():
        return torch.zeros_like(x, dtype=torch.int8), torch.ones(1 if whole else x.shape[0], 1, device=x.device)
    size = x.abs()
    largest = size.amax().view(1, 1) if whole else size.amax(1, keepdim=True)
    scale = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.div(x, scale, out=size).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


class Int8Matrix:
    """An int8 matrix, out x in, ready for products with rows of int8. It keeps a copy in the layout of the machine's kernel."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self._laid_out: Any = None

    def __call__(self, codes: Tensor) -> Tensor:
        """``codes`` (int8, rows x in) times the transposed matrix: the exact sums, as float32 rows x out.

        Sums are made in int32 and rounded to float32 once (they are exact up to 2^24). Above 65,536 columns the sums of runs of
        so many columns are added up in float64.
        """
        columns = self.weight.shape[1]
        if columns <= _LONGEST:
            return self._product(codes)
        runs = [slice(i, i + _LONGEST) for i in range(0, columns, _LONGEST)]
        parts = [Int8Matrix(self.weight[:, run])._product(codes[:, run].contiguous()).double() for run in runs]
        return torch.stack(parts).sum(0).float()

    def _product(self, codes: Tensor) -> Tensor:
        if not codes.numel() or not self.weight.numel():
            return torch.zeros(codes.shape[0], self.weight.shape[0], device=codes.device)
        if codes.device.type == "cuda":
            return _padded(codes, self.weight).float()
        if codes.device.type != "cpu" or not kernel_is_exact():
            return in_float(codes, self.weight)
        if self._laid_out is None:
            rows = self.weight.shape[0]
            ones, zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)
            self._laid_out = torch.ops.onednn.qlinear_prepack(self.weight, None), ones, zeros
        return _onednn(codes, *self._laid_out)


def _onednn(codes: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    shifted = (
        codes.contiguous().view(torch.uint8).bitwise_xor(128)
    )  # + 128, which the kernel takes off again: its uint8 path is the fast one
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        shifted, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _padded(codes: Tensor, weight: Tensor) -> Tensor:
    """The product in int32 by ``torch._int_mm``, with zeros around both sides up to the sizes that its CUDA kernel takes."""
    rows, columns = codes.shape
    width, height = -columns % 8, -weight.shape[0] % 8
    codes = nn.functional.pad(codes, (0, width, 0, max(32 - rows, 0)))
    weight_ = nn.functional.pad(weight, (0, width, 0, height)) if width or height else weight
    return torch._int_mm(codes, weight_.T)[:rows, : weight.shape[0]]  # type: ignore[no-any-return]


def in_float(codes: Tensor, weight: Tensor) -> Tensor:
    """The same product out of float32 products over runs of 1024 columns, each of them exact, added up in int32."""
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], _EXACT):
        run = slice(start, start + _EXACT)
        total += (codes[:, run].float() @ weight[:, run].float().T).to(torch.int32)
    return total.float()


@functools.cache
def kernel_is_exact() -> bool:
    """Whether this machine has the int8 kernel, and it sums the largest products there are without saturation."""
    codes = torch.full((8, 512), 127, dtype=torch.int8)
    codes[1::2] = -127
    weight = torch.full((64, 512), 127, dtype=torch.int8)
    weight[::3] = -128
    true = (codes.long() @ weight.long().T).float()
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        found = _onednn(codes, packed, torch.ones(64), torch.zeros(64, dtype=torch.int32))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, true)


class Int8Linear(nn.Module):
    """y = (x8 W8') * scale of x * ``scale`` + bias: the frame of a layer that computes with integers.

    A method's layer keeps what its file holds as buffers, and says in :meth:`matrix` which int8 matrix they stand for. That is
    made when it is first needed, and again whenever a buffer has changed. ``scale``: float32, one for each row of the matrix, or a single one.
    ``whole``: one scale for all rows of activations of a call, not one for each.

    Input: float, ... x in, of any float type, which is that of the output, ... x out. Where gradients are wanted they pass the
    rounding straight through: that of x is what a dense layer with the values of :meth:`dense` gives.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bias: Tensor | None, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("scale", scale)
        known = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if known else nn.Parameter(bias))  # type: ignore[arg-type]
        self._made: tuple[list[Any], Int8Matrix] | None = None

    def matrix(self) -> Tensor:
        """The int8 matrix, out x in."""
        raise NotImplementedError(f"{type(self).__name__}.matrix")

    def integers(self) -> Int8Matrix:
        """The int8 matrix, ready for products."""
        now = [(b, 0 if b.is_inference() else b._version) for b in self._buffers.values() if b is not None]
        made = self._made
        if made is None or len(made[0]) != len(now) or any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(made[0], now)):
            with torch.no_grad():
                made = self._made = (now, Int8Matrix(self.matrix()))
        return made[1]

    def dense(self) -> Tensor:
        """The values that the layer multiplies with, float32, out x in."""
        return self.integers().weight.float() * self.scale[:, None]

    @property
    def weight(self) -> Tensor:
        """As :meth:`dense`."""
        return self.dense()

    def compute(self, x: Tensor) -> Tensor:
        """Float32 rows x in to float32 rows x out, without the bias."""
        codes, size = absmax(x, self.whole)
        return self.integers()(codes).mul_(size).mul_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        wanted = torch.is_grad_enabled() and rows.requires_grad
        y = _Straight.apply(rows, self) if wanted else self.compute(rows)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # copies make their own

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"


class _Straight(torch.autograd.Function):
    """The layer's product; its gradient is that of the product with the values that the integers stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.dense(), None
