"""Jpeg for Tersor."""

from tersor import hookimpl
from tersor_jpeg.jpeg import Jpeg

__all__ = ["Jpeg"]


@hookimpl
def tersor_codec() -> type[Jpeg]:
    return Jpeg
