"""AVIF through Pillow (libavif)."""

from __future__ import annotations

from typing import Any

from tersor import Codec, Spec, between, field, method, one_of
from tersor_kit_reference import decode_image, encode_image, require


@method
class Avif(Codec):
    """AVIF (https://aomediacodec.github.io/av1-avif/): AV1 intra frames.

    Image: float32 C x H x W in [0, 1], C of 1, 3 or 4, rounded to 8 bits. Raises :class:`tersor.InputError`,
    :class:`tersor.MissingLibraryError` where Pillow is built without it.
    """

    name = "avif"
    domains = ("image",)
    bitwise = False
    quality: int = field(60, between(0, 100), help="0 small to 100 good")
    subsampling: str = field("4:4:4", one_of("4:2:0", "4:2:2", "4:4:4"), help="resolution of the colour channels")
    speed: int = field(6, between(0, 10), help="0 slow and small to 10 fast")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        require("avif", "avif")
        x = x.repeat(3, axis=0) if x.shape[0] == 1 else x
        options = {"quality": self.quality, "subsampling": self.subsampling, "speed": self.speed, "max_threads": 1}
        return {"data": encode_image(x, "avif", "AVIF", (3, 4), **options)}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        require("avif", "avif")
        if spec.shape[0] == 1:
            return decode_image(parts["data"], Spec(spec.domain, (3, *spec.shape[1:]), spec.dtype), "AVIF")[1:2]
        return decode_image(parts["data"], spec, "AVIF")
