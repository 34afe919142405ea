"""Flac for Tersor."""

from tersor import hookimpl
from tersor_flac.flac import Flac

__all__ = ["Flac"]


@hookimpl
def tersor_codec() -> type[Flac]:
    return Flac
