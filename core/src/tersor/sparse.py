"""Masks on disk: the gaps between kept elements in Rice code, which is within a few per cent of the entropy of a random mask.

Both directions are numpy over whole arrays. The rarer value (kept or dropped) is the one whose places are coded.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tersor.arrays import to_numpy
from tersor.errors import CorruptPayloadError


def pack_mask(mask: Any) -> bytes:
    """A boolean array of any shape as bytes: ``rarer value u8, Rice parameter u8, count u64``, remainders, then unary quotients."""
    flat = to_numpy(mask).reshape(-1).astype(bool)
    rare = bool(flat.sum() * 2 <= flat.size)
    places = np.flatnonzero(flat == rare)
    gaps = np.diff(places, prepend=-1) - 1
    mean = float(gaps.mean()) if gaps.size else 0.0
    # the best parameter for geometric gaps of this mean (Golomb: 2^k near mean * ln 2)
    k = max(0, int(np.ceil(np.log2(max(mean, 1e-9) * 0.6931 + 1e-9)))) if mean > 1 else 0
    best = min({max(k - 1, 0), k}, key=lambda j: int((gaps >> j).sum()) + gaps.size * (1 + j))
    low = (gaps[:, None] >> np.arange(best)) & 1 if best else np.zeros((gaps.size, 0), np.int64)
    ends = np.cumsum((gaps >> best) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if ends.size else 0, bool)
    unary[ends] = True
    return struct.pack("<BBQ", rare, best, gaps.size) + np.packbits(low.astype(bool)).tobytes() + np.packbits(unary).tobytes()


def unpack_mask(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The boolean array that :func:`pack_mask` was given; :class:`tersor.CorruptPayloadError` where the bytes do not fit the shape."""
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) < 10:
        raise CorruptPayloadError(f"a mask of {len(raw)} bytes; a mask has at least 10")
    rare, k, count = struct.unpack("<BBQ", raw[:10])
    if rare > 1 or k > 40 or count > size:
        raise CorruptPayloadError(f"a mask of {count} places with parameter {k} does not fit {size} elements")
    split = 10 + (count * k + 7) // 8
    bits = np.unpackbits(np.frombuffer(raw[10:split], np.uint8))[: count * k]
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(raw[split:], np.uint8)))
    if bits.size != count * k or ends.size != count:
        raise CorruptPayloadError(f"a mask of {count} places ends early or late")
    low = (bits.reshape(count, k).astype(np.int64) << np.arange(k)).sum(1) if k else np.zeros(count, np.int64)
    gaps = ((np.diff(ends, prepend=-1) - 1) << k) + low
    places = np.cumsum(gaps + 1) - 1
    if count and (places[-1] >= size or gaps.min() < 0):
        raise CorruptPayloadError(f"a mask with a place at {int(places[-1])} does not fit {size} elements")
    out = np.full(size, not rare)
    out[places] = bool(rare)
    return out.reshape(shape)
