"""decoupleQ for Tersor."""

from tersor import hookimpl
from tersor_decoupleq.decoupleq import DecoupleQ

__all__ = ["DecoupleQ"]


@hookimpl
def tersor_quantizer() -> type[DecoupleQ]:
    return DecoupleQ
