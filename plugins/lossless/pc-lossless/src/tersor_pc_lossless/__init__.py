"""Lossless compression with probabilistic circuits for Tersor."""

from tersor import hookimpl
from tersor_pc_lossless.pc_lossless import PCLossless

__all__ = ["PCLossless"]


@hookimpl
def tersor_codec() -> type[PCLossless]:
    return PCLossless
