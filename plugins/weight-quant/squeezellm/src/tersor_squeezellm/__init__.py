"""SqueezeLLM for Tersor."""

from tersor import hookimpl
from tersor_squeezellm.squeezellm import SqueezeLLM

__all__ = ["SqueezeLLM"]


@hookimpl
def tersor_quantizer() -> type[SqueezeLLM]:
    return SqueezeLLM
