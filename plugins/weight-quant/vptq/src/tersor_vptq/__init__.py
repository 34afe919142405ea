"""VPTQ for Tersor."""

from tersor import hookimpl
from tersor_vptq.vptq import VPTQ

__all__ = ["VPTQ"]


@hookimpl
def tersor_quantizer() -> type[VPTQ]:
    return VPTQ
