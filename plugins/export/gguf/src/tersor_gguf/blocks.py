"""The block types of GGUF, written from levels: 32 consecutive weights of a row share a scale (ggml's ggml-common.h).

| type | value | bits a weight |
|---|---|---|
| Q4_0 | (q - 8) * d, q below 16 | 4.5 |
| Q4_1 | q * d + m, q below 16 | 5 |
| Q5_0 | (q - 16) * d, q below 32 | 5.5 |
| Q5_1 | q * d + m, q below 32 | 6 |
| Q8_0 | q * d, q from -128 to 127 | 8.5 |

d and m are float16. The low half of a byte is one of the first 16 weights of a block, the high half one of the last 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from tersor import ExportError, Uniform

BLOCK = 32
Array = np.ndarray[Any, Any]


def from_levels(u: Uniform) -> tuple[Type, Array]:
    """The smallest type that holds a quantized matrix exactly, and its bytes, rows x bytes of a row.

    :class:`tersor.ExportError` where no type does, saying what stands against it.
    """
    codes, group = u.codes.numpy().astype(np.int16), _blocks(u)
    scale = u.scale.numpy()[:, group]
    zero = np.full(scale.shape, 2.0 ** (u.bits - 1), np.float32) if u.zero is None else u.zero.numpy()[:, group]
    if (zero != np.rint(zero)).any():
        raise ExportError("its zero points are no whole numbers")
    with np.errstate(over="ignore"):
        d, m = scale.astype(np.float16), (-zero * scale).astype(np.float16)
    if (d.astype(np.float32) != scale).any():
        raise ExportError("its scales are not exact in float16, which all block types have")
    minimum = bool((m.astype(np.float32) == -zero * scale).all())  # the least level is exact
    level = codes - zero.astype(np.int16).repeat(BLOCK, 1)
    low, high = (int(level.min()), int(level.max())) if level.size else (0, 0)
    if low >= -8 and high <= 7:
        return Type.Q4_0, _join(d, None, level + 8, 4)
    if u.bits <= 4 and minimum:
        return Type.Q4_1, _join(d, m, codes, 4)
    if low >= -16 and high <= 15:
        return Type.Q5_0, _join(d, None, level + 16, 5)
    if u.bits <= 5 and minimum:
        return Type.Q5_1, _join(d, m, codes, 5)
    if low >= -128 and high <= 127:
        rows = level.reshape(len(level), -1, BLOCK).astype(np.int8).view(np.uint8)
        return Type.Q8_0, np.concatenate([d[..., None].view(np.uint8), rows], 2).reshape(len(level), -1)
    raise ExportError("its levels lie farther than 128 steps from 0, which no block type holds; at 8 bits take symmetric levels")


def _blocks(u: Uniform) -> Array:
    """The group of each block of 32 columns."""
    columns = u.codes.shape[1]
    if columns % BLOCK:
        raise ExportError(f"its rows of {columns} weights are no whole blocks of {BLOCK}")
    group = np.arange(columns) // u.group_size if u.index is None else u.index.numpy()
    if u.scale.shape[1] == 1:
        group = np.zeros(columns, np.int64)
    group = group.reshape(-1, BLOCK)
    if (group != group[:, :1]).any():
        if u.index is not None:
            raise ExportError(
                "its groups are in the order of activations, and blocks are in the order of the weights; "
                "compress with groups in the layout of the weights (gptq: static_groups=true, or act_order=false)"
            )
        raise ExportError(f"its groups of {u.group_size} weights are no whole blocks of {BLOCK}")
    return group[:, 0]


def _join(d: Array, m: Array | None, q: Array, bits: int) -> Array:
    """Scale, least level, fifth bits, low four bits: the blocks of each row, one after another."""
    q = q.reshape(len(q), -1, BLOCK).astype(np.uint8)
    parts = [d[..., None].view(np.uint8)]
    if m is not None:
        parts.append(m[..., None].view(np.uint8))
    if bits == 5:
        parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
    parts.append(q[..., :16] & 15 | (q[..., 16:] & 15) << 4)
    return np.concatenate(parts, 2).reshape(len(q), -1)


def from_floats(x: Array) -> tuple[Type, Array]:
    """Plain numbers in the smallest type that gives exactly them back: Q8_0 (for matrices), F16, BF16 or F32. Vectors are F32,
    as llama.cpp wants them. ``x``: float32."""
    for kind in (Type.Q8_0, Type.F16, Type.BF16) if x.ndim > 1 else ():
        if kind is Type.Q8_0 and x.shape[-1] % BLOCK:
            continue
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            raw = quants.quantize(x, kind)
            same = np.array_equal(quants.dequantize(raw, kind), x)
        if same:
            return kind, raw
    return Type.F32, x
