"""The ``.tsr`` file: self-describing, versioned, checksummed; no pickle, no code.

Layout (integers are little-endian, ``varint`` is LEB128 of at most 63 bits, ``text`` is a varint length and UTF-8)::

    magic      8F 54 53 52
    format     u8, now 1
    length     varint, of the header that follows
    header     kind u8, flags u8, method text, distribution text (empty: "tersor-" + method), distribution version text,
               configuration version varint, configuration text (JSON of the settings that differ from their defaults),
               meta text (JSON of the method's scalars), domain u8, element type u8, dimensions varint + varints,
               [rate f64] [state 8 bytes] [check u32], alignment u8 (log2),
               parts varint, each: name text, element type u8, dimensions varint + varints
    parts      the bytes of each part, each padded with zeros to the alignment
    digest     XXH3-64 over the digests of the leaves: the bytes before the first part, then each part in pieces of 16 MiB

Reading trusts nothing: every length is checked against the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import attrs
import xxhash

from tersor.arrays import DTYPES, SIZES, buffer
from tersor.config import to_json
from tersor.domains import BY_CODE, DOMAINS
from tersor.errors import (
    ChecksumError,
    ConfigError,
    CorruptPayloadError,
    InputError,
    LimitError,
    NotTersorFileError,
    TruncatedFileError,
    UnsupportedVersionError,
)
from tersor.files import atomic_write
from tersor.results import Spec

MAGIC = b"\x8fTSR"
FORMAT = 1
KIND_CODES = ("codec", "quantizer", "pruner", "decoder", "model")
MAX_HEADER = 1 << 26
MAX_PARTS = 1 << 20
MAX_DIMENSIONS = 32
LEAF = 1 << 24
_PIECE = 1 << 20
_BITWISE, _RATE, _STATE, _CHECK = 1, 2, 4, 8


def decoded_limit() -> int:
    """Bytes that one decoded array may take: 4 GiB, or what the environment variable TERSOR_MAX_DECODED says."""
    text = os.environ.get("TERSOR_MAX_DECODED", "")
    if text and not text.isdecimal():
        raise ConfigError(f"TERSOR_MAX_DECODED={text!r} in the environment; allowed: a number of bytes")
    return int(text) if text else 4 << 30


@attrs.frozen
class Part:
    """One named part of a payload, as the header says: its element type, shape and place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@attrs.frozen(kw_only=True)
class Header:
    """What a ``.tsr`` file says of itself."""

    kind: str
    method: str
    distribution: str
    version: str
    config_version: int = 1
    config: dict[str, Any] = attrs.field(factory=dict)
    meta: dict[str, Any] = attrs.field(factory=dict)
    spec: Spec = attrs.field(factory=lambda: Spec("bytes", (0,), "bytes"))
    bitwise: bool = False
    state: bytes | None = None
    check: int | None = None
    parts: tuple[Part, ...] = ()
    format: int = FORMAT


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _text(raw: bytes) -> bytes:
    return _varint(len(raw)) + raw


def _dims(shape: Iterable[int]) -> bytes:
    shape = tuple(shape)
    return _varint(len(shape)) + b"".join(map(_varint, shape))


def _pack_header(h: Header, align: int) -> bytes:
    flags = (
        _BITWISE * h.bitwise | _RATE * (h.spec.rate is not None) | _STATE * (h.state is not None) | _CHECK * (h.check is not None)
    )
    distribution = "" if h.distribution == f"tersor-{h.method}" else h.distribution
    body = [
        bytes([KIND_CODES.index(h.kind), flags]),
        _text(h.method.encode()), _text(distribution.encode()), _text(h.version.encode()), _varint(h.config_version),
        _text(to_json(h.config)), _text(to_json(h.meta)),
        bytes([DOMAINS[h.spec.domain].code, DTYPES.index(h.spec.dtype)]), _dims(h.spec.shape),
        struct.pack("<d", h.spec.rate) if h.spec.rate is not None else b"",
        h.state or b"",
        struct.pack("<I", h.check) if h.check is not None else b"",
        bytes([align]), _varint(len(h.parts)),
    ]  # fmt: skip
    for part in h.parts:
        body += [_text(part.name.encode()), bytes([DTYPES.index(part.dtype)]), _dims(part.shape)]
    raw = b"".join(body)
    return MAGIC + bytes([FORMAT]) + _varint(len(raw)) + raw


def _padding(position: int, align: int) -> int:
    return -position % (1 << align)


