"""LLM.int8() for Tersor."""

from tersor import hookimpl
from tersor_llm_int8.llm_int8 import LLMInt8

__all__ = ["LLMInt8"]


@hookimpl
def tersor_quantizer() -> type[LLMInt8]:
    return LLMInt8
