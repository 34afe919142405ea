"""FQGAN for Tersor."""

from tersor import hookimpl
from tersor_fqgan.fqgan import FQGAN, FQLayer

__all__ = ["FQGAN", "FQLayer"]


@hookimpl
def tersor_quantizer() -> type[FQGAN]:
    return FQGAN
