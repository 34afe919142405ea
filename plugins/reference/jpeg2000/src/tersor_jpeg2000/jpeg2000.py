"""JPEG 2000 through Pillow (OpenJPEG)."""

from __future__ import annotations

from typing import Any

from tersor import Codec, Spec, between, field, method
from tersor_kit_reference import decode_image, encode_image, require


@method
class Jpeg2000(Codec):
    """JPEG 2000 (ITU-T T.800, https://www.itu.int/rec/T-REC-T.800): wavelets with embedded bit-plane coding.

    Image: float32 C x H x W in [0, 1], C of 1, 3 or 4, rounded to 8 bits; the 9/7 wavelet to a target PSNR, or with
    ``lossless`` the 5/3 wavelet, for 8-bit values (k / 255) that come back exactly. Colours are decorrelated.
    Raises :class:`tersor.InputError`, :class:`tersor.MissingLibraryError`.
    """

    name = "jpeg2000"
    domains = ("image",)
    bitwise = False
    psnr: float = field(36.0, between(10, 80), help="target PSNR, dB")
    lossless: bool = field(False, help="keep 8-bit values exactly")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        require("jpg_2000", "jpeg2000")
        levels = max(1, min(6, int(min(x.shape[1:])).bit_length()))
        options: dict[str, Any] = {"num_resolutions": levels, "mct": int(x.shape[0] >= 3), "no_jp2": True}
        if not self.lossless:
            options |= {"irreversible": True, "quality_mode": "dB", "quality_layers": [self.psnr]}
        return {"data": encode_image(x, "jpeg2000", "JPEG2000", (1, 3, 4), on_grid=self.lossless, **options)}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        require("jpg_2000", "jpeg2000")
        return decode_image(parts["data"], spec, "JPEG2000")
