"""WebP through Pillow (libwebp)."""

from __future__ import annotations

from typing import Any

from tersor import Codec, Spec, between, field, method
from tersor_kit_reference import decode_image, encode_image, require


@method
class Webp(Codec):
    """WebP (RFC 9649, https://www.rfc-editor.org/rfc/rfc9649): VP8 key frames, or the lossless format with ``lossless``.

    Image: float32 C x H x W in [0, 1], C of 1, 3 or 4, rounded to 8 bits; with ``lossless`` the values must be 8-bit ones
    (k / 255) and come back exactly. Raises :class:`tersor.InputError`, :class:`tersor.MissingLibraryError`.
    """

    name = "webp"
    domains = ("image",)
    bitwise = False
    quality: int = field(75, between(0, 100), help="0 small to 100 good; lossless: effort")
    lossless: bool = field(False, help="keep 8-bit values exactly")
    effort: int = field(4, between(0, 6), help="effort: 0 fast to 6 slow and small")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        require("webp", "webp")
        grey = x.shape[0] == 1
        x = x.repeat(3, axis=0) if grey else x
        options = {"quality": self.quality, "lossless": self.lossless, "method": self.effort, "exact": self.lossless}
        return {"data": encode_image(x, "webp", "WEBP", (3, 4), on_grid=self.lossless, **options)}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        if spec.shape[0] == 1:
            return decode_image(parts["data"], Spec(spec.domain, (3, *spec.shape[1:]), spec.dtype), "WEBP")[1:2]
        return decode_image(parts["data"], spec, "WEBP")
