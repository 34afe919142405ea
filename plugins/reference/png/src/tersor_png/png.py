"""PNG through Pillow (zlib)."""

from __future__ import annotations

from typing import Any

from tersor import Codec, Spec, between, field, method
from tersor_kit_reference import decode_image, encode_image


@method
class Png(Codec):
    """PNG (https://www.w3.org/TR/png-3/): prediction by neighbours, then DEFLATE.

    Image: float32 C x H x W of 8-bit values (k / 255), C of 1, 3 or 4; exact. Raises :class:`tersor.InputError`.
    """

    name = "png"
    domains = ("image",)
    lossless = True
    level: int = field(9, between(0, 9), help="effort of DEFLATE")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        return {
            "data": encode_image(x, "png", "PNG", (1, 3, 4), on_grid=True, compress_level=self.level, optimize=self.level == 9)
        }

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        return decode_image(parts["data"], spec, "PNG")