def _leaves(head: memoryview | bytes, parts: Iterable[memoryview]) -> Iterator[memoryview | bytes]:
    yield head
    for part in parts:
        for start in range(0, len(part), LEAF):
            yield part[start : start + LEAF]


def _digest(head: memoryview | bytes, parts: list[memoryview]) -> bytes:
    """The digest of the file; several threads where it is large (hashing releases the interpreter lock)."""
    leaves = list(_leaves(head, parts))
    if sum(map(len, leaves)) < 4 * LEAF:
        digests = map(xxhash.xxh3_64_digest, leaves)
        return xxhash.xxh3_64_digest(b"".join(digests))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return xxhash.xxh3_64_digest(b"".join(pool.map(xxhash.xxh3_64_digest, leaves)))


def _plan(header: Header, parts: Mapping[str, Any]) -> tuple[bytes, list[memoryview], int]:
    buffers, infos = [], []
    for name, value in parts.items():
        dtype, shape, view = buffer(value)
        buffers.append(view)
        infos.append(Part(name, dtype, shape))
    align = 6 if sum(map(len, buffers)) >= 1 << 16 else 0
    return _pack_header(attrs.evolve(header, parts=tuple(infos)), align), buffers, align


def _chunks(head: bytes, buffers: list[memoryview], align: int) -> Iterator[bytes | memoryview]:
    yield head
    position = len(head)
    for view in buffers:
        gap = _padding(position, align)
        if gap:
            yield bytes(gap)
        yield view
        position += gap + len(view)


def size(header: Header, parts: Mapping[str, Any]) -> int:
    """The exact length of what :func:`dumps` gives."""
    head, buffers, align = _plan(header, parts)
    return sum(map(len, _chunks(head, buffers, align))) + 8


def dumps(header: Header, parts: Mapping[str, Any]) -> bytes:
    """The file as bytes. ``parts``: names to bytes, numpy arrays or torch tensors."""
    head, buffers, align = _plan(header, parts)
    return b"".join([*_chunks(head, buffers, align), _digest(head, buffers)])


def write(target: str | os.PathLike[str] | BinaryIO, header: Header, parts: Mapping[str, Any]) -> int:
    """Write the file to a path (atomically) or to a binary file object; returns the number of bytes.

    The digest of a large file is computed on other threads while the parts are written. Raises OSError as the system does.
    """
    head, buffers, align = _plan(header, parts)
    total = sum(map(len, buffers))
    if not hasattr(target, "write"):
        with atomic_write(target) as file:
            if total >= 4 * LEAF and hasattr(os, "pwrite") and file.seekable():
                return _write_large(file.fileno(), head, buffers, align)
            return _write(file, head, buffers, align)
    return _write(target, head, buffers, align)  # type: ignore[arg-type]


def _write_large(file: int, head: bytes, buffers: list[memoryview], align: int) -> int:
    """Two threads take the leaves in turn; each piece of a leaf is hashed while the copy that wrote it is still in the cache."""
    places, position = [0], len(head)
    for view in buffers:
        position += _padding(position, align)
        places += range(position, position + len(view), LEAF)
        position += len(view)

    def put(leaf: memoryview | bytes, place: int) -> bytes:
        state = xxhash.xxh3_64()
        for start in range(0, len(leaf), _PIECE):
            piece = leaf[start : start + _PIECE]
            done = 0
            while done < len(piece):
                done += os.pwrite(file, piece[done:], place + start + done)
            state.update(piece)
        return bytes(state.digest())

    with ThreadPoolExecutor(2) as pool:
        digests = b"".join(pool.map(put, _leaves(head, buffers), places))
    os.pwrite(file, xxhash.xxh3_64_digest(digests), position)  # the gaps between parts are holes, which read as zeros
    return position + 8


def _write(target: BinaryIO, head: bytes, buffers: list[memoryview], align: int) -> int:
    total = sum(map(len, buffers))
    pending: Future[bytes] | None = None
    pool = ThreadPoolExecutor(1) if total >= 4 * LEAF else None
    try:
        if pool:
            pending = pool.submit(_digest, head, buffers)
        written = 0
        for chunk in _chunks(head, buffers, align):
            target.write(chunk)
            written += len(chunk)
        target.write(pending.result() if pending else _digest(head, buffers))
    finally:
        if pool:
            pool.shutdown()
    return written + 8


