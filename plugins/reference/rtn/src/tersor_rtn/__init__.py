"""Round to nearest for Tersor."""

from tersor import hookimpl
from tersor_rtn.rtn import RTN

__all__ = ["RTN"]


@hookimpl
def tersor_quantizer() -> type[RTN]:
    return RTN
