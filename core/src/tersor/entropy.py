"""Entropy coding for methods: integer symbols to bytes and back, over the library constriction (asymmetric numeral systems).

Everything that drives the coder is an integer computed with exact operations, so a stream decodes to the same symbols on every
machine. Needs ``pip install tersor[entropy]``; without it each function raises :class:`tersor.MissingLibraryError`.

=====================================  ===============================================================================
:func:`encode`, :func:`decode`         one :class:`Table` of integer weights, known to both sides
:func:`pack`, :func:`unpack`           self-contained: any integers, the table is found and stored in a few bytes
:func:`encode_gaussian`, its inverse   a mean and a standard deviation for each symbol, known to both sides
=====================================  ===============================================================================

Symbols are numpy arrays or torch tensors of any shape and integer type, and are coded in C order; what comes back is a numpy
array. Streams are ``bytes`` (decoders also take uint8 arrays and tensors) and end with 16 bits of a hash: a changed or cut stream
raises :class:`tersor.CorruptPayloadError`, but for about one in 2**16 that passes, so this does not replace the checksum of the
file. Decoding takes time and memory in proportion to the number of symbols asked for, whatever the stream says; more than
:func:`tersor.container.decoded_limit` is :class:`tersor.LimitError`.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import xxhash

from tersor.arrays import to_numpy
from tersor.container import decoded_limit
from tersor.errors import CorruptPayloadError, InputError, LimitError, MissingLibraryError

PRECISION = 24  # bits of constriction's fixed point: the integer probabilities of one table sum to 2**24
MAX_SYMBOLS = 1 << 20  # of one table
_TOTAL = 1 << PRECISION


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise MissingLibraryError(
            "entropy coding needs constriction, which is not installed: pip install tersor[entropy]"
        ) from error


@functools.cache
def _uniform(size: int) -> Any:
    return _library().model.Uniform(size)


def _fixed_point(counts: np.ndarray) -> np.ndarray:
    """Probabilities in units of 2**-24, each at least 1, that sum to 2**24; ``counts``: int64 n, not negative, not all zero.

    Integer arithmetic only: 1, and a share of the remaining 2**24 - n by the difference of the rounded-down cumulated counts.
    """
    room = _TOTAL - counts.size
    # so that no product below is beyond 63 bits
    counts = counts >> max(0, int(counts.max()).bit_length() - 38)
    counts = counts >> max(0, int(counts.sum()).bit_length() - 38)
    ends = counts.cumsum()
    return np.diff(ends * room // ends[-1], prepend=0) + 1


class Table:
    """A table of integer weights for :func:`encode` and :func:`decode`; symbol ``offset + i`` has the weight ``counts[i]``.

    ``counts``: integers, 1-D, 1 to 2**20 of them, 0 to 2**62 each. A symbol of weight 0 can still be coded, at 24 bits.
    ``probabilities``: int64, what the coder uses, in units of 2**-24.
    Raises :class:`tersor.InputError` for anything else.
    """

    def __init__(self, counts: Any, offset: int = 0) -> None:
        array = to_numpy(counts)
        if array.ndim != 1 or not 1 <= array.size <= MAX_SYMBOLS or array.dtype.kind not in "iu":
            raise InputError(
                f"a table of 1 to {MAX_SYMBOLS} integer weights is needed; given: {array.dtype} of shape {array.shape}"
            )
        if int(array.min()) < 0 or int(array.max()) > 1 << 62:
            raise InputError(f"weights are 0 to 2**62; given: {array.min()} to {array.max()}")
        array = array.astype(np.int64)
        self.offset = int(offset)
        self.probabilities = _fixed_point(array if array.any() else np.ones_like(array))

    @functools.cached_property
    def _model(self) -> Any:
        return _model(self.probabilities) if self.probabilities.size > 1 else None

    def __len__(self) -> int:
        return self.probabilities.size

    def bits(self, symbols: Any) -> float:
        """The ideal length of ``symbols`` under this table, in bits."""
        used = np.bincount(to_numpy(symbols).reshape(-1).astype(np.int64) - self.offset, minlength=len(self))
        return float(used @ (PRECISION - np.log2(self.probabilities)))


def _model(probabilities: np.ndarray) -> Any:
    """constriction's model of these integers. It adds 1 to each weight that it is given and scales them by room over their sum,
    which here is exactly 1: whole numbers below 2**24 are exact in float32, in any order of summation."""
    return _library().model.Categorical((probabilities - 1).astype(np.float32), perfect=False)


def _flat(symbols: Any, offset: int) -> np.ndarray:
    """Symbols as contiguous int32, ``offset`` taken away; what does not fit becomes -1 (which no table has)."""
    x = to_numpy(symbols)
    if x.dtype.kind not in "iub":
        raise InputError(f"symbols are integers; given: {x.dtype}")
    x = x.reshape(-1)
    if x.dtype == np.int32 and offset == 0:
        return np.ascontiguousarray(x)
    if x.dtype.itemsize < 4 and abs(offset) < 1 << 30:
        out = x.astype(np.int32)
        return np.subtract(out, np.int32(offset), out=out) if offset else out
    if x.size == 0:
        return np.empty(0, np.int32)
    if int(x.min()) - offset >= -(1 << 31) and int(x.max()) - offset < 1 << 31 and abs(offset) < 1 << 62:
        return (x.astype(np.int64) - offset).astype(np.int32)
    return np.full(x.size, -1, np.int32)


class _Writer:
    """The coder as a stack: what is pushed last is read first."""

    def __init__(self) -> None:
        self.coder = _library().stack.AnsCoder()

    def push(self, symbols: np.ndarray, model: Any) -> None:
        self.coder.encode_reverse(symbols, model)

    def push_raw(self, values: np.ndarray, bits: int) -> None:
        """uint64 values below 2**bits, at ``bits`` bits each."""
        for shift in range(0, bits, 16):
            size = 1 << min(16, bits - shift)
            self.push(((values >> np.uint64(shift)) & np.uint64(size - 1)).astype(np.int32), _uniform(size))

    def finish(self, count: int, head: bytes = b"") -> bytes:
        """``head`` and the stream of ``count`` symbols, sealed."""
        return _seal(count, head + self.coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


class _Reader:
    def __init__(self, raw: bytes) -> None:
        if raw.endswith(b"\0"):
            raise CorruptPayloadError("the stream ends with a zero")
        self.coder = _library().stack.AnsCoder(np.frombuffer(raw + b"\0" * (-len(raw) % 4), "<u4").astype(np.uint32))

    def pull(self, model: Any, count: int) -> np.ndarray:
        return self.coder.decode(model, count)

    def pull_raw(self, count: int, bits: int) -> np.ndarray:
        out = np.zeros(count, np.uint64)
        for shift in reversed(range(0, bits, 16)):
            out |= self.pull(_uniform(1 << min(16, bits - shift)), count).astype(np.uint64) << np.uint64(shift)
        return out

    def finish(self) -> None:
        if not self.coder.is_empty():
            raise CorruptPayloadError("the stream does not end where its symbols do: it was written with another table")


def _seal(count: int, raw: bytes) -> bytes:
    """``raw`` and two bytes of the hash of it and of the number of symbols, which it does not hold itself."""
    return raw + xxhash.xxh3_64_digest(raw, seed=count)[:2]


def _unseal(count: int, data: Any) -> bytes:
    if isinstance(data, (bytes, bytearray, memoryview)):
        raw = bytes(data)
    else:
        array = to_numpy(data)
        if array.dtype != np.uint8:
            raise InputError(f"a stream is bytes or uint8; given: {array.dtype}")
        raw = array.tobytes()
    if len(raw) < 2 or _seal(count, raw[:-2]) != raw:
        raise CorruptPayloadError(f"the stream of {len(raw)} bytes is damaged, or does not hold {count} symbols")
    return raw[:-2]


def _count(shape: int | tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise InputError(f"a shape has no negative sizes; given: {shape}")
    if 8 * count > decoded_limit():
        raise LimitError(f"{count} symbols take more than the limit of {decoded_limit()} bytes (TERSOR_MAX_DECODED)")
    return shape, count


def _nothing(data: Any) -> None:
    if len(data):
        raise CorruptPayloadError(f"a stream of {len(data)} bytes where none are needed")


def _table(table: Any) -> Table:
    return table if isinstance(table, Table) else Table(table)


def encode(symbols: Any, table: Any) -> bytes:
    """``symbols`` under one shared table, a :class:`Table` or its weights. The decoder needs the same table and the shape.

    Raises :class:`tersor.InputError` for symbols that the table does not have.
    """
    t = _table(table)
    x = _flat(symbols, t.offset)
    if x.size == 0 or len(t) == 1:
        if x.any():
            raise _outside(symbols, t)
        return b""
    out = _Writer()
    try:
        out.push(x, t._model)
    except KeyError:
        raise _outside(symbols, t) from None
    return out.finish(x.size)


def _outside(symbols: Any, t: Table) -> InputError:
    x = to_numpy(symbols)
    return InputError(f"the table has the symbols {t.offset} to {t.offset + len(t) - 1}; given: {x.min()} to {x.max()}")


def decode(data: Any, table: Any, shape: int | tuple[int, ...]) -> np.ndarray:
    """The symbols of :func:`encode`, int32 of ``shape`` (int64 where the table's offset is beyond int32).

    Raises :class:`tersor.CorruptPayloadError`, :class:`tersor.LimitError`.
    """
    t = _table(table)
    shape, count = _count(shape)
    small = abs(t.offset) < 1 << 30
    if count == 0 or len(t) == 1:
        _nothing(data)
        return np.full(shape, t.offset, np.int32 if small else np.int64)
    reader = _Reader(_unseal(count, data))
    out = reader.pull(t._model, count)
    reader.finish()
    if t.offset and small:
        out += np.int32(t.offset)
    return (out if small else out.astype(np.int64) + t.offset).reshape(shape)


# --- self-contained -----------------------------------------------------------------------------------------------------------

_DENSE = 1 << 16  # a range of values up to this has a table with an entry for each value
_MANTISSA = 8  # bits of larger values that are modelled, below the leading one
#: Chances, of 4096, that an entry of a stored table is of the same size class as the one before.
_SAME = (1024, 2048, 3072, 3584, 3968, 4064, 4090, 4095)
_CLASSES = 64


@functools.cache
def _steps(same: int) -> Any:
    """The model of differences between the size classes of neighbouring entries of a stored table, mapped to 0, 1, 2 ..."""
    other = (4096 - same) << 40
    return _model(_fixed_point(np.array([same << 40, *(max(1, other >> (i // 2 + 2)) for i in range(2 * _CLASSES))], np.int64)))


def _zigzag(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, -2 * x - 1, 2 * x)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    out = shift = 0
    while at < len(raw) and shift <= 63:
        b = raw[at]
        at += 1
        out |= (b & 0x7F) << shift
        if b < 0x80:
            return out, at
        shift += 7
    raise CorruptPayloadError("the stream ends inside its first numbers, or they are too large")


def _lengths(v: np.ndarray) -> np.ndarray:
    """Bit lengths of uint64 values, int64."""
    out = np.zeros(v.shape, np.int64)
    v = v.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        big = v >= np.uint64(1 << shift)
        out += big * shift
        v >>= (big * shift).astype(np.uint64)
    return out + v.astype(np.int64)


def _bucket(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 values as buckets (their length and the 8 bits below the leading one) and the number of bits below those."""
    low = np.maximum(_lengths(v) - 1 - _MANTISSA, 0)
    return (low << _MANTISSA) + (v >> low.astype(np.uint64)).astype(np.int64), low


def _from_bucket(bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest value of a bucket, and the number of bits that follow."""
    low = np.maximum((bucket >> _MANTISSA) - 1, 0)
    return (bucket - (low << _MANTISSA)).astype(np.uint64) << low.astype(np.uint64), low


def _rounded(counts: np.ndarray, mantissa: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts cut to ``mantissa`` bits below the leading one: their lengths, those bits, and how many bits those are."""
    length = _lengths(counts.astype(np.uint64))
    kept = np.clip(length - 1, 0, mantissa)
    drop = np.maximum(length - 1 - mantissa, 0)
    return length, (counts >> drop) & ((1 << kept) - 1), kept


def _restored(length: np.ndarray, bits: np.ndarray, mantissa: int) -> np.ndarray:
    """The counts of :func:`_rounded`, in the middle of what was cut off."""
    drop = np.maximum(length - 1 - mantissa, 0)
    lead = np.where(length > 0, np.int64(1) << np.maximum(length - 1 - drop, 0), 0)
    return ((lead + bits) << drop) + ((np.int64(1) << drop) >> 1)


def pack(symbols: Any) -> bytes:
    """Integers of any shape and range (numpy or torch, up to 64 bits) as a self-contained stream; the shape is not stored.

    A range of up to 2**16 values has a table with an entry each, stored at about half a byte to a byte for every value used;
    of a wider range the length and the leading nine bits of the distance to the smallest value are modelled.
    Raises :class:`tersor.InputError` for other element types.
    """
    x = to_numpy(symbols)
    if x.dtype.kind not in "iub":
        raise InputError(f"symbols are integers; given: {x.dtype}")
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype.kind == "b":
        x = x.view(np.uint8)
    if x.size == 0:
        return b""
    first, last = int(x.min()), int(x.max())
    head = _varint(-2 * first - 1 if first < 0 else 2 * first) + _varint(last - first)
    if first == last:
        return _seal(x.size, head)
    dense = last - first < _DENSE
    if dense:
        if abs(first) < 1 << 30 and abs(last) < 1 << 30:
            v = _flat(x, first)
        else:
            v = (x.astype(np.uint64) - np.uint64(first % (1 << 64))).astype(np.int32)
        size = last - first + 1
    else:
        wide = x.astype(np.uint64) - np.uint64(first % (1 << 64))
        buckets, low = _bucket(wide)
        v, size = buckets.astype(np.int32), int(_bucket(np.array([last - first], np.uint64))[0][0]) + 1
    counts = np.bincount(v, minlength=size)
    used = int(np.count_nonzero(counts))
    # bits of an entry: what they cost against what cutting them off costs
    mantissa = min(range(16), key=lambda m: used * m + x.size * 0.06 / 4**m)
    length, bits, kept = _rounded(counts, mantissa)
    steps = _zigzag(np.diff(length, prepend=0)).astype(np.int32)
    same = int(np.count_nonzero(steps == 0))
    chance = min(range(8), key=lambda i: -same * math.log2(_SAME[i] / 4096) - (size - same) * math.log2(1 - _SAME[i] / 4096))
    table = Table(_restored(length, bits, mantissa))

    out = _Writer()
    if not dense:
        for n in np.unique(low)[::-1]:
            if n:
                out.push_raw(wide[low == n] & np.uint64((1 << int(n)) - 1), int(n))
    if used > 1:
        out.push(v, table._model)
    for n in range(mantissa, 0, -1):
        out.push_raw(bits[kept == n].astype(np.uint64), n)
    out.push(steps, _steps(_SAME[chance]))
    return out.finish(x.size, head + bytes([chance << 4 | mantissa]))


def unpack(data: Any, shape: int | tuple[int, ...], dtype: str = "int64") -> np.ndarray:
    """The integers of :func:`pack`, of ``shape`` and numpy's ``dtype``.

    Raises :class:`tersor.CorruptPayloadError` (also where a value does not fit ``dtype``), :class:`tersor.LimitError`.
    """
    shape, count = _count(shape)
    kind = np.dtype(dtype)
    if kind.kind not in "iub":
        raise InputError(f"dtype is an integer type; given: {dtype}")
    if count == 0:
        _nothing(data)
        return np.empty(shape, kind)
    raw = _unseal(count, data)
    first, at = _read_varint(raw, 0)
    first = -(first + 1) // 2 if first % 2 else first // 2
    span, at = _read_varint(raw, at)
    bounds = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    if first < bounds[0] or first + span > bounds[1]:
        raise CorruptPayloadError(f"values {first} to {first + span} do not fit {kind}")
    if span == 0:
        if at != len(raw):
            raise CorruptPayloadError("a stream goes on after a constant")
        return np.full(shape, first, kind)
    if at >= len(raw) or raw[at] > 127:
        raise CorruptPayloadError("the stream ends before its table")
    mantissa, same = raw[at] & 15, _SAME[raw[at] >> 4]
    dense = span < _DENSE
    size = span + 1 if dense else int(_bucket(np.array([span], np.uint64))[0][0]) + 1
    reader = _Reader(raw[at + 1 :])
    steps = reader.pull(_steps(same), size).astype(np.int64)
    length = np.cumsum(np.where(steps % 2, -(steps + 1) // 2, steps // 2))
    if int(length.min()) < 0 or int(length.max()) > 62 or not length.any():
        raise CorruptPayloadError("the stored table has counts below 0 or beyond 2**62, or none")
    kept = np.clip(length - 1, 0, mantissa)
    bits = np.zeros(size, np.int64)
    for n in range(1, mantissa + 1):
        chosen = kept == n
        bits[chosen] = reader.pull_raw(int(np.count_nonzero(chosen)), n).astype(np.int64)
    table = Table(_restored(length, bits, mantissa))
    if np.count_nonzero(length) > 1:
        v = reader.pull(table._model, count)
    else:
        v = np.full(count, int(length.argmax()), np.int32)
    if dense:
        reader.finish()
        if kind == np.int32:
            v += np.int32(first)
            return v.reshape(shape)
        if kind.kind == "b":
            return v.astype(bool).reshape(shape)
        # sums that wrap around wrap to the right value: it was checked above that it fits
        return np.add(v.astype(kind), np.array(first % (1 << 8 * kind.itemsize), f"u{kind.itemsize}").view(kind)).reshape(shape)
    wide, low = _from_bucket(v.astype(np.int64))
    for n in np.unique(low):
        if n:
            chosen = low == n
            wide[chosen] |= reader.pull_raw(int(np.count_nonzero(chosen)), int(n))
    reader.finish()
    if int(wide.max()) > span:
        raise CorruptPayloadError(f"a value lies {int(wide.max())} above the smallest; at most {span} is announced")
    wide += np.uint64(first % (1 << 64))
    return wide.view(np.int64).astype(kind).reshape(shape) if first < 0 else wide.astype(kind).reshape(shape)


# --- Gaussian -----------------------------------------------------------------------------------------------------------------

#: Standard deviations are cut to 2**-4 ... 2**11 and put into bins: their exponent and the four leading bits of their fraction.
MIN_STD, MAX_STD = 2.0**-4, 2.0**11
_STEPS = 16
_SCALES = 15 * _STEPS
_BASE = (127 - 4) * _STEPS  # of the bits of a float32, shifted right by 19
_OFFSETS = 64  # the places of a mean between two whole numbers; large standard deviations use fewer (see _places)
_LIMIT = 1 << 24


def _scale(s: int) -> float:
    """The standard deviation in the middle of bin ``s``; exact in binary."""
    return (1 + (s % _STEPS + 0.5) / _STEPS) * 2.0 ** (s // _STEPS - 4)


def _places(s: int) -> int:
    """How many places of the mean are told apart: 64 below a standard deviation of 0.5, 32 below 1, 16 below 4, then half as
    many for each doubling down to 1 from 32 on."""
    octave = s // _STEPS - 4
    return (64, 64, 64, 32, 16, 16, 8, 4, 2, 1)[min(octave + 4, 9)]


def _reach(s: int) -> int:
    """Symbols farther than this from the mean's whole number are escapes."""
    return math.ceil(5 * _scale(s)) + 2


def _layout() -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The number of the table of bin s and place o, at s * 64 + o; the reach of each table; the bin and place of each table."""
    ids, reach, which = [], [], []
    for s in range(_SCALES):
        places = _places(s)
        for o in range(_OFFSETS):
            if o % (_OFFSETS // places) == 0:
                which.append((s, o))
                reach.append(_reach(s))
            ids.append(len(which) - 1)
    return np.array(ids, np.uint16), np.array(reach, np.int32), which


_IDS, _REACH, _WHICH = _layout()


def _exp(x: np.ndarray) -> np.ndarray:
    """e**x for x <= 0 by additions, multiplications and powers of two alone, which IEEE 754 rounds alike everywhere (the
    functions of the C library differ in their last bit from system to system)."""
    x = np.maximum(x, -700.0)
    n = np.rint(x * 1.4426950408889634)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    out = np.ones_like(r)
    for k in range(14, 0, -1):
        out = 1.0 + out * r / k
    return np.ldexp(out, n.astype(np.int64))


def _upper(x: np.ndarray) -> np.ndarray:
    """The mass of the standard normal above x >= 0, to about 1e-7 of itself.

    Source: Press et al., Numerical Recipes in C (2nd ed.), section 6.2, erfcc.
    """
    z = x * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    p = np.full_like(t, 0.17087277)
    for c in (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223):
        p = c + t * p
    return 0.5 * t * _exp(p - z * z)


def gaussian_probabilities(scale: int, place: int) -> np.ndarray:
    """The integers, in units of 2**-24, of the table for bin ``scale`` (0 to 239) and ``place`` (0 to 63) of the mean: symbols
    -K ... K around the mean's whole number, then the escape."""
    sigma, width = _scale(scale), _OFFSETS // _places(scale)
    centre = (place - place % width + (width - 1) / 2) / _OFFSETS
    reach = _reach(scale)
    edges = (np.arange(-reach, reach + 2) - 0.5 - centre) / sigma
    tail = _upper(np.abs(edges))
    low, high = edges[:-1], edges[1:]
    mass = np.where(low >= 0, tail[:-1] - tail[1:], np.where(high <= 0, tail[1:] - tail[:-1], 1.0 - tail[:-1] - tail[1:]))
    outside = tail[0] + tail[-1]
    return _fixed_point(np.floor(np.maximum(np.append(mass, outside), 0) * 2.0**36).astype(np.int64))


@functools.cache
def _gaussian(table: int) -> Any:
    return _model(gaussian_probabilities(*_WHICH[table]))


def _grid(mean: Any, std: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean's whole numbers (int32) and the number of the table (uint16) of each symbol."""
    m, s = to_numpy(mean), to_numpy(std)
    if m.dtype.kind not in "fiu" or s.dtype.kind not in "fiu" or m.size not in (1, count) or s.size not in (1, count):
        raise InputError(
            f"mean and std are one number, or one for each of the {count} symbols; given: {m.dtype} {m.shape}, {s.dtype} {s.shape}"
        )
    m = np.ascontiguousarray(m, np.float32).reshape(-1)
    s = np.ascontiguousarray(s, np.float32).reshape(-1)
    if count == 0:
        return np.empty(0, np.int32), np.empty(0, np.uint16)
    if not (float(s.min()) > 0 and float(s.max()) < np.inf):
        raise InputError(f"std is above 0 and finite; given: {s.min()} to {s.max()}")
    if not (float(m.min()) > -_LIMIT and float(m.max()) < _LIMIT):
        raise InputError(f"mean is between -2**24 and 2**24; given: {m.min()} to {m.max()}")
    bins = (s.view(np.int32) >> 19) - _BASE
    np.clip(bins, 0, _SCALES - 1, out=bins)
    bins *= _OFFSETS
    m = m * np.float32(_OFFSETS)
    place = np.floor(m + np.float32(0.5), out=m).astype(np.int32)
    whole = place >> 6
    place &= _OFFSETS - 1
    ids = np.take(_IDS, place + bins)
    if ids.size != count:
        ids = np.broadcast_to(ids, count)
    return np.broadcast_to(whole, count) if whole.size != count else whole, ids


def _groups(ids: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The order that brings symbols of one table together, and (table, start, stop) of each group."""
    sizes = np.bincount(ids, minlength=len(_WHICH))
    used = np.flatnonzero(sizes)
    stops = np.cumsum(sizes[used])
    order = np.argsort(ids, kind="stable")
    return order, list(zip(used.tolist(), (stops - sizes[used]).tolist(), stops.tolist()))


def encode_gaussian(symbols: Any, mean: Any, std: Any) -> bytes:
    """Symbols that are about normal, each with its own mean and standard deviation, which the decoder must have exactly alike.

    ``symbols``: integers between -2**30 and 2**30. ``mean``, ``std``: numbers, or arrays of as many elements as symbols, used as
    float32. Every symbol can be coded, whatever mean and std say; one beyond five standard deviations takes 40 to 60 bits.
    std is cut to 2**-4 ... 2**11 and put into one of 240 bins (16 to an octave), the mean to 64 places between whole
    numbers (fewer from a standard deviation of 0.5 on); the tables of these are made of integers, computed with correctly rounded
    operations alone.
    The symbols of one table are coded together, in their order. Raises :class:`tersor.InputError`.
    """
    x = to_numpy(symbols)
    if x.dtype.kind not in "iub":
        raise InputError(f"symbols are integers; given: {x.dtype}")
    x = x.reshape(-1)
    whole, ids = _grid(mean, std, x.size)
    if x.size == 0:
        return b""
    if int(x.min()) <= -(1 << 30) or int(x.max()) >= 1 << 30:
        raise InputError(f"symbols are between -2**30 and 2**30; given: {x.min()} to {x.max()}")
    reach = np.take(_REACH, ids)
    place = x.astype(np.int32)
    place -= whole
    place += reach
    # as unsigned numbers, what lies below the table is large too
    reach *= 2
    reach += 1
    coded = np.minimum(place.view(np.uint32), reach.view(np.uint32)).view(np.int32)
    order, groups = _groups(ids)
    escaped = np.flatnonzero(coded == reach)
    coded = coded[order]
    out = _Writer()
    if escaped.size:
        values = _zigzag(x[escaped].astype(np.int64) - whole[escaped]).astype(np.uint64)
        lengths = _lengths(values)
        for n in np.unique(lengths)[::-1]:
            out.push_raw(values[lengths == n], int(n))
        out.push(lengths.astype(np.int32), _uniform(_CLASSES))
    for table, start, stop in reversed(groups):
        out.push(coded[start:stop], _gaussian(table))
    return out.finish(x.size)


def decode_gaussian(data: Any, mean: Any, std: Any, shape: int | tuple[int, ...]) -> np.ndarray:
    """The symbols of :func:`encode_gaussian`, int32 of ``shape``; ``mean`` and ``std`` exactly as they were.

    Raises :class:`tersor.CorruptPayloadError`, :class:`tersor.LimitError`, :class:`tersor.InputError`.
    """
    shape, count = _count(shape)
    whole, ids = _grid(mean, std, count)
    if count == 0:
        _nothing(data)
        return np.empty(shape, np.int32)
    reader = _Reader(_unseal(count, data))
    order, groups = _groups(ids)
    coded = np.empty(count, np.int32)
    for table, start, stop in groups:
        coded[start:stop] = reader.pull(_gaussian(table), stop - start)
    out = np.empty(count, np.int32)
    out[order] = coded
    reach = np.take(_REACH, ids)
    escaped = np.flatnonzero(out > 2 * reach)
    out -= reach
    out += whole
    if escaped.size:
        lengths = reader.pull(_uniform(_CLASSES), int(escaped.size)).astype(np.int64)
        if int(lengths.max()) > 33:
            raise CorruptPayloadError("an escaped symbol is longer than any can be")
        values = np.zeros(escaped.size, np.uint64)
        for n in np.unique(lengths):
            chosen = lengths == n
            values[chosen] = reader.pull_raw(int(np.count_nonzero(chosen)), int(n))
        signed = values.astype(np.int64)
        signed = np.where(signed % 2, -(signed + 1) // 2, signed // 2) + whole[escaped]
        if int(np.abs(signed).max()) >= 1 << 30:
            raise CorruptPayloadError("an escaped symbol is beyond 2**30")
        out[escaped] = signed
    reader.finish()
    return out.reshape(shape)
