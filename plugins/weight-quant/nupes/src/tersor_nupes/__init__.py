"""NUPES for Tersor."""

from tersor import hookimpl
from tersor_nupes.nupes import NUPES

__all__ = ["NUPES"]


@hookimpl
def tersor_quantizer() -> type[NUPES]:
    return NUPES
