"""BitNet b1.58 Reloaded for Tersor."""

from tersor import hookimpl
from tersor_bitnet_b158.bitnet import BitLinear, BitNet158

__all__ = ["BitLinear", "BitNet158"]


@hookimpl
def tersor_quantizer() -> type[BitNet158]:
    return BitNet158
