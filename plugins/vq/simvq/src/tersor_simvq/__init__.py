"""SimVQ for Tersor."""

from tersor import hookimpl
from tersor_simvq.simvq import SimVQ, SimVQLayer

__all__ = ["SimVQ", "SimVQLayer"]


@hookimpl
def tersor_quantizer() -> type[SimVQ]:
    return SimVQ
