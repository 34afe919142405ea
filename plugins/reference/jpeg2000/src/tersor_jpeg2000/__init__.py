"""Jpeg2000 for Tersor."""

from tersor import hookimpl
from tersor_jpeg2000.jpeg2000 import Jpeg2000

__all__ = ["Jpeg2000"]


@hookimpl
def tersor_codec() -> type[Jpeg2000]:
    return Jpeg2000
