"""JPEG through Pillow (libjpeg-turbo)."""

from __future__ import annotations

from typing import Any

from tersor import Codec, Spec, between, field, method, one_of
from tersor_kit_reference import decode_image, encode_image


@method
class Jpeg(Codec):
    """JPEG (ITU-T T.81, https://www.w3.org/Graphics/JPEG/itu-t81.pdf): blockwise cosine transform, Huffman coding.

    Image: float32 C x H x W in [0, 1], C of 1 or 3, rounded to 8 bits. Raises :class:`tersor.InputError`.
    """

    name = "jpeg"
    domains = ("image",)
    bitwise = False  # decoders may differ in the last bit of the inverse transform
    quality: int = field(75, between(1, 100), help="1 small to 100 good, the scale of the Independent JPEG Group")
    subsampling: str = field("4:2:0", one_of("4:2:0", "4:2:2", "4:4:4"), help="resolution of the colour channels")
    optimize: bool = field(True, help="Huffman tables made for the image")
    progressive: bool = field(False, help="coarse to fine order")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        return {
            "data": encode_image(
                x, "jpeg", "JPEG", (1, 3), quality=self.quality, subsampling=self.subsampling, optimize=self.optimize,
                progressive=self.progressive,
            )
        }  # fmt: skip

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        return decode_image(parts["data"], spec, "JPEG")
