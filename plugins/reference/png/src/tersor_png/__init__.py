"""Png for Tersor."""

from tersor import hookimpl
from tersor_png.png import Png

__all__ = ["Png"]


@hookimpl
def tersor_codec() -> type[Png]:
    return Png
