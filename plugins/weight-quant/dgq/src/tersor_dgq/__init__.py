"""Dual grained quantization for Tersor."""

from tersor import hookimpl
from tersor_dgq.dgq import DGQ

__all__ = ["DGQ"]


@hookimpl
def tersor_quantizer() -> type[DGQ]:
    return DGQ
