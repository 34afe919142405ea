"""Single weights that a method keeps beside its codes, as in compressed sparse rows, everything bit-packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tersor_kit_weight_quant.packing import pack, packed_size, unpack


def store_sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """Elements of a matrix as parts of a file; the opposite of :func:`load_sparse`.

    ``rows``, ``columns``: int64, in row-major order. ``values``: float16. Parts: ``kept_counts``, the number in each row;
    ``kept_columns``, in as few bits as the width needs; ``kept_values``. Without any element there are no parts.
    """
    if not len(rows):
        return {}
    counts = torch.bincount(rows, minlength=shape[0])
    return {
        "kept_counts": pack_wide(counts, int(counts.max()).bit_length()),
        "kept_columns": pack_wide(columns, _width(shape[1])),
        "kept_values": values,
        "kept_most": int(counts.max()),
    }


def load_sparse(parts: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns (int64) and values (float16) that :func:`store_sparse` made parts of.

    Raises KeyError, TypeError or ValueError where the parts do not fit the shape.
    """
    if "kept_values" not in parts:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float16)
    values, most = parts["kept_values"], parts["kept_most"]
    if type(most) is not int or not 0 < most <= shape[1]:
        raise ValueError(f"kept_most: {most!r}, where an integer from 1 to {shape[1]} fits")
    counts = unpack_wide(parts["kept_counts"], most.bit_length(), shape[0])
    if values.dtype != torch.float16 or values.dim() != 1 or int(counts.sum()) != len(values):
        raise ValueError(f"kept_values: {values.dtype} {tuple(values.shape)}, where float16 of {int(counts.sum())} values fits")
    columns = unpack_wide(parts["kept_columns"], _width(shape[1]), len(values))
    if len(values) and int(columns.max()) >= shape[1]:
        raise ValueError(f"kept_columns: a column {int(columns.max())} of {shape[1]}")
    return torch.repeat_interleave(torch.arange(shape[0], device=counts.device), counts), columns, values


def _width(columns: int) -> int:
    """Bits that the number of a column takes."""
    return max(columns - 1, 1).bit_length()


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits (int64; not checked), 1 to 32 bits, as a dense stream: their lowest bytes, then the next, and so on."""
    return torch.cat([pack((codes >> low & 255).to(torch.uint8).reshape(-1), min(8, bits - low)) for low in range(0, bits, 8)])


def unpack_wide(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_wide`: ``count`` numbers, int64. Raises ValueError where ``packed`` has another length."""
    sizes = [packed_size(count, min(8, bits - low)) for low in range(0, bits, 8)]
    if packed.dim() != 1 or packed.numel() != sum(sizes):
        raise ValueError(f"{count} numbers of {bits} bits are {sum(sizes)} bytes; given: a tensor of shape {tuple(packed.shape)}")
    out = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for i, plane in enumerate(packed.split(sizes)):
        out |= unpack(plane, min(8, bits - 8 * i), count).long() << 8 * i
    return out
