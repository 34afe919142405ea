"""SoftVQ for Tersor."""

from tersor import hookimpl
from tersor_softvq.softvq import SoftVQ, SoftVQLayer

__all__ = ["SoftVQ", "SoftVQLayer"]


@hookimpl
def tersor_quantizer() -> type[SoftVQ]:
    return SoftVQ
