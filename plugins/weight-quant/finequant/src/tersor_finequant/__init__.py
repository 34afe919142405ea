"""FineQuant for Tersor."""

from tersor import hookimpl
from tersor_finequant.finequant import FineQuant

__all__ = ["FineQuant"]


@hookimpl
def tersor_quantizer() -> type[FineQuant]:
    return FineQuant
