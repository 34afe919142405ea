"""GPTQ for Tersor."""

from tersor import hookimpl
from tersor_gptq.gptq import GPTQ

__all__ = ["GPTQ"]


@hookimpl
def tersor_quantizer() -> type[GPTQ]:
    return GPTQ