class _Cursor:
    """Reads fields off a header and refuses to run past its end."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at = view, 0

    def take(self, n: int) -> bytes:
        if n > len(self.view) - self.at:
            raise CorruptPayloadError(f"the header ends at byte {len(self.view)}, inside a field of {n} bytes")
        self.at += n
        return bytes(self.view[self.at - n : self.at])

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        out = shift = 0
        while True:
            b = self.byte()
            out |= (b & 0x7F) << shift
            if b < 0x80:
                return out
            shift += 7
            if shift > 62:
                raise CorruptPayloadError("a number in the header is longer than 63 bits")

    def text(self) -> str:
        try:
            return self.take(self.varint()).decode()
        except UnicodeDecodeError as error:
            raise CorruptPayloadError(f"a name in the header is not UTF-8: {error}") from error

    def json(self) -> dict[str, Any]:
        text = self.text()
        if not text:
            return {}
        try:
            out = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptPayloadError(f"the header's JSON cannot be read: {error}") from error
        if not isinstance(out, dict):
            raise CorruptPayloadError(f"the header's JSON is a {type(out).__name__}, not an object")
        return out

    def dims(self) -> tuple[int, ...]:
        n = self.varint()
        if n > MAX_DIMENSIONS:
            raise CorruptPayloadError(f"an array of {n} dimensions; allowed: at most {MAX_DIMENSIONS}")
        out = tuple(self.varint() for _ in range(n))
        if math.prod(max(d, 1) for d in out) >= 1 << 59:
            raise LimitError(f"an array of shape {out}; allowed: fewer than 2**59 elements along its dimensions")
        return out

    def dtype(self) -> str:
        code = self.byte()
        if code >= len(DTYPES):
            raise UnsupportedVersionError(f"element type {code} is not known to this version, which knows 0 to {len(DTYPES) - 1}")
        return DTYPES[code]


def _head(view: memoryview) -> tuple[int, memoryview]:
    """Where the parts begin, and the header's bytes. The checks are in the order in which a reader can name what is wrong."""
    if len(view) < len(MAGIC) + 2:
        if bytes(view[:4]) == MAGIC[: len(view[:4])] and len(view):
            raise TruncatedFileError(f"a .tsr file has at least {len(MAGIC) + 10} bytes; this one has {len(view)}")
        raise NotTersorFileError(f"not a .tsr file: it has {len(view)} bytes")
    if bytes(view[:4]) != MAGIC:
        raise NotTersorFileError(f"not a .tsr file: it begins with {bytes(view[:4])!r}, not {MAGIC!r}")
    if view[4] != FORMAT:
        raise UnsupportedVersionError(
            f"format version {view[4]}; this installation reads version {FORMAT}: pip install -U tersor"
        )
    cursor = _Cursor(view[5 : 5 + 10])
    try:
        length = cursor.varint()
    except CorruptPayloadError as error:
        raise TruncatedFileError("the file ends inside the length of its header") from error
    start = 5 + cursor.at
    if length > MAX_HEADER:
        raise LimitError(f"a header of {length} bytes; allowed: at most {MAX_HEADER}")
    if start + length + 8 > len(view):
        raise TruncatedFileError(f"the header needs {start + length + 8} bytes; the file has {len(view)}")
    return start + length, view[start : start + length]


def _parse(view: memoryview) -> tuple[Header, int]:
    """The header, with the parts' offsets, and the length that the whole file must have."""
    position, raw = _head(view)
    c = _Cursor(raw)
    kind, flags = c.byte(), c.byte()
    if kind >= len(KIND_CODES) or flags > 15:
        raise UnsupportedVersionError(f"kind {kind} with flags {flags} is not known to this version")
    method, distribution, version = c.text(), c.text(), c.text()
    config_version, config, meta = c.varint(), c.json(), c.json()
    domain = c.byte()
    if domain not in BY_CODE:
        raise UnsupportedVersionError(f"domain {domain} is not known to this version, which knows 0 to {max(BY_CODE)}")
    dtype, shape = c.dtype(), c.dims()
    rate = struct.unpack("<d", c.take(8))[0] if flags & _RATE else None
    if rate is not None and not 0 < rate < 1e12:
        raise CorruptPayloadError(f"a rate of {rate}; allowed: above 0")
    state = c.take(8) if flags & _STATE else None
    check = struct.unpack("<I", c.take(4))[0] if flags & _CHECK else None
    align, count = c.byte(), c.varint()
    if align > 12 or count > min(MAX_PARTS, len(raw)):
        raise LimitError(f"{count} parts at an alignment of 2**{align}; allowed: at most {MAX_PARTS} and 2**12")
    parts = []
    names = set()
    for _ in range(count):
        name, part_dtype, part_shape = c.text(), c.dtype(), c.dims()
        position += _padding(position, align)
        part = Part(name, part_dtype, part_shape, position)
        if name in names or (part_dtype == "bytes" and len(part_shape) != 1):
            raise CorruptPayloadError(f"part {name!r} stands twice, or is bytes with {len(part_shape)} dimensions")
        names.add(name)
        position += part.nbytes
        parts.append(part)
    if c.at != len(raw):
        raise CorruptPayloadError(f"the header has {len(raw) - c.at} bytes too many")
    header = Header(
        kind=KIND_CODES[kind], method=method, distribution=distribution or f"tersor-{method}", version=version,
        config_version=config_version, config=config, meta=meta, spec=Spec(DOMAINS[BY_CODE[domain].name].name, shape, dtype, rate),
        bitwise=bool(flags & _BITWISE), state=state, check=check, parts=tuple(parts), format=view[4],
    )  # fmt: skip
    return header, position + 8


