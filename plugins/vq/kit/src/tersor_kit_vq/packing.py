"""Indices of a fixed number of bits as bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tersor import CorruptPayloadError


def index_bits(size: int) -> int:
    """Bits of an index of a codebook of ``size`` codewords: ceil(log2 size), at least 1."""
    return max(1, (size - 1).bit_length())


def pack_indices(codes: Tensor, bits: int) -> Tensor:
    """Indices 0 to 2**bits - 1, any shape, of up to 32 bits, most significant bit first, as uint8."""
    width = (bits + 7) // 8
    raw = codes.reshape(-1).cpu().numpy().astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - width :]
    if bits % 8 == 0:
        return torch.from_numpy(np.ascontiguousarray(raw).reshape(-1))
    rows = np.unpackbits(raw, axis=1)[:, 8 * width - bits :]
    return torch.from_numpy(np.packbits(rows))


def unpack_indices(packed: Tensor, bits: int, count: int, size: int) -> Tensor:
    """``count`` indices, int64, of :func:`pack_indices`. ``size``: of the codebook.

    Raises :class:`tersor.CorruptPayloadError` for another number of bytes, or an index that the codebook does not have.
    """
    if packed.dtype != torch.uint8 or packed.numel() != (count * bits + 7) // 8:
        raise CorruptPayloadError(f"{packed.numel()} bytes of indices are not {count} indices of {bits} bits")
    out = np.empty(count, np.int64)
    data = packed.reshape(-1).numpy()
    step = 1 << 20  # indices at a time, a whole number of bytes, so that little memory is needed beside the result
    for start in range(0, count, step):
        n = min(step, count - start)
        rows = np.unpackbits(data[start * bits // 8 :], count=n * bits).reshape(n, bits)
        wide = np.zeros((n, 32), np.uint8)
        wide[:, 32 - bits :] = rows
        out[start : start + n] = np.packbits(wide, axis=1).view(">u4").reshape(-1)
    if count and int(out.max()) >= size:
        raise CorruptPayloadError(f"index {int(out.max())} of {size} codes")
    return torch.from_numpy(out)


def _words(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of indices, first and last + 1, each of which is one number below 2^31."""
    out, start, product = [], 0, 1
    for i, n in enumerate(sizes):
        if i > start and product * n > 1 << 31:
            out.append((start, i))
            start, product = i, 1
        product *= n
    return [*out, (start, len(sizes))]


def join(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Several indices as one number, int64, the last index counting least: ... x n codes below ``sizes``, with product up to 2^63."""
    out = codes[..., 0]
    for i in range(1, len(sizes)):
        out = out * sizes[i] + codes[..., i]
    return out


def split(joined: Tensor, sizes: Sequence[int]) -> Tensor:
    """The indices, int64 ... x n, that :func:`join` made ``joined`` of."""
    out = []
    for n in reversed(sizes):
        out.append(joined % n)
        joined = joined // n
    return torch.stack(out[::-1], -1)


def pack_mixed(codes: Tensor, sizes: int | Sequence[int]) -> Tensor:
    """Codes of vectors as uint8: int64 N below ``sizes``, or N x n below each of the n ``sizes``. Indices of one vector share bits
    where their sizes are no powers of two: 9 of 10 values take 30 bits."""
    if isinstance(sizes, int):
        return pack_indices(codes, index_bits(sizes))
    parts = []
    for start, stop in _words(sizes):
        own = sizes[start:stop]
        parts.append(pack_indices(join(codes[:, start:stop], own), index_bits(math.prod(own))))
    return torch.cat(parts)


def unpack_mixed(packed: Tensor, sizes: int | Sequence[int], count: int) -> Tensor:
    """The codes, int64 ``count`` or ``count`` x n, of :func:`pack_mixed`. Raises :class:`tersor.CorruptPayloadError` for others."""
    if isinstance(sizes, int):
        return unpack_indices(packed, index_bits(sizes), count, sizes)
    words = _words(sizes)
    bits = [index_bits(math.prod(sizes[start:stop])) for start, stop in words]
    lengths = [(count * b + 7) // 8 for b in bits]
    if packed.dtype != torch.uint8 or packed.numel() != sum(lengths):
        raise CorruptPayloadError(f"{packed.numel()} bytes of codes are not those of {count} vectors, which have {sum(lengths)}")
    out = []
    for (start, stop), b, part in zip(words, bits, packed.reshape(-1).split(lengths), strict=True):
        own = sizes[start:stop]
        out.append(split(unpack_indices(part, b, count, math.prod(own)), own))
    return torch.cat(out, 1)
