"""WaLLoC for Tersor."""

from tersor import hookimpl
from tersor_walloc.walloc import WaLLoC

__all__ = ["WaLLoC"]


@hookimpl
def tersor_codec() -> type[WaLLoC]:
    return WaLLoC