def load_bytes(source: bytes | bytearray | memoryview | str | os.PathLike[str]) -> memoryview:
    """The bytes of a file or buffer, writable in private: a large file is mapped copy-on-write, not read.

    Raises OSError where the file cannot be opened.
    """
    if isinstance(source, (bytes, memoryview)):
        return memoryview(bytearray(source))
    if isinstance(source, bytearray):
        return memoryview(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"a .tsr file is bytes, a path or a payload; given: a {type(source).__name__}")
    with open(source, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < 1 << 20:
            return memoryview(bytearray(file.read()))
        return memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY))


def read(source: Any, verify: bool = True) -> tuple[Header, dict[str, memoryview]]:
    """The header and the raw bytes of each part, over the memory of the source.

    Raises :class:`tersor.NotTersorFileError`, :class:`tersor.UnsupportedVersionError`, :class:`tersor.TruncatedFileError`,
    :class:`tersor.ChecksumError`, :class:`tersor.LimitError` or :class:`tersor.CorruptPayloadError`.
    """
    view = load_bytes(source) if not isinstance(source, memoryview) else source.cast("B")
    header, length = _parse(view)
    if len(view) != length:
        what = "ends early" if len(view) < length else "goes on"
        raise TruncatedFileError(f"the file {what}: its header says {length} bytes, it has {len(view)}")
    parts = {p.name: view[p.offset : p.offset + p.nbytes] for p in header.parts}
    end = header.parts[0].offset if header.parts else length - 8
    if verify and not _intact(view, header, end, length):
        raise ChecksumError("the checksum does not match: the file was changed after it was written")
    return header, parts


def _intact(view: memoryview, header: Header, end: int, length: int) -> bool:
    head_end, _ = _head(view)
    gaps = [view[head_end:end]]
    for a, b in zip(header.parts, [*header.parts[1:], None], strict=False):
        gaps.append(view[a.offset + a.nbytes : b.offset if b else length - 8])
    if any(any(gap) for gap in gaps):
        return False
    parts = [view[p.offset : p.offset + p.nbytes] for p in header.parts]
    return _digest(view[:head_end], parts) == bytes(view[length - 8 : length])


def inspect(source: Any) -> dict[str, Any]:
    """What a file says of itself, sizes of every part and the state of its checksum, as JSON-ready data; loads no plugin.

    Raises as :func:`read`, except that a wrong checksum is reported under ``checksum``, not raised.
    """
    view = load_bytes(source)
    header, length = _parse(view)
    if len(view) != length:
        read(view)
    end = header.parts[0].offset if header.parts else length - 8
    sizes = [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape), "bytes": p.nbytes} for p in header.parts]
    out = {
        "format": header.format, "kind": header.kind, "method": header.method, "distribution": header.distribution,
        "version": header.version, "config_version": header.config_version, "config": header.config, "meta": header.meta,
        "domain": header.spec.domain, "shape": list(header.spec.shape), "dtype": header.spec.dtype, "rate": header.spec.rate,
        "bitwise": header.bitwise, "state": header.state.hex() if header.state else None,
        "check": header.check, "bytes": length, "header_bytes": end, "parts": sizes,
        "checksum": "ok" if _intact(view, header, end, length) else "mismatch",
    }  # fmt: skip
    count = math.prod(header.spec.shape)
    if header.kind != "model" and count:
        out["bits_per_element"] = 8 * length / count
    return out
