"""FlatQuant for Tersor."""

from tersor import hookimpl
from tersor_flatquant.flatquant import FlatQuant
from tersor_flatquant.layer import FlatLinear

__all__ = ["FlatLinear", "FlatQuant"]


@hookimpl
def tersor_quantizer() -> type[FlatQuant]:
    return FlatQuant
