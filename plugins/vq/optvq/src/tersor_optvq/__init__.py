"""OptVQ for Tersor."""

from tersor import hookimpl
from tersor_optvq.optvq import OptVQ, OptVQLayer

__all__ = ["OptVQ", "OptVQLayer"]


@hookimpl
def tersor_quantizer() -> type[OptVQ]:
    return OptVQ
