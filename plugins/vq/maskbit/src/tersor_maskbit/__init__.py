"""MaskBit for Tersor."""

from tersor import hookimpl
from tersor_maskbit.generator import BitGenerator
from tersor_maskbit.maskbit import MaskBit, MaskBitLayer

__all__ = ["BitGenerator", "MaskBit", "MaskBitLayer"]


@hookimpl
def tersor_quantizer() -> type[MaskBit]:
    return MaskBit
