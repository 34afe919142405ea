"""GPTVQ for Tersor."""

from tersor import hookimpl
from tersor_gptvq.gptvq import GPTVQ

__all__ = ["GPTVQ"]


@hookimpl
def tersor_quantizer() -> type[GPTVQ]:
    return GPTVQ
