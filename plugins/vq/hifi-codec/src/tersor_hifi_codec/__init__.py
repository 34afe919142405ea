"""Group-residual vector quantization for Tersor."""

from tersor import hookimpl
from tersor_hifi_codec.hifi_codec import GRVQLayer, HiFiCodec

__all__ = ["GRVQLayer", "HiFiCodec"]


@hookimpl
def tersor_quantizer() -> type[HiFiCodec]:
    return HiFiCodec
