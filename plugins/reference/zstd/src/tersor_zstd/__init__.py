"""Zstandard for Tersor."""

from tersor import hookimpl
from tersor_zstd.zstd import Zstd

__all__ = ["Zstd"]


@hookimpl
def tersor_codec() -> type[Zstd]:
    return Zstd
