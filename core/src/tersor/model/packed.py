"""Compressed linear layers that compute from integer codes with torch's own int4 and int8 kernels for CPUs.

A layer of :func:`tersor.model.compress_layers` decodes its weight whenever it is called, which is slower than the dense layer.
:func:`pack_layers` gives those whose weights are evenly spaced levels (:class:`tersor.Uniform`) what the kernels want: for a few
rows at a time they read a quarter or an eighth of the bytes. The kernels take bfloat16, so results have its precision (relative
rounding 2^-9 of activations, scales and outputs).
"""

from __future__ import annotations

from typing import Any

import torch

from tersor.errors import InputError
from tersor.model.modules import CompressedLayer, CompressedTensor
from tersor.results import Uniform

#: Rows of input up to which the kernels are used; more are multiplied with the decoded weight.
ROWS = 48
_GROUPS = (256, 128, 64, 32)  # what the int4 kernel takes


class Int4Kernel:
    """``out x in`` weights of up to 4 bits: two codes a byte, a scale and an offset (bfloat16) for each group of a row."""

    def __init__(self, uniform: Uniform) -> None:
        u, self.order = _in_order(uniform)
        columns = u.codes.shape[1]
        size = next((g for g in _GROUPS if columns % g == 0 and (u.group_size % g == 0 or u.group_size >= columns)), None)
        if size is None or u.bits > 4 or u.codes.shape[0] % 16:
            raise InputError(
                f"torch's int4 kernel takes up to 4 bits, a multiple of 16 rows and groups that consist of 32 columns or more; given: {u.bits} bits, "
                f"{u.codes.shape[0]} x {columns} in groups of {u.group_size}"
            )
        u = u.regrouped(size)
        middle = 2 ** (u.bits - 1)  # the kernel's value is (code - 8) * scale + offset: fewer bits go around 8, offsets are small
        offset = torch.zeros_like(u.scale) if u.zero is None else (middle - u.zero) * u.scale
        self.size = size
        self.scales = torch.stack([u.scale, offset], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u.codes.to(torch.int32) + (8 - middle), 2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.order is None else x.index_select(-1, self.order)
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, self.size, self.scales)
        return out


class Int8Kernel:
    """``out x in`` weights of up to 8 bits with one scale (float32) and zero point for each row."""

    def __init__(self, uniform: Uniform) -> None:
        u = uniform
        if u.index is not None or u.group_size < u.codes.shape[1]:
            raise InputError(
                f"torch's int8 kernel takes one scale a row; given: groups of {u.group_size} of {u.codes.shape[1]} columns"
            )
        if u.codes.shape[1] % 16:
            raise InputError(f"torch's int8 kernel takes a multiple of 16 columns; given: {u.codes.shape[1]}")
        middle = 2 ** (u.bits - 1)
        self.packed = (u.codes.to(torch.int16) - middle).to(torch.int8)
        self.scale = u.scale[:, 0].contiguous()
        self.shift = None if u.zero is None or bool((u.zero == middle).all()) else (middle - u.zero[:, 0]).contiguous()
        self.ones = torch.ones(u.codes.shape[0], dtype=torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch._weight_int8pack_mm(x.bfloat16(), self.packed, self.ones).float()
        if self.shift is not None:
            out = out + x.float().sum(-1, keepdim=True) * self.shift
        return out * self.scale


def _in_order(u: Uniform) -> tuple[Uniform, torch.Tensor | None]:
    """Levels whose groups are runs of columns, and the order of columns that makes them so (None: as it is)."""
    if u.index is None:
        return u, None
    order = u.index.argsort(stable=True)
    place = u.index[order]
    even = torch.arange(len(order), device=order.device) // u.group_size
    if not torch.equal(place, even):
        raise InputError(f"torch's int4 kernel takes groups of one size; given: groups of other sizes than {u.group_size}")
    return Uniform(u.codes[:, order], u.scale, u.zero, u.bits, u.group_size), order


def kernel_for(uniform: Uniform) -> Int4Kernel | Int8Kernel:
    """The kernel that computes with these levels. Raises :class:`tersor.InputError` that says why none does."""
    return Int4Kernel(uniform) if uniform.bits <= 4 else Int8Kernel(uniform)


def pack_layers(model: Any) -> dict[str, str]:
    """Let the compressed linear layers of a network compute with torch's int4 and int8 kernels, in place.

    ``model``: a network that :func:`tersor.model.compress_layers` or :func:`tersor.model.load_layers` made, on the CPU. Up to 48 rows go
    through the kernel; more rows, and inputs that want gradients, are multiplied with the decoded weight. A state dict stays what
    it was; beside it each layer holds its codes as the kernel wants them (half a byte a weight for int4).
    Returns the names of compressed linear layers to ``"int4"``, ``"int8"`` or the reason why there is no kernel for them.
    """
    out: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLayer) or not isinstance(layer, torch.nn.Linear):
            continue
        held = layer._modules.get("weight")
        if not isinstance(held, CompressedTensor):
            continue
        method = held.payload.method
        uniform = method.uniform(held.full()) if hasattr(method, "uniform") else None
        if uniform is None:
            out[name] = f"{method.name} has no evenly spaced levels"
            continue
        try:
            kernel = kernel_for(uniform)
        except InputError as error:
            out[name] = str(error)
            continue
        layer.__dict__["_kernel"] = kernel
        out[name] = "int4" if isinstance(kernel, Int4Kernel) else "int8"
    return out
