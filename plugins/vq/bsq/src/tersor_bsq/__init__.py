"""Binary spherical quantization for Tersor."""

from tersor import hookimpl
from tersor_bsq.bsq import BSQ, BSQLayer

__all__ = ["BSQ", "BSQLayer"]


@hookimpl
def tersor_quantizer() -> type[BSQ]:
    return BSQ
