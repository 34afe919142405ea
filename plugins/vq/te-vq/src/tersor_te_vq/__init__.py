"""Translation-equivariant vector quantization for Tersor."""

from tersor import hookimpl
from tersor_te_vq.te_vq import TEVQ, TEVQLayer, orthogonality

__all__ = ["TEVQ", "TEVQLayer", "orthogonality"]


@hookimpl
def tersor_quantizer() -> type[TEVQ]:
    return TEVQ
