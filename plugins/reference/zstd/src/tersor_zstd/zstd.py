"""Zstandard through the zstandard library."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from tersor import Codec, CorruptPayloadError, Spec, between, field, method


@method
class Zstd(Codec):
    """Zstandard (RFC 8878, https://www.rfc-editor.org/rfc/rfc8878): LZ77 with finite state entropy coding.

    Takes bytes, or any numeric array, whose little-endian memory is coded, with ``shuffle`` byte plane by byte plane.
    Decoding is exact and the same everywhere. Raises :class:`tersor.InputError` for anything else.
    """

    name = "zstd"
    domains = ("bytes", "array", "text")
    lossless = True
    allow_empty = True
    level: int = field(3, between(1, 22), help="effort: 1 fast, 19 and more slow and small")
    shuffle: bool = field(False, help="arrays: gather the first bytes of all elements, then the second, and so on")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        if not isinstance(x, bytes):
            planes = np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, x.dtype.itemsize)
            x = np.ascontiguousarray(planes.T if self.shuffle else planes).data
        compressor = zstandard.ZstdCompressor(level=self.level, write_content_size=False, write_checksum=False)
        return {"data": compressor.compress(x)}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        size = spec.size * (1 if spec.dtype == "bytes" else np.dtype(spec.dtype).itemsize)
        # one byte more than is due, so that a longer stream is noticed without being decoded
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(parts["data"])
        raw = reader.read(size + 1)
        if len(raw) != size:
            raise CorruptPayloadError(f"zstd: the stream holds {len(raw)} bytes or more, the header says {size}")
        if spec.dtype == "bytes":
            return raw
        dtype = np.dtype(spec.dtype)
        if self.shuffle:
            raw = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T)
        return np.frombuffer(raw, dtype).reshape(spec.shape)
