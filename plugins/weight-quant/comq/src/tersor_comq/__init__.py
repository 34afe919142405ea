"""COMQ for Tersor."""

from tersor import hookimpl
from tersor_comq.comq import COMQ

__all__ = ["COMQ"]


@hookimpl
def tersor_quantizer() -> type[COMQ]:
    return COMQ
