"""Dense bit packing: a stream of ``bits``-bit codes, least significant bit first, eight codes in ``bits`` bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: the last byte is padded with zeros, nothing else is."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as a dense bit stream.

    ``codes``: uint8, any shape, values below 2^bits (not checked); read in row-major order. ``bits``: 1 to 8.
    Returns uint8, 1-D, ``packed_size(codes.numel(), bits)`` long: code i fills the bits i * bits ... (i + 1) * bits - 1, bit b
    being bit b % 8 of byte b // 8. Raises ValueError for other bits, TypeError for another dtype.
    """
    _check(codes, bits)
    codes = codes.reshape(-1)
    if bits == 8:
        return codes
    count = codes.numel()
    if count % 8:
        codes = torch.cat([codes, codes.new_zeros(-count % 8)])
    octets = codes.view(-1, 8)
    out = torch.empty(octets.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        parts = [_shift(octets[:, j], bits * j - 8 * byte) for j in range(8) if -bits < bits * j - 8 * byte < 8]
        torch.bitwise_or(parts[0], parts[1], out=out[:, byte])
        for part in parts[2:]:
            out[:, byte] |= part
    return out.view(-1)[: packed_size(count, bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: ``count`` codes as 1-D uint8. Raises ValueError where ``packed`` has another length."""
    _check(packed, bits)
    if packed.dim() != 1 or packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits are {packed_size(count, bits)} bytes; given: a tensor of shape {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed
    if packed.numel() % bits:
        packed = torch.cat([packed, packed.new_zeros(-packed.numel() % bits)])
    rows = packed.view(-1, bits)
    out = torch.empty(rows.shape[0], 8, dtype=torch.uint8, device=packed.device)
    for j in range(8):
        byte, shift = divmod(bits * j, 8)
        code = rows[:, byte] >> shift
        if shift + bits > 8:
            code = code | rows[:, byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=out[:, j])
    return out.view(-1)[:count]


def _shift(x: Tensor, by: int) -> Tensor:
    return x << by if by >= 0 else x >> -by


def _check(x: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not allowed; allowed: 1 to 8")
    if x.dtype != torch.uint8:
        raise TypeError(f"codes are torch.uint8; given: {x.dtype}")
