"""MixLLM for Tersor."""

from tersor import hookimpl
from tersor_mixllm.mixllm import MixLLM

__all__ = ["MixLLM"]


@hookimpl
def tersor_quantizer() -> type[MixLLM]:
    return MixLLM
