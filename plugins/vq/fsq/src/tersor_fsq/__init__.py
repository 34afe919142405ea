"""Finite scalar quantization for Tersor."""

from tersor import hookimpl
from tersor_fsq.fsq import FSQ, FSQLayer

__all__ = ["FSQ", "FSQLayer"]


@hookimpl
def tersor_quantizer() -> type[FSQ]:
    return FSQ
