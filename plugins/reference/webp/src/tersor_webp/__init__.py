"""Webp for Tersor."""

from tersor import hookimpl
from tersor_webp.webp import Webp

__all__ = ["Webp"]


@hookimpl
def tersor_codec() -> type[Webp]:
    return Webp
