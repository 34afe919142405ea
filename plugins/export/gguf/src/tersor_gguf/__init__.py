"""The GGUF exporter for Tersor."""

from tersor import hookimpl
from tersor_gguf.exporter import GGUF

__all__ = ["GGUF"]


@hookimpl
def tersor_exporter() -> type[GGUF]:
    return GGUF
