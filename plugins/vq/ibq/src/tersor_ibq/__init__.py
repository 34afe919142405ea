"""IBQ for Tersor."""

from tersor import hookimpl
from tersor_ibq.ibq import IBQ, IBQLayer

__all__ = ["IBQ", "IBQLayer"]


@hookimpl
def tersor_quantizer() -> type[IBQ]:
    return IBQ
