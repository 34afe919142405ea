"""RSQ for Tersor."""

from tersor import hookimpl
from tersor_rsq.rsq import RSQ

__all__ = ["RSQ"]


@hookimpl
def tersor_quantizer() -> type[RSQ]:
    return RSQ
