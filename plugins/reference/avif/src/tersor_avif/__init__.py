"""Avif for Tersor."""

from tersor import hookimpl
from tersor_avif.avif import Avif

__all__ = ["Avif"]


@hookimpl
def tersor_codec() -> type[Avif]:
    return Avif
