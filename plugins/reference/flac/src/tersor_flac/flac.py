"""FLAC through soundfile (libFLAC)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile

from tersor import Codec, CorruptPayloadError, InputError, Spec, field, method, one_of


@method
class Flac(Codec):
    """FLAC (RFC 9639, https://www.rfc-editor.org/rfc/rfc9639): linear prediction with Rice-coded residuals.

    Audio: float32 channels x samples in [-1, 1] of values k / 2^15 (``bits=16``) or k / 2^23 (``bits=24``), up to 8 channels;
    exact. The sample rate travels with the payload. Raises :class:`tersor.InputError` for other values.
    """

    name = "flac"
    domains = ("audio",)
    lossless = True
    bits: int = field(16, one_of(16, 24), help="bits per sample")

    def example_inputs(self) -> list[Any]:
        rng = np.random.default_rng(0)
        full = 1 << (self.bits - 1)
        return [(rng.integers(-full, full, (2, n)) / full).astype(np.float32) for n in (1, 1000, 5001)]

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        if x.dtype != np.float32 or not 1 <= x.shape[0] <= 8:
            raise InputError(f"flac takes float32 audio of 1 to 8 channels; given: {x.dtype}, {x.shape[0]} channels")
        full = 1 << (self.bits - 1)
        samples = np.rint(x.T.astype(np.float64) * full)
        if samples.max() >= full or not np.array_equal((samples / full).astype(np.float32), x.T):
            raise InputError(f"flac keeps values k / {full} below 1 exactly (bits={self.bits}); given: others; round them first")
        out = io.BytesIO()
        samples = (samples.astype(np.int32) << (32 - self.bits)).astype(np.int32)
        soundfile.write(out, samples, 44100, format="FLAC", subtype=f"PCM_{self.bits}")
        return {"data": out.getvalue()}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        with soundfile.SoundFile(io.BytesIO(parts["data"])) as file:
            if (file.channels, file.frames) != spec.shape or file.format != "FLAC":
                raise CorruptPayloadError(f"flac: {file.channels} x {file.frames} samples, the header says {spec.shape}")
            return np.ascontiguousarray(file.read(dtype="float32", always_2d=True).T)
